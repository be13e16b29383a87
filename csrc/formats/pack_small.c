// formats/pack_small.c: pack.c's other half, the formats of three bits and less: ternary ones, one bit, and those whose
// blocks point into code books. Includes panel.h and codebooks.h. formats_small.inc takes their panels apart.
//
// Code books are not looked up where weights meet activations: a panel has each number's own code, its magnitude's place
// and its sign, 3 bits (IQ1, IQ2) or 4 (IQ3), and the table of what codes stand for. That takes more memory than the file
// (docs/quantization.md says how much) and spares the product sixteen loads from a table for each four numbers.
#include "formats/codebooks.h"
#include "formats/panel.h"

const uint16_t tl_codes_iq1[2048] = {TL_CODES_IQ1};
const uint16_t tl_codes_iq2_xxs[256] = {TL_CODES_IQ2_XXS};
const uint16_t tl_codes_iq2_xs[512] = {TL_CODES_IQ2_XS};
const uint16_t tl_codes_iq2_s[1024] = {TL_CODES_IQ2_S};
const uint16_t tl_codes_iq3_xxs[256] = {TL_CODES_IQ3_XXS};
const uint16_t tl_codes_iq3_s[512] = {TL_CODES_IQ3_S};

static uint32_t word_at(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

// ---- ternary, two bits, one bit ------------------------------------------------------------------------------------
// Digits of base 3: a byte is a fraction of 256, whose first digit is the whole part of 3 times it.
static void read_digits(uint8_t *code, const uint8_t *p, int n, int digit) {
    static const uint8_t powers[5] = {1, 3, 9, 27, 81};
    for (int i = 0; i < n; i++) code[i] = (uint8_t)((uint8_t)(p[i] * powers[digit]) * 3 >> 8);
}
static void read_tq1_0(group *g, const uint8_t *b, int j) { // 32 bytes of 5 numbers, 16 of 5, 4 of 4, d
    g->half[0] = half_at(b + 52);
    if (j < 5) {
        read_digits(g->code, b, 32, j);
        return;
    }
    read_digits(g->code, b + 32, 16, 2 * (j - 5));
    if (j < 7) read_digits(g->code + 16, b + 32, 16, 2 * (j - 5) + 1);
    for (int i = 0; j == 7 && i < 4; i++) read_digits(g->code + 16 + 4 * i, b + 48, 4, i);
}
static void read_tq2_0(group *g, const uint8_t *b, int j) { // 64 bytes of codes, d
    g->half[0] = half_at(b + 64);
    read_bits(g->code, b + 32 * (j / 4), 32, j % 4 * 2, 3, 0);
}
static void values_tq2_0(float *out, const group *g) { scaled(out, g->code, 32, d_of(g), 1); }
#define values_tq1_0 values_tq2_0
QUANTIZED(tq1_0, 8, 2, 0, 1, 0)
QUANTIZED(tq2_0, 8, 2, 0, 1, 0)

static void read_q2_0(group *g, const uint8_t *b, int j) { // d, four codes a byte
    g->half[0] = half_at(b);
    for (int i = 0; i < 32; i++) g->code[i] = b[2 + 8 * j + i / 4] >> i % 4 * 2 & 3;
}
#define values_q2_0 values_tq2_0
QUANTIZED(q2_0, 2, 2, 0, 1, 0)

static void read_q1_0(group *g, const uint8_t *b, int j) { // d, a bit a code
    g->half[0] = half_at(b);
    read_plane(g->code, b + 2 + 4 * j, 0);
}
static void values_q1_0(float *out, const group *g) {
    for (int i = 0; i < 32; i++) out[i] = d_of(g) * (float)(2 * g->code[i] - 1);
}
QUANTIZED(q1_0, 4, 1, 0, 1, 0)

// ---- code books ----------------------------------------------------------------------------------------------------
// A byte of signs, a bit a number; of 7 bits the eighth makes their sum even.
static uint8_t even_signs(uint32_t seven) {
    return (uint8_t)((seven & 127) | (uint32_t)__builtin_parity(seven & 127) << 7);
}

// Eight numbers of a word of 2-bit digits, four of 3-bit digits. Signs of theirs go to the bit behind the digit.
static void read_eight(uint8_t code[8], uint16_t word, uint8_t signs) {
    for (int i = 0; i < 8; i++) code[i] = (uint8_t)((word >> 2 * i & 3) | (signs >> i & 1) << 2);
}
static void read_four(uint8_t code[4], uint16_t word, int signs) {
    for (int i = 0; i < 4; i++) code[i] = (uint8_t)((word >> 3 * i & 7) | (signs >> i & 1) << 3);
}

// What codes stand for: in the panel TL_MOST more, to have no sign. IQ3: in units of d (2 scale + 1) / 4.
#define IQ3_TABLE(last, a)                                                                                             \
    {4 + a, 12 + a, 20 + a, 28 + a, 36 + a, 44 + a, 52 + a, (last) + a,                                                \
     a - 4, a - 12, a - 20, a - 28, a - 36, a - 44, a - 52, a - (last)}
static const int8_t iq3_xxs_values[16] = IQ3_TABLE(62, 0), iq3_s_values[16] = IQ3_TABLE(60, 0);
static const uint8_t iq3_xxs_table[16] = IQ3_TABLE(62, 62), iq3_s_table[16] = IQ3_TABLE(60, 62);
static void scaled_iq3(float *out, const group *g, const int8_t values[16]) {
    scaled_table(out, g->code, d_of(g) * (float)g->scale[0] * 0.25f, values);
}

static void read_iq3_xxs(group *g, const uint8_t *b, int j) { // d, 64 places, 8 words of signs and a scale
    const uint32_t word = word_at(b + 66 + 4 * j);
    g->half[0] = half_at(b);
    g->scale[0] = (uint8_t)(2 * (word >> 28) + 1);
    for (int i = 0; i < 8; i++)
        read_four(g->code + 4 * i, tl_codes_iq3_xxs[b[2 + 8 * j + i]], even_signs(word >> i / 2 * 7) >> i % 2 * 4);
}
static void values_iq3_xxs(float *out, const group *g) { scaled_iq3(out, g, iq3_xxs_values); }
TABLED(iq3_xxs, 8, 4, 0, 1, 1, iq3_xxs_table, TL_TABLE)

static void read_iq3_s(group *g, const uint8_t *b,
                       int j) { // d, 64 places, their ninth bits, 32 bytes of signs, 4 of scales
    const uint8_t *place = b + 2 + 8 * j, ninth = b[66 + j], *signs = b + 74 + 4 * j;
    g->half[0] = half_at(b);
    g->scale[0] = (uint8_t)(2 * (b[106 + j / 2] >> j % 2 * 4 & 15) + 1);
    for (int i = 0; i < 8; i++)
        read_four(g->code + 4 * i, tl_codes_iq3_s[place[i] | (ninth >> i & 1) << 8], signs[i / 2] >> i % 2 * 4);
}
static void values_iq3_s(float *out, const group *g) { scaled_iq3(out, g, iq3_s_values); }
TABLED(iq3_s, 8, 4, 0, 1, 1, iq3_s_table, TL_TABLE)

// IQ2 and IQ1: in units of d (2 scale + 1) / 8, each 16 a scale of 4 bits. IQ1's "sign" says which eighth is added to
// its -1, 0 or 1.
static const int8_t iq2_values[8] = {8, 25, 43, 0, -8, -25, -43, 0}, iq1_values[8] = {-7, 1, 9, 0, -9, -1, 7, 0};
static const uint8_t iq2_table[16] = {51, 68, 86, 43, 35, 18, 0, 43}, iq1_table[16] = {36, 44, 52, 43, 34, 42, 50, 43};
static void scaled_iq2(float *out, const group *g, const int8_t values[8]) {
    for (int i = 0; i < 32; i++) {
        const int scale = 2 * (g->scale[0] >> i / 16 * 4 & 15) + 1;
        out[i] = d_of(g) * (float)scale * 0.125f * (float)values[g->code[i]];
    }
}

static void read_iq2_xxs(group *g, const uint8_t *b, int j) { // d, then of each 32 four places, signs and a scale
    const uint32_t word = word_at(b + 2 + 8 * j + 4);
    g->half[0] = half_at(b);
    g->scale[0] = (uint8_t)((word >> 28) * 17);
    for (int i = 0; i < 4; i++)
        read_eight(g->code + 8 * i, tl_codes_iq2_xxs[b[2 + 8 * j + i]], even_signs(word >> 7 * i));
}
static void values_iq2_xxs(float *out, const group *g) { scaled_iq2(out, g, iq2_values); }
#define values_iq2_xs values_iq2_xxs
#define values_iq2_s  values_iq2_xxs
TABLED(iq2_xxs, 8, 2, 1, 1, 1, iq2_table, TL_TABLE)

static void read_iq2_xs(group *g, const uint8_t *b,
                        int j) { // d, 32 times 9 bits of place, 7 of signs; 8 bytes of scales
    g->half[0] = half_at(b);
    g->scale[0] = b[66 + j];
    for (int i = 0; i < 4; i++) {
        const uint16_t word = half_at(b + 2 + 8 * j + 2 * i);
        read_eight(g->code + 8 * i, tl_codes_iq2_xs[word & 511], even_signs(word >> 9));
    }
}
TABLED(iq2_xs, 8, 2, 1, 1, 1, iq2_table, TL_TABLE)

static void read_iq2_s(group *g, const uint8_t *b, int j) { // d, 32 places, 32 signs, 8 bytes of high bits, 8 of scales
    g->half[0] = half_at(b);
    g->scale[0] = b[74 + j];
    for (int i = 0; i < 4; i++)
        read_eight(g->code + 8 * i, tl_codes_iq2_s[b[2 + 4 * j + i] | (b[66 + j] >> 2 * i & 3) << 8],
                   b[34 + 4 * j + i]);
}
TABLED(iq2_s, 8, 2, 1, 1, 1, iq2_table, TL_TABLE)

static void read_iq1_s(group *g, const uint8_t *b, int j) { // d, 32 places, of each 32 their high bits, a scale, a sign
    const uint16_t high = half_at(b + 34 + 2 * j);
    g->half[0] = half_at(b);
    g->scale[0] = (uint8_t)((high >> 12 & 7) * 17);
    for (int i = 0; i < 4; i++)
        read_eight(g->code + 8 * i, tl_codes_iq1[b[2 + 4 * j + i] | (high >> 3 * i & 7) << 8], high >> 15 ? 255 : 0);
}
static void values_iq1_s(float *out, const group *g) { scaled_iq2(out, g, iq1_values); }
#define values_iq1_m values_iq1_s
TABLED(iq1_s, 8, 2, 1, 1, 1, iq1_table, TL_TABLE)

// 32 places, of each a nibble of high bits and a sign; four words of four scales and a quarter of d.
static void read_iq1_m(group *g, const uint8_t *b, int j) {
    const uint16_t scales = half_at(b + 48 + j / 2 * 2) >> j % 2 * 6;
    for (int i = 0; i < 4; i++) g->half[0] |= (uint16_t)(half_at(b + 48 + 2 * i) >> 12 << 4 * i);
    g->scale[0] = (uint8_t)((scales & 7) | (scales >> 3 & 7) << 4);
    for (int i = 0; i < 4; i++) {
        const int nibble = b[32 + 2 * j + i / 2] >> i % 2 * 4 & 15;
        read_eight(g->code + 8 * i, tl_codes_iq1[b[4 * j + i] | (nibble & 7) << 8], nibble >> 3 ? 255 : 0);
    }
}
TABLED(iq1_m, 8, 2, 1, 1, 1, iq1_table, TL_TABLE)
