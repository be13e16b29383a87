// isa/tiles.h: the primitives of a matrix unit, on which kernels/tiles.inc is written: eight registers (tiles) of up to
// 16 rows of 64 bytes. With TINYLLM_AMX they are AMX's instructions, beside the vectors of avx512.h; without it plain C,
// beside those of scalar.h: the reference, and what the tests run where there is no such unit.
#ifndef TINYLLM_TILES_H
#define TINYLLM_TILES_H

#include <stdint.h>
#include <string.h>

// How many rows each register has, and how many bytes each of those; the layout is LDTILECFG's.
typedef struct t_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} t_shapes;

#ifdef TINYLLM_AMX
// Registers are named by literals. GCC 12's own _tile_loadconfig says that it reads 8 bytes of the 64, so that the rest is
// never stored; and its _tile_loadd does not say that it reads memory at all.
// What others in this thread have set stays: ggml, for one, sets its shapes once a thread.
#define T_BEGIN(before, shapes) __asm__ volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(*(before)) : "m"(*(shapes)))
#define T_END(before)                                                                                                  \
    do {                                                                                                               \
        if ((before)->palette)                                                                                         \
            __asm__ volatile("ldtilecfg %0" ::"m"(*(before)));                                                         \
        else                                                                                                           \
            __asm__ volatile("tilerelease" ::);                                                                        \
    } while (0)
#define T_LOAD(t, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(p), "r"((size_t)(stride)) : "memory")
#define T_ZERO(t)            __asm__ volatile("tilezero %%tmm" #t::)
#define T_STORE(p, stride, t)                                                                                          \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((size_t)(stride)) : "memory")
#define T_DOT(sum, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::)

// Integers become floats by two additions: put into the last bits of 1.5 * 2^23, whose float is then as much larger (of
// 1.5 * 2^30 in units of 128), which is taken off. A processor whose matrix unit is in use has one port left for 512-bit
// conversions, products and fmas, and two for additions.
static inline vf t_added(const int32_t *p, float large) {
    const __m512i bits = _mm512_add_epi32(_mm512_load_si512(p), _mm512_castps_si512(_mm512_set1_ps(large)));
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(large));
}
static inline vf t_sums(const int32_t *p) { return t_added(p, 0x1.8p23f); }
static inline vf t_high(const int32_t *p) { return t_added(p, 0x1.8p30f); }
static inline vf t_low(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_load_si512(p)); }
static inline void t_put(int8_t *p, vb a) { _mm512_store_si512(p, a); }
static inline __attribute__((always_inline)) vb t_signed(vb code, const int zero) {
    return zero ? _mm512_sub_epi8(code, _mm512_set1_epi8((char)zero)) : code;
}
static inline vi t_pairs(vi scale) { return _mm512_or_si512(scale, _mm512_slli_epi32(scale, 16)); }
static inline vb t_times(vb w, vi scale) {
    const __m512i s = t_pairs(_mm512_and_si512(scale, _mm512_set1_epi32(0xffff)));
    const __m512i even = _mm512_mullo_epi16(w, s), odd = _mm512_mullo_epi16(_mm512_srli_epi16(w, 8), s);
    return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, even, _mm512_slli_epi16(odd, 8));
}
static inline void t_split(vb *high, vb *low, vb w, vi scale) {
    const __m512i s = t_pairs(_mm512_and_si512(scale, _mm512_set1_epi32(0xffff))), half = _mm512_set1_epi16(64);
    const __m512i first = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), second = _mm512_srai_epi16(w, 8);
    const __m512i even = _mm512_add_epi16(_mm512_mullo_epi16(first, s), half);
    const __m512i odd = _mm512_add_epi16(_mm512_mullo_epi16(second, s), half);
    const __m512i odd_bytes = _mm512_slli_epi16(odd, 8);
    const __mmask64 upper = 0xaaaaaaaaaaaaaaaa;
    *high = _mm512_mask_blend_epi8(upper, _mm512_srai_epi16(even, 7), _mm512_slli_epi16(_mm512_srai_epi16(odd, 7), 8));
    *low = _mm512_and_si512(_mm512_mask_blend_epi8(upper, even, odd_bytes), _mm512_set1_epi8(127));
    *low = _mm512_sub_epi8(*low, _mm512_set1_epi8(64));
}
#else
static _Thread_local struct {
    t_shapes shapes;
    uint8_t bytes[8][16][64];
} t_unit;

static inline void t_begin(t_shapes *before, const t_shapes *shapes) {
    *before = t_unit.shapes;
    t_unit.shapes = *shapes;
}
static inline void t_end(const t_shapes *before) {
    memset(&t_unit, 0, sizeof t_unit);
    t_unit.shapes = *before;
}
static inline void t_zero(int t) { memset(t_unit.bytes[t], 0, sizeof t_unit.bytes[t]); }
static inline void t_load(int t, const void *p, size_t stride) {
    t_zero(t);
    for (size_t i = 0; i < t_unit.shapes.rows[t]; i++)
        memcpy(t_unit.bytes[t][i], (const uint8_t *)p + i * stride, t_unit.shapes.row_bytes[t]);
}
static inline void t_store(void *p, size_t stride, int t) {
    for (size_t i = 0; i < t_unit.shapes.rows[t]; i++)
        memcpy((uint8_t *)p + i * stride, t_unit.bytes[t][i], t_unit.shapes.row_bytes[t]);
}
// sum[i][j] += a[i][4 n + m] * b[n][4 j + m], over n and m: a row of a is a token's numbers, a row of b 4 k of all rows.
static inline void t_dot(int sum, int a, int b) {
    for (int i = 0; i < t_unit.shapes.rows[sum]; i++) {
        const int8_t *numbers = (const int8_t *)t_unit.bytes[a][i], *weights = (const int8_t *)t_unit.bytes[b];
        int32_t s[16];
        memcpy(s, t_unit.bytes[sum][i], sizeof s);
        for (int k = 0; k < t_unit.shapes.row_bytes[a]; k++)
            for (int j = 0; j < 16; j++) s[j] += numbers[k] * weights[k / 4 * 64 + 4 * j + k % 4];
        memcpy(t_unit.bytes[sum][i], s, sizeof s);
    }
}
#define T_ZERO(t)               t_zero(t)
#define T_BEGIN(before, shapes) t_begin(before, shapes)
#define T_END(before)           t_end(before)
#define T_LOAD(t, p, stride)    t_load(t, p, (size_t)(stride))
#define T_STORE(p, stride, t)   t_store(p, (size_t)(stride), t)
#define T_DOT(sum, a, b)        t_dot(sum, a, b)

// Integers, below 2^22, to floats; of the high part of a split number times 128.
static inline vf t_sums(const int32_t *p) { V_OP(vf, (float)p[i]); }
static inline vf t_high(const int32_t *p) { V_OP(vf, (float)(128 * p[i])); }
static inline vf t_low(const int32_t *p) { V_OP(vf, (float)p[i]); }
static inline void t_put(int8_t *p, vb a) { memcpy(p, a.v, sizeof a.v); }
static inline vb t_signed(vb code, int zero) { // code - zero, in 8 bits
    V_BYTES code.v[i] = (uint8_t)(code.v[i] - zero);
    return code;
}
static inline vb t_times(vb w, vi scale) { // every row's numbers times its scale, in 8 bits
    V_BYTES w.v[i] = (uint8_t)((int8_t)w.v[i] * scale.v[i / 4]);
    return w;
}
// The same products, up to 13 bits, as 128 * high + low, -64 <= low < 64.
static inline void t_split(vb *high, vb *low, vb w, vi scale) {
    V_BYTES {
        const int product = (int8_t)w.v[i] * scale.v[i / 4], upper = (product + 64 + 128 * 64) / 128 - 64;
        high->v[i] = (uint8_t)upper;
        low->v[i] = (uint8_t)(product - 128 * upper);
    }
}
#endif

#endif
