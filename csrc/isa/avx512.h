// isa/avx512.h: the primitives (see scalar.h for what each means) on 512-bit registers; one register a vector.
// With TINYLLM_VNNI the dot product is VPDPBUSD; without it, pairs in VPMADDUBSW, which saturates only above
// 6-bit weights.
#ifndef TINYLLM_AVX512_H
#define TINYLLM_AVX512_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf v_quarters(const float *p,
                            size_t step) { // four numbers each of rows 0, 4, 8, 12 in a register's quarters
    vf r = _mm512_castps128_ps512(_mm_loadu_ps(p));
    r = _mm512_insertf32x4(r, _mm_loadu_ps(p + step), 1);
    r = _mm512_insertf32x4(r, _mm_loadu_ps(p + 2 * step), 2);
    return _mm512_insertf32x4(r, _mm_loadu_ps(p + 3 * step), 3);
}
static inline void vf_load_columns(vf columns[4], const float *p, size_t stride) {
    const vf a = v_quarters(p, 4 * stride), b = v_quarters(p + stride, 4 * stride);
    const vf c = v_quarters(p + 2 * stride, 4 * stride), d = v_quarters(p + 3 * stride, 4 * stride);
    const vf ab = _mm512_unpacklo_ps(a, b), cd = _mm512_unpacklo_ps(c, d);
    const vf ab_high = _mm512_unpackhi_ps(a, b), cd_high = _mm512_unpackhi_ps(c, d);
    columns[0] = _mm512_shuffle_ps(ab, cd, 0x44);
    columns[1] = _mm512_shuffle_ps(ab, cd, 0xee);
    columns[2] = _mm512_shuffle_ps(ab_high, cd_high, 0x44);
    columns[3] = _mm512_shuffle_ps(ab_high, cd_high, 0xee);
}
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_if_greater(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
static inline vf vf_load_f16(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline float v_f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
static inline vf vf_load_bf16(const uint8_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void vf_store_f16(uint8_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void vf_store_bf16(uint8_t *p, vf a) { // VCVTNEPS2BF16 would take subnormals for zeros
    const __m512i bits = _mm512_castps_si512(a), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i halves = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, quiet);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(halves));
}

static inline float vf_largest(vf a) { return _mm512_reduce_max_ps(a); }
static inline float vf_magnitude(vf a, vf b) { // as integers, where NaN is above all numbers
    const __m512i largest = _mm512_max_epi32(_mm512_castps_si512(vf_abs(a)), _mm512_castps_si512(vf_abs(b)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
}

static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static inline __attribute__((always_inline)) vi vi_shl(vi a, const int n) { return _mm512_slli_epi32(a, (unsigned)n); }
static inline vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static inline vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vi vi_load_s8(const uint8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline void vi_store_s8(int8_t *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
static inline void vi_store(int32_t *p, vi a) { _mm512_storeu_si512(p, a); }
static inline int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
static inline vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi vi_round(vf a) { return _mm512_cvtps_epi32(a); }
static inline vf vf_pow2(vi n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

static inline vb vb_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
static inline __attribute__((always_inline)) vb vb_bits(vb a, const int right, const int left, const int mask) {
    vb moved = right ? _mm512_srli_epi16(a, right) : left ? _mm512_slli_epi16(a, left) : a;
    return _mm512_and_si512(moved,
                            _mm512_set1_epi8((char)mask)); // the mask drops what came from the neighbour byte
}
static inline vb vb_lookup(vb a, const uint8_t table[16]) {
    vb values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    return _mm512_shuffle_epi8(values, _mm512_and_si512(a, _mm512_set1_epi8(15)));
}

static inline vb vb_add(vb a, vb b) { return _mm512_add_epi8(a, b); }
static inline vb vb_each(const uint8_t *p) {
    const __m128i first = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    return _mm512_shuffle_epi8(vi_load_u8(p), _mm512_broadcast_i32x4(first));
}
static inline vf vf_load_e4m3(const uint8_t *p) { // the sign ends up twice
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(moved, _mm256_set1_epi16((short)0xbfff)));
}
static inline vf vf_lookup(const float table[16], const uint8_t *p, int high) { // the lowest 4 bits choose
    const vi index = vi_load_u8(p);
    return _mm512_permutexvar_ps(high ? _mm512_srli_epi32(index, 4) : index, _mm512_loadu_ps(table));
}

typedef __m512i vq;
static inline vq vq_load(const int8_t *p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
}
#ifdef TINYLLM_VNNI
static inline vi vi_open(vi sum) { return sum; }
static inline vi vi_close(vi sum, vi part) {
    (void)sum;
    return part;
}
static inline vi vi_dot(vi sum, vb w, vq a) { return _mm512_dpbusd_epi32(sum, w, a); }
#define V_OFFSET 128
static inline vi vi_dot_offset(vi sum, vb w, vq a) { return vi_dot(sum, w, a); }
#else
// A part is sums of pairs in 16 bits.
static inline vi vi_open(vi sum) {
    (void)sum;
    return _mm512_setzero_si512();
}
static inline vi vi_close(vi sum, vi part) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
}
static inline vi vi_dot(vi part, vb w, vq a) { return _mm512_add_epi16(part, _mm512_maddubs_epi16(w, a)); }
#define V_OFFSET 0 // the offset is taken off here: |w| x (a with w's sign)
static inline vi vi_dot_offset(vi part, vb w, vq a) {
    vi s = _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80));
    vi signed_quad = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(s), _mm512_setzero_si512(), a);
    return vi_dot(part, _mm512_abs_epi8(s), signed_quad);
}
#endif

#endif
