// isa/scalar.h: the vector primitives in plain C: the reference every other instruction set must equal bit for
// bit. A vf is 16 floats, a vi 16 int32, a vb 64 bytes: 16 lanes (rows) of 4 consecutive k each.
#ifndef TINYLLM_SCALAR_H
#define TINYLLM_SCALAR_H

#include "formats/formats.h"
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    float v[16];
} vf;
typedef struct {
    int32_t v[16];
} vi;
typedef struct {
    uint8_t v[64];
} vb;

#define V_EACH  for (int i = 0; i < 16; i++)
#define V_BYTES for (int i = 0; i < 64; i++)
#define V_OP(type, expression)                                                                                         \
    type r;                                                                                                            \
    V_EACH r.v[i] = (expression);                                                                                      \
    return r

static inline vf vf_load(const float *p) { V_OP(vf, p[i]); }
static inline void vf_store(float *p, vf a) { V_EACH p[i] = a.v[i]; }
// columns[j] lane i = p[i * stride + j]: four numbers of each of 16 rows.
static inline void vf_load_columns(vf columns[4], const float *p, size_t stride) {
    for (int j = 0; j < 4; j++) V_EACH columns[j].v[i] = p[(size_t)i * stride + (size_t)j];
}
static inline vf vf_set1(float x) { V_OP(vf, x); }
static inline vf vf_add(vf a, vf b) { V_OP(vf, a.v[i] + b.v[i]); }
static inline vf vf_sub(vf a, vf b) { V_OP(vf, a.v[i] - b.v[i]); }
static inline vf vf_mul(vf a, vf b) { V_OP(vf, a.v[i] * b.v[i]); }
static inline vf vf_div(vf a, vf b) { V_OP(vf, a.v[i] / b.v[i]); }
static inline vf vf_fma(vf a, vf b, vf c) { V_OP(vf, fmaf(a.v[i], b.v[i], c.v[i])); } // a * b + c, rounded once
static inline vf vf_max(vf a, vf b) { V_OP(vf, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline vf vf_min(vf a, vf b) { V_OP(vf, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline vf vf_abs(vf a) { V_OP(vf, fabsf(a.v[i])); }
static inline vf vf_if_greater(vf a, vf b, vf x, vf y) { V_OP(vf, a.v[i] > b.v[i] ? x.v[i] : y.v[i]); } // NaN: y
static inline vf vf_load_f16(const uint8_t *p) {
    uint16_t h[16];
    memcpy(h, p, sizeof h);
    V_OP(vf, tl_f16_to_f32(h[i]));
}
static inline float v_f16_to_f32(uint16_t h) { return tl_f16_to_f32(h); }
static inline vf vf_load_bf16(const uint8_t *p) {
    uint16_t h[16];
    memcpy(h, p, sizeof h);
    V_OP(vf, tl_bf16_to_f32(h[i]));
}
static inline void vf_store_f16(uint8_t *p, vf a) {
    uint16_t h[16];
    V_EACH h[i] = tl_f32_to_f16(a.v[i]);
    memcpy(p, h, sizeof h);
}
static inline void vf_store_bf16(uint8_t *p, vf a) {
    uint16_t h[16];
    V_EACH h[i] = tl_f32_to_bf16(a.v[i]);
    memcpy(p, h, sizeof h);
}

static inline float vf_largest(vf a) {
    float largest = a.v[0];
    for (int i = 1; i < 16; i++) largest = a.v[i] > largest ? a.v[i] : largest;
    return largest;
}

// The largest magnitude of 32 numbers; NaN where one of them is.
static inline float vf_magnitude(vf a, vf b) {
    float largest = 0;
    for (int i = 0; i < 32; i++) {
        const float x = fabsf(i < 16 ? a.v[i] : b.v[i - 16]);
        largest = x > largest || x != x ? x : largest;
    }
    return largest;
}

static inline vi vi_set1(int32_t x) { V_OP(vi, x); }
static inline vi vi_add(vi a, vi b) { V_OP(vi, a.v[i] + b.v[i]); }
static inline vi vi_sub(vi a, vi b) { V_OP(vi, a.v[i] - b.v[i]); }
static inline vi vi_shl(vi a, int n) { V_OP(vi, a.v[i] * (1 << n)); } // n is a constant
static inline vi vi_mul(vi a, vi b) { V_OP(vi, a.v[i] * b.v[i]); }
static inline vi vi_load_u8(const uint8_t *p) { V_OP(vi, p[i]); }
static inline vi vi_load_s8(const uint8_t *p) { V_OP(vi, (int8_t)p[i]); }
static inline void vi_store_s8(int8_t *p, vi a) { V_EACH p[i] = (int8_t)a.v[i]; } // values fit
static inline void vi_store(int32_t *p, vi a) { V_EACH p[i] = a.v[i]; }
static inline int32_t vi_sum(vi a) {
    int32_t s = 0;
    V_EACH s += a.v[i];
    return s;
}
static inline vf vf_from_vi(vi a) { V_OP(vf, (float)a.v[i]); }
// Half to even; |a| < 2^31, or NaN.
static inline vi vi_round(vf a) { V_OP(vi, a.v[i] == a.v[i] ? (int32_t)rintf(a.v[i]) : 0); }
static inline vf vf_pow2(vi n) { // 2^n, -126 <= n <= 127
    vf r;
    V_EACH {
        uint32_t u = (uint32_t)(n.v[i] + 127) << 23;
        memcpy(&r.v[i], &u, 4);
    }
    return r;
}

static inline vb vb_load(const uint8_t *p) {
    vb r;
    memcpy(r.v, p, 64);
    return r;
}
static inline vb vb_or(vb a, vb b) {
    vb r;
    V_BYTES r.v[i] = a.v[i] | b.v[i];
    return r;
}
// ((a >> right) << left) & mask in every byte; right and left are constants, at most one of them non-zero.
static inline vb vb_bits(vb a, int right, int left, int mask) {
    vb r;
    V_BYTES r.v[i] = (uint8_t)(a.v[i] >> right << left & mask);
    return r;
}
static inline vb vb_lookup(vb a, const uint8_t table[16]) {
    vb r;
    V_BYTES r.v[i] = table[a.v[i] & 15];
    return r;
}

static inline vb vb_add(vb a, vb b) {
    vb r;
    V_BYTES r.v[i] = (uint8_t)(a.v[i] + b.v[i]);
    return r;
}
static inline vb vb_each(const uint8_t *p) { // byte i of 16 in all four bytes of lane i
    vb r;
    V_BYTES r.v[i] = p[i / 4];
    return r;
}
// 16 8-bit floats of 4 exponent and 3 mantissa bits (E4M3), divided by 256; 0x7f is 480.
static inline vf vf_load_e4m3(const uint8_t *p) {
    V_OP(vf, tl_f16_to_f32((unsigned short)((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7)));
}
// What the low (or the high) half of each of 16 bytes stands for.
static inline vf vf_lookup(const float table[16], const uint8_t *p, int high) {
    V_OP(vf, table[high ? p[i] >> 4 : p[i] & 15]);
}

// A token's 4 activations, ready to meet 4 weights in every lane.
typedef struct vq {
    int8_t v[4];
} vq;
static inline vq vq_load(const int8_t *p) { return (vq){{p[0], p[1], p[2], p[3]}}; }

// Adds to each row's lane its 4 weights times a token's 4 activations. vi_dot: weights 0..63.
// vi_dot_offset: weights -128..127 stored +128, for accumulators that started at -V_OFFSET x (sum of the
// activations). Both add to a part: some instruction sets keep it in 16 bits, which hold so many dot products as
// formats/formats.inc says of a format (FIT_NAME). vi_open starts one, vi_close adds it to the sum.
static inline vi vi_open(vi sum) { return sum; }
static inline vi vi_close(vi sum, vi part) {
    (void)sum;
    return part;
}
static inline vi vi_dot(vi sum, vb w, vq a) {
    for (int j = 0; j < 4; j++) V_EACH sum.v[i] += w.v[4 * i + j] * a.v[j];
    return sum;
}
#define V_OFFSET 128
static inline vi vi_dot_offset(vi sum, vb w, vq a) { return vi_dot(sum, w, a); }

#endif
