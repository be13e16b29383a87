// formats/formats.h: the one table of formats. A row here is a format everywhere: its numbers in the file (pack.c),
// its panel layout (pack.c), its fragment (formats.inc) and its instantiation of the matrix product
// (kernels/matmul.inc).
#ifndef TINYLLM_FORMATS_H
#define TINYLLM_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// X(name, id in GGUF, numbers a block, bytes a block in the file, bytes of 16 rows' blocks in a panel,
// is_float, what else tl_format has of it...)
#define TL_GGUF_FORMATS(X)                                                                                             \
    X(f32, 0, 1, 4, 64, 1)                                                                                             \
    X(f16, 1, 1, 2, 32, 1)                                                                                             \
    X(bf16, 30, 1, 2, 32, 1)                                                                                           \
    X(q8_0, 8, 32, 34, 512 + 32, 0)                                                                                    \
    X(q4_0, 2, 32, 18, 256 + 32, 0)                                                                                    \
    X(q4_1, 3, 32, 20, 256 + 64, 0)                                                                                    \
    X(q5_0, 6, 32, 22, 256 + 64 + 32, 0)                                                                               \
    X(q5_1, 7, 32, 24, 256 + 64 + 64, 0)                                                                               \
    X(q2_k, 10, 256, 84, 64 + 8 * (128 + 32), 0)                                                                       \
    X(q3_k, 11, 256, 110, 32 + 8 * (128 + 64 + 32), 0)                                                                 \
    X(q4_k, 12, 256, 144, 64 + 8 * (256 + 32), 0)                                                                      \
    X(q5_k, 13, 256, 176, 64 + 8 * (256 + 64 + 32), 0)                                                                 \
    X(q6_k, 14, 256, 210, 32 + 8 * (256 + 128 + 32), 0)                                                                \
    X(iq4_nl, 20, 32, 18, 256 + 32, 0)                                                                                 \
    X(iq4_xs, 23, 256, 136, 32 + 8 * (256 + 16), 0)                                                                    \
    X(mxfp4, 39, 32, 17, 256 + 16, 0)                                                                                  \
    TL_SMALL_FORMATS(X)

// Those of pack_small.c and formats_small.inc. Several share a panel's layout and its fragment.
#define TL_SMALL_FORMATS(X)                                                                                            \
    X(nvfp4, 40, 64, 36, 2 * (256 + 32), 0)                                                                            \
    X(tq1_0, 34, 256, 54, 32 + 8 * 128, 0)                                                                             \
    X(tq2_0, 35, 256, 66, 32 + 8 * 128, 0)                                                                             \
    X(q1_0, 41, 128, 18, 32 + 4 * 64, 0)                                                                               \
    X(q2_0, 42, 64, 18, 32 + 2 * 128, 0)                                                                               \
    X(iq3_xxs, 18, 256, 98, 32 + 16 + 8 * (256 + 16), 0, .codes = tl_codes_iq3_xxs, .n_codes = 256)                    \
    X(iq3_s, 21, 256, 110, 32 + 16 + 8 * (256 + 16), 0, .codes = tl_codes_iq3_s, .n_codes = 512)                       \
    X(iq2_xxs, 16, 256, 66, 32 + 16 + 8 * (128 + 64 + 16), 0, .codes = tl_codes_iq2_xxs, .n_codes = 256)               \
    X(iq2_xs, 17, 256, 74, 32 + 16 + 8 * (128 + 64 + 16), 0, .codes = tl_codes_iq2_xs, .n_codes = 512)                 \
    X(iq2_s, 22, 256, 82, 32 + 16 + 8 * (128 + 64 + 16), 0, .codes = tl_codes_iq2_s, .n_codes = 1024)                  \
    X(iq1_s, 19, 256, 50, 32 + 16 + 8 * (128 + 64 + 16), 0, .codes = tl_codes_iq1, .n_codes = 2048)                    \
    X(iq1_m, 29, 256, 56, 32 + 16 + 8 * (128 + 64 + 16), 0, .codes = tl_codes_iq1, .n_codes = 2048)

// Those of pack_schemes.c and formats_schemes.inc, whose numbers are none of GGUF's. Nothing is quantized to them here.
#define TL_SCHEME_FORMATS(X)                                                                                           \
    X(i4_128, 200, 128, 4 + 1 + 64, 4 * 256 + 64 + 16, 0)                                                              \
    X(i4_32, 201, 32, 2 + 1 + 16, 256 + 32 + 16, 0)                                                                    \
    X(i8_64, 202, 64, 4 + 64, 2 * 512 + 64, 0)                                                                         \
    X(nvfp4_64, 203, 64, 4 + 4 + 32, 2 * 256 + 64 + 64, 0)                                                             \
    X(f8_e4m3, 204, 64, 4 + 64, 1024 + 64, 1)                                                                          \
    X(bnb4, 205, 64, 1 + 4 + 32, 512 + 64 + 16, 1)                                                                     \
    X(bnb8, 206, 64, 4 + 64, 1024 + 64, 1)

#define TL_FORMATS(X) TL_GGUF_FORMATS(X) TL_SCHEME_FORMATS(X)

// For each: its place in the table, numbers a block, bytes of a panel's block.
enum {
#define X(name, ...) TL_INDEX_##name,
    TL_FORMATS(X)
#undef X
        TL_N_FORMATS
};
#define TL_LARGEST_PANEL                                  3584
#define X(name, id, block, block_bytes, panel_bytes, ...) TL_BLOCK_##name = block, TL_PANEL_##name = panel_bytes,
enum { TL_FORMATS(X) };
#undef X
#define X(name, id, block, block_bytes, panel_bytes, ...)                                                              \
    _Static_assert((panel_bytes) <= TL_LARGEST_PANEL, "TL_LARGEST_PANEL is short of " #name);
TL_FORMATS(X)
#undef X

// Half and bfloat16 to float and back (rounded half to even); exact scalar code, the same on every machine.
float tl_f16_to_f32(unsigned short h);
unsigned short tl_f32_to_f16(float x);
float tl_bf16_to_f32(unsigned short h);
static inline unsigned short tl_f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40; // NaN, made quiet
    return (unsigned short)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// MXFP4's block scale 2^(e - 127), halved because its numbers are kept doubled; 0 and 1 are subnormal then, and 255 is
// NaN ("OCP Microscaling Formats (MX) Specification", 5.4.1).
static inline float tl_e8m0_half(uint8_t e) {
    uint32_t bits = e == 255 ? 0x7fc00000u : e < 2 ? 0x00200000u << e : (e - 1u) << 23;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// NVFP4's block scale, an 8-bit float of 4 exponent and 3 mantissa bits that has no sign, halved because its numbers are
// kept doubled. Panels hold it as pack.c left it: what the file calls 0 is 0, 0x7f is a number as well, 0xff is NaN.
static inline float tl_e4m3_half(uint8_t b) { return tl_f16_to_f32((unsigned short)(b << 7)) * 128; }

// The code books of pack_small.c (codebooks.h).
extern const uint16_t tl_codes_iq1[2048], tl_codes_iq2_xxs[256], tl_codes_iq2_xs[512], tl_codes_iq2_s[1024];
extern const uint16_t tl_codes_iq3_xxs[256], tl_codes_iq3_s[512];
// The numbers of bnb4's 16 codes, for each of its tables (pack_schemes.c).
extern const float tl_bnb4[2][16];

// cpu/quantize.c: k floats (a multiple of the format's block) -> blocks of the file, as tl_format.quantize; and n numbers
// of F32, F16 or BF16 -> floats.
#define X(name, ...) void tl_quantize_##name(uint8_t *blocks, const float *x, size_t k, const float *importance);
TL_GGUF_FORMATS(X)
#undef X
void tl_to_floats(float *out, int format, const uint8_t *in, size_t n);

#endif
