// isa/avx2.h: the primitives (see scalar.h for what each means) on pairs of 256-bit registers: lanes 0..7
// and 8..15. Needs FMA and F16C beside AVX2. With TINYLLM_AVX_VNNI the dot product is the VEX-coded VPDPBUSD.
#ifndef TINYLLM_AVX2_H
#define TINYLLM_AVX2_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi;
typedef struct {
    __m256i a, b;
} vb;

static inline vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void vf_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline __m256 v_halves(const float *p, size_t step) { // four numbers each of rows 0 and 4 in a register's halves
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
}
static inline void v_load_columns(__m256 columns[4], const float *p, size_t stride) {
    const __m256 a = v_halves(p, 4 * stride), b = v_halves(p + stride, 4 * stride);
    const __m256 c = v_halves(p + 2 * stride, 4 * stride), d = v_halves(p + 3 * stride, 4 * stride);
    const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
    const __m256 ab_high = _mm256_unpackhi_ps(a, b), cd_high = _mm256_unpackhi_ps(c, d);
    columns[0] = _mm256_shuffle_ps(ab, cd, 0x44);
    columns[1] = _mm256_shuffle_ps(ab, cd, 0xee);
    columns[2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    columns[3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
}
static inline void vf_load_columns(vf columns[4], const float *p, size_t stride) {
    __m256 low[4], high[4];
    v_load_columns(low, p, stride);
    v_load_columns(high, p + 8 * stride, stride);
    for (int j = 0; j < 4; j++) columns[j] = (vf){low[j], high[j]};
}
static inline vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf vf_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline vf vf_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline vf vf_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline vf vf_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline vf vf_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline vf vf_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline vf vf_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline vf vf_abs(vf x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline vf vf_if_greater(vf p, vf q, vf x, vf y) {
    return (vf){_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_GT_OQ))};
}
static inline __m256i v_load16(const uint8_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vf vf_load_f16(const uint8_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
static inline float v_f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
static inline vf vf_load_bf16(const uint8_t *p) {
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(v_load16(p), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(v_load16(p + 16), 16))};
}
static inline void vf_store_f16(uint8_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 16), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m256i v_bf16(__m256 x) { // in the lower halves of the lanes
    const __m256i bits = _mm256_castps_si256(x), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
}
static inline void vf_store_bf16(uint8_t *p, vf x) {
    const __m256i mixed = _mm256_packus_epi32(v_bf16(x.a), v_bf16(x.b)); // quarters of a and b in turns
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}

static inline float vf_largest(vf x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
static inline __m256i v_magnitude(__m256 x) { // integers, of which those of NaN are above those of all numbers
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}
static inline float vf_magnitude(vf x, vf y) {
    const __m256i eight = _mm256_max_epi32(_mm256_max_epi32(v_magnitude(x.a), v_magnitude(x.b)),
                                           _mm256_max_epi32(v_magnitude(y.a), v_magnitude(y.b)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
}

static inline vi vi_set1(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline vi vi_add(vi x, vi y) { return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline vi vi_sub(vi x, vi y) { return (vi){_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline __attribute__((always_inline)) vi vi_shl(vi x, const int n) {
    return (vi){_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
static inline vi vi_mul(vi x, vi y) { return (vi){_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
static inline vi vi_load_u8(const uint8_t *p) {
    return (vi){_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
static inline vi vi_load_s8(const uint8_t *p) {
    return (vi){_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))};
}
static inline void vi_store_s8(int8_t *p, vi x) {
    int32_t lanes[16];
    _mm256_storeu_si256((__m256i *)lanes, x.a);
    _mm256_storeu_si256((__m256i *)(lanes + 8), x.b);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)lanes[i];
}
static inline void vi_store(int32_t *p, vi x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)(p + 8), x.b);
}
static inline int32_t vi_sum(vi x) {
    int32_t lanes[8], sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi32(x.a, x.b));
    for (int i = 0; i < 8; i++) sum += lanes[i];
    return sum;
}
static inline vf vf_from_vi(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline vi vi_round(vf x) { return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline __m256 v_pow2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
static inline vf vf_pow2(vi n) { return (vf){v_pow2(n.a), v_pow2(n.b)}; }

static inline vb vb_load(const uint8_t *p) {
    return (vb){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
static inline vb vb_or(vb x, vb y) { return (vb){_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static inline __attribute__((always_inline)) __m256i v_bits(__m256i x, const int right, const int left,
                                                            const int mask) {
    __m256i moved = right ? _mm256_srli_epi16(x, right) : left ? _mm256_slli_epi16(x, left) : x;
    return _mm256_and_si256(moved,
                            _mm256_set1_epi8((char)mask)); // the mask drops what came from the neighbour byte
}
static inline __attribute__((always_inline)) vb vb_bits(vb x, const int right, const int left, const int mask) {
    return (vb){v_bits(x.a, right, left, mask), v_bits(x.b, right, left, mask)};
}
static inline vb vb_lookup(vb x, const uint8_t table[16]) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)),
                  low = _mm256_set1_epi8(15);
    return (vb){_mm256_shuffle_epi8(values, _mm256_and_si256(x.a, low)),
                _mm256_shuffle_epi8(values, _mm256_and_si256(x.b, low))};
}

static inline vb vb_add(vb x, vb y) { return (vb){_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
static inline vb vb_each(const uint8_t *p) {
    const vi lanes = vi_load_u8(p);
    const __m256i first =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    return (vb){_mm256_shuffle_epi8(lanes.a, first), _mm256_shuffle_epi8(lanes.b, first)};
}
static inline vf vf_load_e4m3(const uint8_t *p) { // the sign ends up twice
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
    const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16((short)0xbfff));
    return (vf){_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
static inline __m256 v_pick(const float table[16],
                            __m256i index) { // the lowest 3 bits choose, the fourth between halves
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
static inline vf vf_lookup(const float table[16], const uint8_t *p, int high) {
    const vi index = vi_load_u8(p);
    return (vf){v_pick(table, high ? _mm256_srli_epi32(index.a, 4) : index.a),
                v_pick(table, high ? _mm256_srli_epi32(index.b, 4) : index.b)};
}

typedef __m256i vq;
static inline vq vq_load(const int8_t *p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
}
#ifdef TINYLLM_AVX_VNNI
static inline vi vi_open(vi sum) { return sum; }
static inline vi vi_close(vi sum, vi part) {
    (void)sum;
    return part;
}
static inline vi vi_dot(vi sum, vb w, vq a) {
    return (vi){_mm256_dpbusd_avx_epi32(sum.a, w.a, a), _mm256_dpbusd_avx_epi32(sum.b, w.b, a)};
}
#define V_OFFSET 128
static inline vi vi_dot_offset(vi sum, vb w, vq a) { return vi_dot(sum, w, a); }
#else
// A part is sums of pairs in 16 bits.
static inline vi vi_open(vi sum) {
    (void)sum;
    return (vi){_mm256_setzero_si256(), _mm256_setzero_si256()};
}
static inline vi vi_close(vi sum, vi part) {
    const __m256i one = _mm256_set1_epi16(1);
    return (vi){_mm256_add_epi32(sum.a, _mm256_madd_epi16(part.a, one)),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(part.b, one))};
}
static inline __m256i v_dot(__m256i part, __m256i w, __m256i a) {
    return _mm256_add_epi16(part, _mm256_maddubs_epi16(w, a));
}
static inline vi vi_dot(vi part, vb w, vq a) { return (vi){v_dot(part.a, w.a, a), v_dot(part.b, w.b, a)}; }
#define V_OFFSET 0 // the offset is taken off here: |w| x (a with w's sign)
static inline __m256i v_dot_signed(__m256i part, __m256i w, __m256i a) {
    const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return v_dot(part, _mm256_abs_epi8(s), _mm256_sign_epi8(a, s));
}
static inline vi vi_dot_offset(vi part, vb w, vq a) {
    return (vi){v_dot_signed(part.a, w.a, a), v_dot_signed(part.b, w.b, a)};
}
#endif

#endif
