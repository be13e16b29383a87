// formats/pack.c: the formats. Half and bfloat16 conversions, the table of formats and, for each format, the way from
// the file's blocks into panels (pack) and from panels back to floats (unpack, the slow truth). Includes
// tinyllm.h and formats.h. Read formats.inc next: it takes the same panels apart in registers.
//
// A panel's block holds 16 rows. 32 k of it are a group: eight vectors of 64 bytes, vector v holding k
// 4v..4v+3 of all rows, byte 4 * row + k % 4. Numbers are kept as unsigned codes, cut into a low and a high
// slice of 8, 4, 2 or 1 bits. A slice w bits wide takes w vectors: the bits of vector v lie at bit v - v % w
// of the slice's vector v % w.
//   blocks of 32:  [low slice][high slice][16 bytes of scales] [16 f16 d][16 f16 min]
//   blocks of 256: [16 f16 d][16 f16 min] and 8 groups of [low slice][high slice][16 bytes of scales]...
// Minimums are kept with the sign that makes them something to add. Machines are little-endian, as the files
// are.
#include "formats/formats.h"
#include "tinyllm.h"
#include <string.h>

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

static uint16_t half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return h;
}

// ---- panels --------------------------------------------------------------------------------------------------------
// One row's part of a group.
typedef struct group {
    uint8_t code[32];
    uint8_t scale[2]; // bytes of scales and minimums, the format's
    uint16_t half[2]; // d and the minimum, or 0
} group;

// How a block is laid out: its groups, the widths of the slices, f16 numbers a row and bytes of scales a row
// a group.
typedef struct layout {
    int groups, low, high, halves, scales;
} layout;

#define GROUP_BYTES(low, high, scales) (64 * ((low) + (high)) + 16 * (scales))
#define SLICE_MASK(width)              (((1u << (width)) - 1) * 0x01010101u)

static inline void put_slice(uint8_t *to, int width, int row, const uint8_t code[32], int from) {
    for (int i = 0; i < width; i++) {
        uint32_t word = 0, quad;
        for (int v = i; v < 8; v += width) {
            memcpy(&quad, code + 4 * v, 4);
            word |= (quad >> from & SLICE_MASK(width)) << (v - i);
        }
        memcpy(to + 64 * i + 4 * row, &word, 4);
    }
}

static inline void get_slice(uint8_t code[32], const uint8_t *from, int width, int row, int to) {
    for (int v = 0; v < 8; v++) {
        uint32_t word, quad;
        memcpy(&word, from + 64 * (v % width) + 4 * row, 4);
        memcpy(&quad, code + 4 * v, 4);
        quad |= (word >> (v - v % width) & SLICE_MASK(width)) << to;
        memcpy(code + 4 * v, &quad, 4);
    }
}

static inline size_t halves_at(const layout *l) { return l->groups == 1 ? GROUP_BYTES(l->low, l->high, l->scales) : 0; }
static inline size_t group_at(const layout *l, int j) {
    return (l->groups == 1 ? 0 : 32 * l->halves) + (size_t)j * GROUP_BYTES(l->low, l->high, l->scales);
}

static inline void pack_block(uint8_t *panel, const uint8_t *const rows[16], const layout *l,
                              void (*read)(group *, const uint8_t *, int)) {
    static const uint8_t zeros[256];
    for (int row = 0; row < 16; row++)
        for (int j = 0; j < l->groups; j++) {
            group g = {0};
            uint8_t *to = panel + group_at(l, j);
            read(&g, rows[row] ? rows[row] : zeros, j);
            put_slice(to, l->low, row, g.code, 0);
            if (l->high) put_slice(to + 64 * l->low, l->high, row, g.code, l->low);
            for (int i = 0; i < l->scales; i++) to[64 * (l->low + l->high) + 16 * i + row] = g.scale[i];
            for (int i = 0; i < l->halves; i++) memcpy(panel + halves_at(l) + 32 * i + 2 * row, &g.half[i], 2);
        }
}

static inline void unpack_block(float *out, const uint8_t *panel, int row, const layout *l,
                                void (*values)(float *, const group *)) {
    for (int j = 0; j < l->groups; j++) {
        group g = {0};
        const uint8_t *from = panel + group_at(l, j);
        get_slice(g.code, from, l->low, row, 0);
        if (l->high) get_slice(g.code, from + 64 * l->low, l->high, row, l->low);
        for (int i = 0; i < l->scales; i++) g.scale[i] = from[64 * (l->low + l->high) + 16 * i + row];
        for (int i = 0; i < l->halves; i++) g.half[i] = half_at(panel + halves_at(l) + 32 * i + 2 * row);
        values(out + 32 * j, &g);
    }
}

// Defines pack_ and unpack_ of a format from its layout, read_ (group j of a block in the file) and values_
// (a group's 32).
#define QUANTIZED(name, groups, low, high, halves, scales)                                                             \
    _Static_assert(TL_PANEL_##name == (groups) * GROUP_BYTES(low, high, scales) + 32 * (halves), "panel of " #name);   \
    static const layout layout_##name = {groups, low, high, halves, scales};                                           \
    static void pack_##name(uint8_t *panel, const uint8_t *const rows[16]) {                                           \
        pack_block(panel, rows, &layout_##name, read_##name);                                                          \
    }                                                                                                                  \
    static void unpack_##name(float *out, const uint8_t *panel, int row) {                                             \
        unpack_block(out, panel, row, &layout_##name, values_##name);                                                  \
    }

// What codes stand for: scale * (code - zero), scale * code + min, scale * table[code].
static void scaled(float *out, const uint8_t *code, int n, float scale, int zero) {
    for (int i = 0; i < n; i++) out[i] = scale * (float)(code[i] - zero);
}

static void scaled_min(float *out, const uint8_t *code, int n, float scale, float min) {
    for (int i = 0; i < n; i++) out[i] = scale * (float)code[i] + min;
}

static void scaled_table(float *out, const uint8_t code[32], float scale, const int8_t table[16]) {
    for (int i = 0; i < 32; i++) out[i] = scale * (float)table[code[i]];
}

static float d_of(const group *g) { return tl_f16_to_f32(g->half[0]); }
static float min_of(const group *g) { return tl_f16_to_f32(g->half[1]); }

#define EACH_BYTE 0x0101010101010101u

// n bytes, each with a code's bits (mask) at bit `from`; they go to bit `to` of the code. n is a multiple
// of 8.
static inline void read_bits(uint8_t *code, const uint8_t *p, int n, int from, unsigned mask, int to) {
    for (int i = 0; i < n; i += 8) {
        uint64_t codes, bytes;
        memcpy(&codes, code + i, 8);
        memcpy(&bytes, p + i, 8);
        codes |= (bytes >> from & mask * EACH_BYTE) << to;
        memcpy(code + i, &codes, 8);
    }
}

// 16 bytes: the low nibbles are the first 16 codes, the high ones the others.
static inline void read_nibbles(uint8_t code[32], const uint8_t *p) {
    read_bits(code, p, 16, 0, 15, 0);
    read_bits(code + 16, p, 16, 4, 15, 0);
}

// 32 bits, one a code. The product puts bit i of seven at bit 8 i: seven copies, each 7 bits further, that do
// not meet.
static inline void read_fifth_bits(uint8_t code[32], const uint8_t *p) {
    for (int i = 0; i < 4; i++) {
        uint64_t bits = ((p[i] & 127) * 0x0002040810204081u & EACH_BYTE) | (uint64_t)(p[i] >> 7) << 56;
        uint8_t spread[8];
        memcpy(spread, &bits, 8);
        read_bits(code + 8 * i, spread, 8, 0, 1, 4);
    }
}

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
    read_fifth_bits(g->code, b + 2);
}
static void values_q5_0(float *out, const group *g) { scaled(out, g->code, 32, d_of(g), 16); }
QUANTIZED(q5_0, 1, 4, 1, 1, 0)

static void read_q5_1(group *g, const uint8_t *b, int j) { // d, min, fifth bits, nibbles
    (void)j;
    g->half[0] = half_at(b);
    g->half[1] = half_at(b + 2);
    read_nibbles(g->code, b + 8);
    read_fifth_bits(g->code, b + 4);
}
#define values_q5_1 values_q4_1
QUANTIZED(q5_1, 1, 4, 1, 2, 0)

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
#define read_iq4_nl read_q4_0
static void values_iq4_nl(float *out, const group *g) { scaled_table(out, g->code, d_of(g), iq4_values); }
QUANTIZED(iq4_nl, 1, 4, 0, 1, 0)

// Floats of 1 sign, 2 exponent and 1 mantissa bits, doubled; 8 is a zero as well.
static const int8_t e2m1_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static void read_mxfp4(group *g, const uint8_t *b, int j) { // exponent, nibbles
    (void)j;
    g->scale[0] = b[0];
    read_nibbles(g->code, b + 1);
}
static void values_mxfp4(float *out, const group *g) {
    scaled_table(out, g->code, tl_e8m0_half(g->scale[0]), e2m1_values);
}
QUANTIZED(mxfp4, 1, 4, 0, 0, 1)

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
static void pack_f32(uint8_t *panel, const uint8_t *const rows[16]) {
    memset(panel, 0, 64);
    for (int row = 0; row < 16; row++)
        if (rows[row]) memcpy(panel + 4 * row, rows[row], 4);
}
static void unpack_f32(float *out, const uint8_t *panel, int row) { memcpy(out, panel + 4 * row, 4); }

static void pack_f16(uint8_t *panel, const uint8_t *const rows[16]) {
    memset(panel, 0, 32);
    for (int row = 0; row < 16; row++)
        if (rows[row]) memcpy(panel + 2 * row, rows[row], 2);
}
static void unpack_f16(float *out, const uint8_t *panel, int row) { *out = tl_f16_to_f32(half_at(panel + 2 * row)); }

#define pack_bf16 pack_f16
static void unpack_bf16(float *out, const uint8_t *panel, int row) { *out = tl_bf16_to_f32(half_at(panel + 2 * row)); }

// ---- the table -----------------------------------------------------------------------------------------------------
const tl_format tl_formats[TL_N_FORMATS + 1] = {
#define X(name, id, block, block_bytes, panel_bytes, is_float)                                                         \
    {id, #name, block, block_bytes, panel_bytes, is_float, pack_##name, unpack_##name, tl_quantize_##name},
    TL_FORMATS(X)
#undef X
};

const tl_format *tl_format_of(int id) {
    for (const tl_format *f = tl_formats; f->name; f++)
        if (f->id == id) return f;
    return NULL;
}
