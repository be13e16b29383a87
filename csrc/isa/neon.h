// isa/neon.h: the primitives (see scalar.h for what each means) on fours of 128-bit registers: lanes 0..3, 4..7,
// 8..11 and 12..15. Needs what every ARMv8-A has, half-precision conversion included. With TINYLLM_DOTPROD the
// dot product is SDOT.
#ifndef TINYLLM_NEON_H
#define TINYLLM_NEON_H

#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float32x4_t a, b, c, d;
} vf;
typedef struct {
    int32x4_t a, b, c, d;
} vi;
typedef struct {
    uint8x16_t a, b, c, d;
} vb;

// f of each register of x; of x and y.
#define V_EACH(f, x)    {f((x).a), f((x).b), f((x).c), f((x).d)}
#define V_BOTH(f, x, y) {f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)}
#define V_ALL(f, x, y, z)                                                                                              \
    {f((x).a, (y).a, (z).a), f((x).b, (y).b, (z).b), f((x).c, (y).c, (z).c), f((x).d, (y).d, (z).d)}

static inline vf vf_load(const float *p) {
    return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
static inline void vf_store(float *p, vf x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
static inline void v_load_columns(float32x4_t columns[4], const float *p, size_t stride) {
    const float32x4_t a = vld1q_f32(p), b = vld1q_f32(p + stride);
    const float32x4_t c = vld1q_f32(p + 2 * stride), d = vld1q_f32(p + 3 * stride);
    const float64x2_t ab = vreinterpretq_f64_f32(vzip1q_f32(a, b)), cd = vreinterpretq_f64_f32(vzip1q_f32(c, d));
    const float64x2_t ab_high = vreinterpretq_f64_f32(vzip2q_f32(a, b));
    const float64x2_t cd_high = vreinterpretq_f64_f32(vzip2q_f32(c, d));
    columns[0] = vreinterpretq_f32_f64(vzip1q_f64(ab, cd));
    columns[1] = vreinterpretq_f32_f64(vzip2q_f64(ab, cd));
    columns[2] = vreinterpretq_f32_f64(vzip1q_f64(ab_high, cd_high));
    columns[3] = vreinterpretq_f32_f64(vzip2q_f64(ab_high, cd_high));
}
static inline void vf_load_columns(vf columns[4], const float *p, size_t stride) {
    float32x4_t rows[4][4]; // [rows 4j..4j+3][column]
    for (size_t j = 0; j < 4; j++) v_load_columns(rows[j], p + 4 * j * stride, stride);
    for (int j = 0; j < 4; j++) columns[j] = (vf){rows[0][j], rows[1][j], rows[2][j], rows[3][j]};
}
static inline vf vf_set1(float x) { return (vf){vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline vf vf_add(vf x, vf y) { return (vf)V_BOTH(vaddq_f32, x, y); }
static inline vf vf_sub(vf x, vf y) { return (vf)V_BOTH(vsubq_f32, x, y); }
static inline vf vf_mul(vf x, vf y) { return (vf)V_BOTH(vmulq_f32, x, y); }
static inline vf vf_div(vf x, vf y) { return (vf)V_BOTH(vdivq_f32, x, y); }
static inline vf vf_fma(vf x, vf y, vf z) { return (vf)V_ALL(vfmaq_f32, z, x, y); }
// FMAX and FMIN order the zeros; a comparison takes the second of equals, as everywhere else.
static inline float32x4_t v_max(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
static inline float32x4_t v_min(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
static inline vf vf_max(vf x, vf y) { return (vf)V_BOTH(v_max, x, y); }
static inline vf vf_min(vf x, vf y) { return (vf)V_BOTH(v_min, x, y); }
static inline vf vf_abs(vf x) { return (vf)V_EACH(vabsq_f32, x); }
#define V_PICK(part) vbslq_f32(vcgtq_f32(p.part, q.part), x.part, y.part)
static inline vf vf_if_greater(vf p, vf q, vf x, vf y) { return (vf){V_PICK(a), V_PICK(b), V_PICK(c), V_PICK(d)}; }
static inline vf vf_load_f16(const uint8_t *p) {
    const float16x8_t low = vreinterpretq_f16_u8(vld1q_u8(p)), high = vreinterpretq_f16_u8(vld1q_u8(p + 16));
    return (vf){vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high)};
}
static inline float v_f16_to_f32(uint16_t h) {
    __fp16 x;
    memcpy(&x, &h, 2);
    return x;
}
static inline float32x4_t v_bf16(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
static inline vf vf_load_bf16(const uint8_t *p) {
    const uint16x8_t low = vreinterpretq_u16_u8(vld1q_u8(p)), high = vreinterpretq_u16_u8(vld1q_u8(p + 16));
    return (vf){v_bf16(vget_low_u16(low)), v_bf16(vget_high_u16(low)), v_bf16(vget_low_u16(high)),
                v_bf16(vget_high_u16(high))};
}
static inline void vf_store_f16(uint8_t *p, vf x) {
    vst1q_u8(p, vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u8(p + 16, vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
static inline uint16x4_t v_to_bf16(float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), upper = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1)), quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet));
}
static inline void vf_store_bf16(uint8_t *p, vf x) {
    vst1q_u8(p, vreinterpretq_u8_u16(vcombine_u16(v_to_bf16(x.a), v_to_bf16(x.b))));
    vst1q_u8(p + 16, vreinterpretq_u8_u16(vcombine_u16(v_to_bf16(x.c), v_to_bf16(x.d))));
}

static inline float vf_largest(vf x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d))); }
static inline float vf_magnitude(vf x, vf y) { // FMAX keeps NaN
    const float32x4_t low =
        vmaxq_f32(vmaxq_f32(vabsq_f32(x.a), vabsq_f32(x.b)), vmaxq_f32(vabsq_f32(x.c), vabsq_f32(x.d)));
    const float32x4_t high =
        vmaxq_f32(vmaxq_f32(vabsq_f32(y.a), vabsq_f32(y.b)), vmaxq_f32(vabsq_f32(y.c), vabsq_f32(y.d)));
    return vmaxvq_f32(vmaxq_f32(low, high));
}

static inline vi vi_set1(int32_t x) { return (vi){vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
static inline vi vi_add(vi x, vi y) { return (vi)V_BOTH(vaddq_s32, x, y); }
static inline vi vi_sub(vi x, vi y) { return (vi)V_BOTH(vsubq_s32, x, y); }
static inline __attribute__((always_inline)) vi vi_shl(vi x, const int n) {
    return (vi){x.a << vdupq_n_s32(n), x.b << vdupq_n_s32(n), x.c << vdupq_n_s32(n), x.d << vdupq_n_s32(n)};
}
static inline vi vi_mul(vi x, vi y) { return (vi)V_BOTH(vmulq_s32, x, y); }
static inline vi v_widen(int16x8_t low, int16x8_t high) {
    return (vi){vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
static inline vi vi_load_u8(const uint8_t *p) {
    const uint8x16_t x = vld1q_u8(p);
    return v_widen(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(x))), vreinterpretq_s16_u16(vmovl_high_u8(x)));
}
static inline vi vi_load_s8(const uint8_t *p) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
    return v_widen(vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
}
static inline void vi_store_s8(int8_t *p, vi x) {
    const int16x8_t low = vmovn_high_s32(vmovn_s32(x.a), x.b), high = vmovn_high_s32(vmovn_s32(x.c), x.d);
    vst1q_s8(p, vmovn_high_s16(vmovn_s16(low), high));
}
static inline void vi_store(int32_t *p, vi x) {
    vst1q_s32(p, x.a);
    vst1q_s32(p + 4, x.b);
    vst1q_s32(p + 8, x.c);
    vst1q_s32(p + 12, x.d);
}
static inline int32_t vi_sum(vi x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.b), vaddq_s32(x.c, x.d))); }
static inline vf vf_from_vi(vi x) { return (vf)V_EACH(vcvtq_f32_s32, x); }
static inline vi vi_round(vf x) { return (vi)V_EACH(vcvtnq_s32_f32, x); }
static inline float32x4_t v_pow2(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
static inline vf vf_pow2(vi n) { return (vf)V_EACH(v_pow2, n); }

static inline vb vb_load(const uint8_t *p) {
    return (vb){vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
static inline vb vb_or(vb x, vb y) { return (vb)V_BOTH(vorrq_u8, x, y); }
// The operators take what an inlined parameter says; the intrinsics' shifts take literals only.
static inline __attribute__((always_inline)) uint8x16_t v_bits(uint8x16_t x, const int right, const int left,
                                                               const int mask) {
    x = right ? x >> vdupq_n_u8((uint8_t)right) : left ? x << vdupq_n_u8((uint8_t)left) : x;
    return mask == (0xff >> right << left & 0xff) ? x : vandq_u8(x, vdupq_n_u8((uint8_t)mask));
}
static inline __attribute__((always_inline)) vb vb_bits(vb x, const int right, const int left, const int mask) {
    return (vb){v_bits(x.a, right, left, mask), v_bits(x.b, right, left, mask), v_bits(x.c, right, left, mask),
                v_bits(x.d, right, left, mask)};
}
static inline vb vb_lookup(vb x, const uint8_t table[16]) {
    const uint8x16_t values = vld1q_u8(table), low = vdupq_n_u8(15);
    return (vb){vqtbl1q_u8(values, vandq_u8(x.a, low)), vqtbl1q_u8(values, vandq_u8(x.b, low)),
                vqtbl1q_u8(values, vandq_u8(x.c, low)), vqtbl1q_u8(values, vandq_u8(x.d, low))};
}

static inline vb vb_add(vb x, vb y) { return (vb)V_BOTH(vaddq_u8, x, y); }
static inline vb vb_each(const uint8_t *p) {
    static const uint8_t first[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t rows = vld1q_u8(p), index = vld1q_u8(first), four = vdupq_n_u8(4);
    const uint8x16_t second = vaddq_u8(index, four), third = vaddq_u8(second, four);
    return (vb){vqtbl1q_u8(rows, index), vqtbl1q_u8(rows, second), vqtbl1q_u8(rows, third),
                vqtbl1q_u8(rows, vaddq_u8(third, four))};
}
static inline float16x8_t v_e4m3(int8x8_t x) { // the sign ends up twice
    return vreinterpretq_f16_s16(vandq_s16(vshlq_n_s16(vmovl_s8(x), 7), vdupq_n_s16((int16_t)0xbfff)));
}
static inline vf vf_load_e4m3(const uint8_t *p) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
    const float16x8_t low = v_e4m3(vget_low_s8(x)), high = v_e4m3(vget_high_s8(x));
    return (vf){vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high)};
}
static inline vf vf_lookup(const float table[16], const uint8_t *p, int high) {
    float x[16];
    for (int i = 0; i < 16; i++) x[i] = table[high ? p[i] >> 4 : p[i] & 15];
    return vf_load(x);
}

typedef int8x8_t vq; // in lane 0 of two
static inline vq vq_load(const int8_t *p) {
    uint32_t quad;
    memcpy(&quad, p, 4);
    return vcreate_s8(quad);
}
#ifdef TINYLLM_DOTPROD
static inline int32x4_t v_dot(int32x4_t sum, int8x16_t w, int8x8_t quad) { return vdotq_lane_s32(sum, w, quad, 0); }
#else
// Two products in 16 bits, then those in 32: 2 x 128 x 127 = 32512 fits.
static inline int32x4_t v_dot(int32x4_t sum, int8x16_t w, int8x8_t quad) {
    const int8x16_t a = vreinterpretq_s8_s32(vdupq_lane_s32(vreinterpret_s32_s8(quad), 0));
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)));
}
#endif
static inline vi vi_open(vi sum) { return sum; }
static inline vi vi_close(vi sum, vi part) {
    (void)sum;
    return part;
}
static inline vi vi_dot(vi sum, vb w, vq a) {
    return (vi){v_dot(sum.a, vreinterpretq_s8_u8(w.a), a), v_dot(sum.b, vreinterpretq_s8_u8(w.b), a),
                v_dot(sum.c, vreinterpretq_s8_u8(w.c), a), v_dot(sum.d, vreinterpretq_s8_u8(w.d), a)};
}
#define V_OFFSET 0 // the offset is taken off here: + 128 turns the sign bit around
static inline vi vi_dot_offset(vi sum, vb w, vq a) {
    const uint8x16_t sign = vdupq_n_u8(0x80);
    return vi_dot(sum, (vb){veorq_u8(w.a, sign), veorq_u8(w.b, sign), veorq_u8(w.c, sign), veorq_u8(w.d, sign)}, a);
}

#endif
