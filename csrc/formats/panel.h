// formats/panel.h: how panels are put together and taken apart, for every quantized format: the part of pack.c and
// pack_small.c that knows no format. Includes tinyllm.h and formats.h.
//
// A panel's block holds 16 rows. 32 k of it are a group: eight vectors of 64 bytes, vector v holding k
// 4v..4v+3 of all rows, byte 4 * row + k % 4. Numbers are kept as unsigned codes, cut into a low and a high
// slice of 8, 4, 2 or 1 bits. A slice w bits wide takes w vectors: the bits of vector v lie at bit v - v % w
// of the slice's vector v % w.
//   blocks of 32:  [low slice][high slice][16 bytes of scales] [16 f16 d][16 f16 min]
//   longer blocks: [16 f16 d][16 f16 min][the codes' table] and groups of [low slice][high slice][16 bytes of scales]...
// Minimums are kept with the sign that makes them something to add. Machines are little-endian, as the files
// are.
#ifndef TINYLLM_PANEL_H
#define TINYLLM_PANEL_H

#include "formats/formats.h"
#include "tinyllm.h"
#include <string.h>

#define X(name, ...)                                                                                                   \
    void tl_pack_##name(uint8_t *panel, const uint8_t *const rows[16]);                                                \
    void tl_unpack_##name(float *out, const uint8_t *panel, int row);
TL_FORMATS(X)
#undef X

static inline uint16_t half_at(const uint8_t *p) {
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
// a group. table: NULL, or the 16 bytes that codes are looked up in, which a panel's block has once.
typedef struct layout {
    int groups, low, high, halves, scales;
    const uint8_t *table;
} layout;

#define TL_TABLE                       16
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
    return (l->groups == 1 ? 0 : 32 * l->halves + (l->table ? TL_TABLE : 0)) +
           (size_t)j * GROUP_BYTES(l->low, l->high, l->scales);
}

static inline void pack_block(uint8_t *panel, const uint8_t *const rows[16], const layout *l,
                              void (*read)(group *, const uint8_t *, int)) {
    static const uint8_t zeros[256];
    if (l->table) memcpy(panel + 32 * l->halves, l->table, TL_TABLE);
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
#define QUANTIZED(name, groups, low, high, halves, scales) TABLED(name, groups, low, high, halves, scales, NULL, 0)
#define TABLED(name, groups, low, high, halves, scales, table, table_bytes)                                            \
    _Static_assert(TL_PANEL_##name == (groups) * GROUP_BYTES(low, high, scales) + 32 * (halves) + (table_bytes),       \
                   "panel of " #name);                                                                                 \
    static const layout layout_##name = {groups, low, high, halves, scales, table};                                    \
    void tl_pack_##name(uint8_t *panel, const uint8_t *const rows[16]) {                                               \
        pack_block(panel, rows, &layout_##name, read_##name);                                                          \
    }                                                                                                                  \
    void tl_unpack_##name(float *out, const uint8_t *panel, int row) {                                                 \
        unpack_block(out, panel, row, &layout_##name, values_##name);                                                  \
    }

// What codes stand for: scale * (code - zero), scale * code + min, scale * table[code].
static inline void scaled(float *out, const uint8_t *code, int n, float scale, int zero) {
    for (int i = 0; i < n; i++) out[i] = scale * (float)(code[i] - zero);
}

static inline void scaled_min(float *out, const uint8_t *code, int n, float scale, float min) {
    for (int i = 0; i < n; i++) out[i] = scale * (float)code[i] + min;
}

static inline void scaled_table(float *out, const uint8_t code[32], float scale, const int8_t table[16]) {
    for (int i = 0; i < 32; i++) out[i] = scale * (float)table[code[i]];
}

static inline float d_of(const group *g) { return tl_f16_to_f32(g->half[0]); }
static inline float min_of(const group *g) { return tl_f16_to_f32(g->half[1]); }

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

// 32 bits, one a code, which go to bit `to`. The product puts bit i of seven at bit 8 i: seven copies, each 7 bits further, that do
// not meet.
static inline void read_plane(uint8_t code[32], const uint8_t *p, int to) {
    for (int i = 0; i < 4; i++) {
        uint64_t bits = ((p[i] & 127) * 0x0002040810204081u & EACH_BYTE) | (uint64_t)(p[i] >> 7) << 56;
        uint8_t spread[8];
        memcpy(spread, &bits, 8);
        read_bits(code + 8 * i, spread, 8, 0, 1, to);
    }
}

// Floats of 1 sign, 2 exponent and 1 mantissa bits, doubled; 8 is a zero as well.
static const int8_t e2m1_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

#endif
