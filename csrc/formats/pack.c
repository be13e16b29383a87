// formats/pack.c: the formats. Half and bfloat16 conversions, the table of formats and, for each format, the way from
// the file's blocks into panels (pack) and from panels back to floats (unpack, the slow truth). Includes panel.h, which
// has what they share. Read pack_small.c next (the formats of few bits), then formats.inc: it takes the same panels apart
// in registers.
#include "formats/panel.h"

// ---- f16 and bf16 --------------------------------------------------------------------------------------------------
static float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

float tl_f16_to_f32(unsigned short h) {
    uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest > 0x7c00) return as_float(sign | 0x7fc00000 | rest << 13); // NaN, made quiet
    if (rest == 0x7c00) return as_float(sign | 0x7f800000);
    if (rest < 0x0400) return as_float(sign | as_bits((float)rest * 0x1p-24f)); // subnormal
    return as_float(sign | ((rest << 13) + (112u << 23)));
}

unsigned short tl_f32_to_f16(float x) {
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff, h;
    if (rest > 0x7f800000)
        h = 0x7e00 | (rest >> 13 & 0x3ff);
    else if (rest >= as_bits(65520.0f))
        h = 0x7c00; // half way past the largest
    else if (rest < as_bits(0x1p-14f))
        h = as_bits(as_float(rest) + 0.5f) - as_bits(0.5f); // floats near 0.5 are 2^-24 apart
    else
        h = ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112 << 10);
    return (unsigned short)(sign | h);
}

float tl_bf16_to_f32(unsigned short h) { return as_float((uint32_t)h << 16); }

// ---- blocks of 32 --------------------------------------------------------------------------------------------------
static void read_q8_0(group *g, const uint8_t *b, int j) { // d, 32 signed bytes
    (void)j;
    g->half[0] = half_at(b);
    for (int i = 0; i < 32; i++) g->code[i] = b[2 + i] ^ 0x80;
}
static void values_q8_0(float *out, const group *g) { scaled(out, g->code, 32, d_of(g), 128); }
QUANTIZED(q8_0, 1, 8, 0, 1, 0)

static void read_q4_0(group *g, const uint8_t *b, int j) { // d, nibbles
    (void)j;
    g->half[0] = half_at(b);
    read_nibbles(g->code, b + 2);
}
static void values_q4_0(float *out, const group *g) { scaled(out, g->code, 32, d_of(g), 8); }
QUANTIZED(q4_0, 1, 4, 0, 1, 0)

static void read_q4_1(group *g, const uint8_t *b, int j) { // d, min, nibbles
    (void)j;
    g->half[0] = half_at(b);
    g->half[1] = half_at(b + 2);
    read_nibbles(g->code, b + 4);
}
static void values_q4_1(float *out, const group *g) { scaled_min(out, g->code, 32, d_of(g), min_of(g)); }
QUANTIZED(q4_1, 1, 4, 0, 2, 0)

static void read_q5_0(group *g, const uint8_t *b, int j) { // d, fifth bits, nibbles
    (void)j;
    g->half[0] = half_at(b);
    read_nibbles(g->code, b + 6);
    read_plane(g->code, b + 2, 4);
}
static void values_q5_0(float *out, const group *g) { scaled(out, g->code, 32, d_of(g), 16); }
QUANTIZED(q5_0, 1, 4, 1, 1, 0)

static void read_q5_1(group *g, const uint8_t *b, int j) { // d, min, fifth bits, nibbles
    (void)j;
    g->half[0] = half_at(b);
    g->half[1] = half_at(b + 2);
    read_nibbles(g->code, b + 8);
    read_plane(g->code, b + 4, 4);
}
#define values_q5_1 values_q4_1
QUANTIZED(q5_1, 1, 4, 1, 2, 0)

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
#define read_iq4_nl read_q4_0
static void values_iq4_nl(float *out, const group *g) { scaled_table(out, g->code, d_of(g), iq4_values); }
QUANTIZED(iq4_nl, 1, 4, 0, 1, 0)

static void read_mxfp4(group *g, const uint8_t *b, int j) { // exponent, nibbles
    (void)j;
    g->scale[0] = b[0];
    read_nibbles(g->code, b + 1);
}
static void values_mxfp4(float *out, const group *g) {
    scaled_table(out, g->code, tl_e8m0_half(g->scale[0]), e2m1_values);
}
QUANTIZED(mxfp4, 1, 4, 0, 0, 1)

// The same numbers; each 16 have a scale, which is 0 where the file has 0 or 0x7f, and whose sign counts for nothing. Only
// where all numbers are -0 as well 0x7f is NaN, as in the 8-bit float's own definition: what our own quantizer makes of
// numbers that the format does not hold, so that they show.
static void read_nvfp4(group *g, const uint8_t *b, int j) { // 4 scales, 4 times 8 bytes of nibbles
    for (int h = 0; h < 2; h++) {
        const uint8_t scale = b[2 * j + h], *p = b + 4 + 16 * j + 8 * h;
        g->scale[h] = scale != 0x7f ? scale & 0x7f : memcmp(p, "\x88\x88\x88\x88\x88\x88\x88\x88", 8) ? 0 : 0xff;
        read_bits(g->code + 16 * h, p, 8, 0, 15, 0);
        read_bits(g->code + 16 * h + 8, p, 8, 4, 15, 0);
    }
}
static void values_nvfp4(float *out, const group *g) {
    for (int i = 0; i < 32; i++) out[i] = tl_e4m3_half(g->scale[i / 16]) * (float)e2m1_values[g->code[i]];
}
QUANTIZED(nvfp4, 2, 4, 0, 0, 2)

// ---- blocks of 256 -------------------------------------------------------------------------------------------------
static void read_q2_k(group *g, const uint8_t *b,
                      int j) { // 16 bytes of scale | min << 4, 64 of codes, d, dmin
    g->half[0] = half_at(b + 80);
    g->half[1] = half_at(b + 82) ^ 0x8000;
    memcpy(g->scale, b + 2 * j, 2);
    read_bits(g->code, b + 16 + 32 * (j / 4), 32, j % 4 * 2, 3, 0);
}
static void values_q2_k(float *out, const group *g) {
    for (int i = 0; i < 2; i++)
        scaled_min(out + 16 * i, g->code + 16 * i, 16, d_of(g) * (float)(g->scale[i] & 15),
                   min_of(g) * (float)(g->scale[i] >> 4));
}
QUANTIZED(q2_k, 8, 2, 0, 2, 2)

static void read_q3_k(group *g, const uint8_t *b,
                      int j) { // third bits, 64 bytes of low bits, 16 6-bit scales, d
    g->half[0] = half_at(b + 108);
    read_bits(g->code, b + 32 + 32 * (j / 4), 32, j % 4 * 2, 3, 0);
    read_bits(g->code, b, 32, j, 1, 2);
    for (int i = 0; i < 2; i++) {
        int s = 2 * j + i, low = b[96 + s % 8] >> s / 8 * 4 & 15, high = b[104 + s % 4] >> s / 4 * 2 & 3;
        g->scale[i] = (uint8_t)((low | high << 4) - 32);
    }
}
static void values_q3_k(float *out, const group *g) {
    for (int i = 0; i < 2; i++) scaled(out + 16 * i, g->code + 16 * i, 16, d_of(g) * (float)(int8_t)g->scale[i], 4);
}
QUANTIZED(q3_k, 8, 2, 1, 1, 2)

// d, dmin and 12 bytes: 8 scales and 8 minimums of 6 bits; those of groups 4..7 have their high bits in the
// bytes of 0..3.
static void read_q45_k_scales(group *g, const uint8_t *b, int j) {
    const uint8_t *s = b + 4;
    g->half[0] = half_at(b);
    g->half[1] = half_at(b + 2) ^ 0x8000;
    g->scale[0] = j < 4 ? s[j] & 63 : (s[4 + j] & 15) | (s[j - 4] >> 6) << 4;
    g->scale[1] = j < 4 ? s[4 + j] & 63 : s[4 + j] >> 4 | (s[j] >> 6) << 4;
}
static void read_q4_k(group *g, const uint8_t *b, int j) { // scales, 128 bytes of nibbles
    read_q45_k_scales(g, b, j);
    read_bits(g->code, b + 16 + 32 * (j / 2), 32, j % 2 * 4, 15, 0);
}
static void values_q4_k(float *out, const group *g) {
    scaled_min(out, g->code, 32, d_of(g) * g->scale[0], min_of(g) * g->scale[1]);
}
QUANTIZED(q4_k, 8, 4, 0, 2, 2)

static void read_q5_k(group *g, const uint8_t *b, int j) { // scales, 32 bytes of fifth bits, 128 of nibbles
    read_q45_k_scales(g, b, j);
    read_bits(g->code, b + 48 + 32 * (j / 2), 32, j % 2 * 4, 15, 0);
    read_bits(g->code, b + 16, 32, j, 1, 4);
}
#define values_q5_k values_q4_k
QUANTIZED(q5_k, 8, 4, 1, 2, 2)

static void read_q6_k(group *g, const uint8_t *b,
                      int j) { // 128 bytes of nibbles, 64 of high pairs, 16 s8 scales, d
    g->half[0] = half_at(b + 208);
    memcpy(g->scale, b + 192 + 2 * j, 2);
    read_bits(g->code, b + 64 * (j / 4) + 32 * (j % 2), 32, j % 4 / 2 * 4, 15, 0);
    read_bits(g->code, b + 128 + 32 * (j / 4), 32, j % 4 * 2, 3, 4);
}
static void values_q6_k(float *out, const group *g) {
    for (int i = 0; i < 2; i++) scaled(out + 16 * i, g->code + 16 * i, 16, d_of(g) * (float)(int8_t)g->scale[i], 32);
}
QUANTIZED(q6_k, 8, 4, 2, 1, 2)

static void read_iq4_xs(group *g, const uint8_t *b,
                        int j) { // d, 8 scales: 2 high bits each, 4 low bits each; nibbles
    int low = b[4 + j / 2] >> j % 2 * 4 & 15, high = half_at(b + 2) >> 2 * j & 3;
    g->half[0] = half_at(b);
    g->scale[0] = (uint8_t)((low | high << 4) - 32);
    read_nibbles(g->code, b + 8 + 16 * j);
}
static void values_iq4_xs(float *out, const group *g) {
    scaled_table(out, g->code, d_of(g) * (float)(int8_t)g->scale[0], iq4_values);
}
QUANTIZED(iq4_xs, 8, 4, 0, 1, 1)

// ---- floats --------------------------------------------------------------------------------------------------------
void tl_pack_f32(uint8_t *panel, const uint8_t *const rows[16]) {
    memset(panel, 0, 64);
    for (int row = 0; row < 16; row++)
        if (rows[row]) memcpy(panel + 4 * row, rows[row], 4);
}
void tl_unpack_f32(float *out, const uint8_t *panel, int row) { memcpy(out, panel + 4 * row, 4); }

void tl_pack_f16(uint8_t *panel, const uint8_t *const rows[16]) {
    memset(panel, 0, 32);
    for (int row = 0; row < 16; row++)
        if (rows[row]) memcpy(panel + 2 * row, rows[row], 2);
}
void tl_unpack_f16(float *out, const uint8_t *panel, int row) { *out = tl_f16_to_f32(half_at(panel + 2 * row)); }

void tl_pack_bf16(uint8_t *panel, const uint8_t *const rows[16]) { tl_pack_f16(panel, rows); }
void tl_unpack_bf16(float *out, const uint8_t *panel, int row) { *out = tl_bf16_to_f32(half_at(panel + 2 * row)); }

// ---- the table -----------------------------------------------------------------------------------------------------
#define ROW(format, id_, block_, block_bytes_, panel_bytes_, is_float_)                                                \
    .id = id_, .name = #format, .block = block_, .block_bytes = block_bytes_, .panel_bytes = panel_bytes_,             \
    .is_float = is_float_, .pack = tl_pack_##format, .unpack = tl_unpack_##format
#define X(format, id, block, block_bytes, panel_bytes, is_float, ...)                                                  \
    {ROW(format, id, block, block_bytes, panel_bytes, is_float), .quantize = tl_quantize_##format, __VA_ARGS__},
#define Y(...) {ROW(__VA_ARGS__)},
const tl_format tl_formats[TL_N_FORMATS + 1] = {TL_GGUF_FORMATS(X) TL_SCHEME_FORMATS(Y)};
#undef ROW
#undef X
#undef Y

const tl_format *tl_format_of(int id) {
    for (const tl_format *f = tl_formats; f->name; f++)
        if (f->id == id) return f;
    return NULL;
}
