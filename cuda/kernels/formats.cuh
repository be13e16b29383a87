// kernels/formats.cuh: how weights lie on the device, and one row of facts a format. Includes primitives.cuh. Read pack.cuh
// (from a file's blocks to this) and product.cuh (from this to the tensor cores) next.
//
// A matrix is tiles of 16 rows, a tile is chunks of 128 or 256 k, a chunk is groups of 32 k. A group of 16 rows is an A
// fragment of mma.m16n8k32: lane 4g + t holds rows g and g + 8, four registers of four k (primitives.cuh). Its codes are
// cut into planes of 4, 2 and 1 bits (or 8), and a plane keeps a lane's numbers together, so that every load takes 16
// bytes a lane (8 of the 1-bit plane) and serves several groups. Signed codes keep their top bit turned over: moved to the
// top of a byte they are that byte's int8, times a power of two. Behind the planes stand the scales, row g's beside row
// g + 8's; behind these, for blocks of 256, the f16 d (and min).
#ifndef TINYLLM_CUDA_FORMATS_CUH
#define TINYLLM_CUDA_FORMATS_CUH

#include "primitives.cuh"

enum scale_kind {
    F16_SCALE,       // an f16 d a group
    BF16_SCALE,      // MXFP4's exponent, which only a bf16 holds
    F16_SCALE_MIN,   // an f16 d and an f16 min a group
    BYTE_SCALE,      // d times a signed byte a group
    BYTE_SCALE_MIN,  // d times a byte, min times a byte a group
    HALF_SCALES,     // d times a signed byte a half group of 16
    HALF_SCALES_MIN, // d times 4 bits, min times 4 bits a half group
    E4M3_HALVES,     // NVFP4's: an 8-bit float a half group
    F16_CHUNK        // an f16 d a chunk
};

// What a code stands for before it is scaled.
enum code_kind {
    SIGNED_CODE,
    UNSIGNED_CODE,
    IQ4_CODE,
    E2M1_CODE,
    MINUS_ONE_CODE, // code - 1
    SIGN_CODE,      // 2 code - 1
    IQ3_XXS_CODE,   // of these the place of a magnitude and above it the sign
    IQ3_S_CODE,
    IQ2_CODE,
    IQ1_CODE // the place of -1, 0, 1, in eighths, and above it whether one is added or taken off
};

struct format_facts {
    int id;                 // GGUF's
    int bits;               // of a code
    int block, block_bytes; // in the file
    int groups;             // of a chunk
    code_kind code;
    scale_kind scale;
};

// Every quantized format, but those of SAME_TILES. 6 bits: a 4-bit plane and a 2-bit plane; 5: 4 and 1; 3: 2 and 1; the low bits come first.
#define QUANTIZED_FORMATS(X)                                                                                           \
    X(q4_0, 2, 4, 32, 18, 4, SIGNED_CODE, F16_SCALE)                                                                   \
    X(q4_1, 3, 4, 32, 20, 4, UNSIGNED_CODE, F16_SCALE_MIN)                                                             \
    X(q5_0, 6, 5, 32, 22, 4, SIGNED_CODE, F16_SCALE)                                                                   \
    X(q5_1, 7, 5, 32, 24, 4, UNSIGNED_CODE, F16_SCALE_MIN)                                                             \
    X(q8_0, 8, 8, 32, 34, 4, SIGNED_CODE, F16_SCALE)                                                                   \
    X(q2_k, 10, 2, 256, 84, 8, UNSIGNED_CODE, HALF_SCALES_MIN)                                                         \
    X(q3_k, 11, 3, 256, 110, 8, SIGNED_CODE, HALF_SCALES)                                                              \
    X(q4_k, 12, 4, 256, 144, 8, UNSIGNED_CODE, BYTE_SCALE_MIN)                                                         \
    X(q5_k, 13, 5, 256, 176, 8, UNSIGNED_CODE, BYTE_SCALE_MIN)                                                         \
    X(q6_k, 14, 6, 256, 210, 8, SIGNED_CODE, HALF_SCALES)                                                              \
    X(iq4_nl, 20, 4, 32, 18, 4, IQ4_CODE, F16_SCALE)                                                                   \
    X(iq4_xs, 23, 4, 256, 136, 8, IQ4_CODE, BYTE_SCALE)                                                                \
    X(mxfp4, 39, 4, 32, 17, 4, E2M1_CODE, BF16_SCALE)                                                                  \
    X(nvfp4, 40, 4, 64, 36, 4, E2M1_CODE, E4M3_HALVES)                                                                 \
    X(tq2_0, 35, 2, 256, 66, 8, MINUS_ONE_CODE, F16_CHUNK)                                                             \
    X(q2_0, 42, 2, 64, 18, 4, MINUS_ONE_CODE, F16_SCALE)                                                               \
    X(q1_0, 41, 1, 128, 18, 4, SIGN_CODE, F16_CHUNK)                                                                   \
    X(iq3_xxs, 18, 4, 256, 98, 8, IQ3_XXS_CODE, BYTE_SCALE)                                                            \
    X(iq3_s, 21, 4, 256, 110, 8, IQ3_S_CODE, BYTE_SCALE)                                                               \
    X(iq2_s, 22, 3, 256, 82, 8, IQ2_CODE, HALF_SCALES)                                                                 \
    X(iq1_s, 19, 3, 256, 50, 8, IQ1_CODE, HALF_SCALES)

// X(name, id, bytes of a block of 256 in the file, the format that lies on the device in the same way)
#define SAME_TILES(X)                                                                                                  \
    X(tq1_0, 34, 54, tq2_0)                                                                                            \
    X(iq2_xxs, 16, 66, iq2_s)                                                                                          \
    X(iq2_xs, 17, 74, iq2_s)                                                                                           \
    X(iq1_m, 29, 56, iq1_s)

// Numbers that are not quantized: chunks of 16 rows x 64 (x 32 for F32). Lane 4g + t holds k 8t..8t+7 of each 32 of rows g
// and g + 8, 16 bytes a load.
#define FLOAT_FORMATS(X)                                                                                               \
    X(f32, 0, 4, 32)                                                                                                   \
    X(f16, 1, 2, 64)                                                                                                   \
    X(bf16, 30, 2, 64)

#define FLOAT_CHUNK_BYTES 2048

BOTH constexpr int plane8_bytes(format_facts f) { return f.bits == 8 ? f.groups * 512 : 0; }
BOTH constexpr int plane4_bytes(format_facts f) { return f.bits >= 4 && f.bits <= 6 ? f.groups * 256 : 0; }
BOTH constexpr int plane2_bytes(format_facts f) {
    return f.bits == 2 || f.bits == 3 || f.bits == 6 ? f.groups * 128 : 0;
}
BOTH constexpr int plane1_bytes(format_facts f) {
    return f.bits == 1 || f.bits == 3 || f.bits == 5 ? f.groups * 64 : 0;
}

// Bytes of four groups' scales of rows g and g + 8, and of a chunk's d and min of both.
BOTH constexpr int scale_bytes(scale_kind kind) {
    return kind == F16_SCALE_MIN ? 32 : kind == F16_CHUNK ? 0 : kind == BYTE_SCALE ? 8 : 16;
}
BOTH constexpr int base_bytes(scale_kind kind) {
    return kind == BYTE_SCALE_MIN || kind == HALF_SCALES_MIN                ? 8
           : kind == BYTE_SCALE || kind == HALF_SCALES || kind == F16_CHUNK ? 4
                                                                            : 0;
}

BOTH constexpr int plane2_at(format_facts f) { return plane8_bytes(f) + plane4_bytes(f); }
BOTH constexpr int plane1_at(format_facts f) { return plane2_at(f) + plane2_bytes(f); }
BOTH constexpr int scales_at(format_facts f) { return plane1_at(f) + plane1_bytes(f); }
BOTH constexpr int bases_at(format_facts f) { return scales_at(f) + f.groups / 4 * 8 * scale_bytes(f.scale); }
BOTH constexpr int chunk_bytes(format_facts f) { return bases_at(f) + 8 * base_bytes(f.scale); }

// Where a code's number starts in its byte: the top for signed codes.
BOTH constexpr int code_shift(format_facts f) { return f.code == SIGNED_CODE ? 8 - f.bits : 0; }

// What d is multiplied by: the numbers of these code books are whole ones in units of a fourth or an eighth.
BOTH constexpr float code_unit(code_kind code) {
    return code == IQ3_XXS_CODE || code == IQ3_S_CODE ? 0.25f : code == IQ2_CODE || code == IQ1_CODE ? 0.125f : 1.0f;
}

#define X(name, id, bits, block, bytes, groups, code, scale)                                                           \
    struct format_##name {                                                                                             \
        static constexpr format_facts facts = {id, bits, block, bytes, groups, code, scale};                           \
    };
QUANTIZED_FORMATS(X)
#undef X

#define X(name, id, bytes, same)                                                                                       \
    struct format_##name {                                                                                             \
        static constexpr format_facts facts = {id,                                                                     \
                                               format_##same::facts.bits,                                              \
                                               256,                                                                    \
                                               bytes,                                                                  \
                                               format_##same::facts.groups,                                            \
                                               format_##same::facts.code,                                              \
                                               format_##same::facts.scale};                                            \
    };
SAME_TILES(X)
#undef X

// The format, as which it lies on the device.
static inline int tiles_id(int id) {
    switch (id) {
#define X(name, number, bytes, same)                                                                                   \
    case number: return format_##same::facts.id;
        SAME_TILES(X)
#undef X
    default: return id;
    }
}

static constexpr format_facts quantized_facts[] = {
#define X(name, ...) {__VA_ARGS__},
    QUANTIZED_FORMATS(X)
#undef X
};

static constexpr int n_quantized_formats = (int)(sizeof quantized_facts / sizeof quantized_facts[0]);

// -1 for a float format.
static inline int quantized_index(int id) {
    for (int i = 0; i < n_quantized_formats; i++)
        if (quantized_facts[i].id == tiles_id(id)) return i;
    return -1;
}

// Bytes of a chunk, and its k, of any format.
static inline int chunk_bytes_of(int id) {
    const int i = quantized_index(id);
    return i < 0 ? FLOAT_CHUNK_BYTES : chunk_bytes(quantized_facts[i]);
}
static inline int chunk_k_of(int id) {
    const int i = quantized_index(id);
    return i < 0 ? (id == 0 ? 32 : 64) : 32 * quantized_facts[i].groups;
}

// ---- codes to int8 in registers ---------------------------------------------------------------------------------------

// The planes of four groups that one lane holds.
struct quad {
    alignas(16) uint32_t p8[16];
    alignas(16) uint32_t p4[8];
    alignas(16) uint32_t p2[4];
    alignas(8) uint32_t p1[2];
};

template <class F> DEVICE void load_quad(quad &q, const uint8_t *chunk, int lane, int i) {
    constexpr format_facts f = F::facts;
    if constexpr (f.bits == 8)
        for (int j = 0; j < 4; j++)
            *(words4 *)(q.p8 + 4 * j) = *(const words4 *)(chunk + (4 * i + j) * 512 + lane * 16);
    if constexpr (plane4_bytes(f) > 0)
        for (int j = 0; j < 2; j++)
            *(words4 *)(q.p4 + 4 * j) = *(const words4 *)(chunk + (2 * i + j) * 512 + lane * 16);
    if constexpr (plane2_bytes(f) > 0) *(words4 *)q.p2 = *(const words4 *)(chunk + plane2_at(f) + i * 512 + lane * 16);
    if constexpr (plane1_bytes(f) > 0) *(words2 *)q.p1 = *(const words2 *)(chunk + plane1_at(f) + i * 256 + lane * 8);
}

// In each byte: the bits `mask` from bit `from` on, moved to bit `to`.
template <int FROM, int TO, uint32_t MASK> DEVICE uint32_t move_bits(uint32_t w) {
    constexpr uint32_t each = (MASK << TO) * 0x01010101u;
    if constexpr (FROM >= TO)
        return w >> (FROM - TO) & each;
    else
        return w << (TO - FROM) & each;
}

// Four codes of four bits, one a byte, as the table's bytes.
DEVICE uint32_t look_up(uint32_t codes, const uint32_t table[4]) {
    const uint32_t pairs = codes | codes >> 4;
    const uint32_t selector = (pairs & 0xff) | (pairs >> 8 & 0xff00); // a code a nibble
    const uint32_t low = pick_bytes(table[0], table[1], selector), high = pick_bytes(table[2], table[3], selector);
    const uint32_t upper = (codes >> 3 & 0x01010101u) * 0xff;
    return (low & ~upper) | (high & upper);
}

// What looked-up codes stand for, four a word.
BOTH constexpr uint32_t four_bytes(int a, int b, int c, int d) {
    return (uint32_t)(uint8_t)a | (uint32_t)(uint8_t)b << 8 | (uint32_t)(uint8_t)c << 16 | (uint32_t)(uint8_t)d << 24;
}
BOTH constexpr uint32_t code_words(code_kind code, int i) {
    const uint32_t iq4[4] = {four_bytes(-127, -104, -83, -65), four_bytes(-49, -35, -22, -10),
                             four_bytes(1, 13, 25, 38), four_bytes(53, 69, 89, 113)};
    const uint32_t e2m1[4] = {four_bytes(0, 1, 2, 3), four_bytes(4, 6, 8, 12), four_bytes(0, -1, -2, -3),
                              four_bytes(-4, -6, -8, -12)};
    const int last = code == IQ3_S_CODE ? 60 : 62;
    const uint32_t iq3[4] = {four_bytes(4, 12, 20, 28), four_bytes(36, 44, 52, last), four_bytes(-4, -12, -20, -28),
                             four_bytes(-36, -44, -52, -last)};
    const uint32_t iq2[2] = {four_bytes(8, 25, 43, 0), four_bytes(-8, -25, -43, 0)};
    const uint32_t iq1[2] = {four_bytes(-7, 1, 9, 0), four_bytes(-9, -1, 7, 0)};
    return code == IQ4_CODE    ? iq4[i]
           : code == E2M1_CODE ? e2m1[i]
           : code == IQ2_CODE  ? iq2[i % 2]
           : code == IQ1_CODE  ? iq1[i % 2]
                               : iq3[i];
}

// The A fragment of group j (0..3) of a quad.
template <class F, int J> DEVICE void fragment(uint32_t a[4], const quad &q) {
    constexpr format_facts f = F::facts;
    constexpr int at = code_shift(f);
    if constexpr (f.bits == 8) {
        for (int i = 0; i < 4; i++) a[i] = q.p8[4 * J + i];
        return;
    }
    if constexpr (plane4_bytes(f) > 0) {
        a[0] = move_bits<0, at, 15>(q.p4[2 * J]);
        a[1] = move_bits<0, at, 15>(q.p4[2 * J + 1]);
        a[2] = move_bits<4, at, 15>(q.p4[2 * J]);
        a[3] = move_bits<4, at, 15>(q.p4[2 * J + 1]);
    }
    if constexpr (plane2_bytes(f) > 0) {
        constexpr int to = f.bits == 6 ? at + 4 : at;
        const uint32_t p = q.p2[J];
        const uint32_t b[4] = {move_bits<0, to, 3>(p), move_bits<2, to, 3>(p), move_bits<4, to, 3>(p),
                               move_bits<6, to, 3>(p)};
        for (int i = 0; i < 4; i++) a[i] = f.bits == 6 ? a[i] | b[i] : b[i];
    }
    if constexpr (f.bits == 1) a[0] = a[1] = a[2] = a[3] = 0;
    if constexpr (plane1_bytes(f) > 0) {
        constexpr int to = at + f.bits - 1, from = J % 2 * 4;
        const uint32_t p = q.p1[J / 2];
        a[0] |= move_bits<from, to, 1>(p);
        a[1] |= move_bits<from + 1, to, 1>(p);
        a[2] |= move_bits<from + 2, to, 1>(p);
        a[3] |= move_bits<from + 3, to, 1>(p);
    }
    if constexpr (f.code == MINUS_ONE_CODE) // in each byte: the highest bit takes the borrow
        for (int i = 0; i < 4; i++) a[i] = ((a[i] | 0x80808080u) - 0x01010101u) ^ 0x80808080u;
    else if constexpr (f.code == SIGN_CODE)
        for (int i = 0; i < 4; i++) a[i] = a[i] * 0xfe ^ 0xffffffffu;
    else if constexpr (f.code == IQ2_CODE || f.code == IQ1_CODE) {
        constexpr uint32_t words[2] = {code_words(f.code, 0), code_words(f.code, 1)};
        for (int i = 0; i < 4; i++) {
            const uint32_t pairs = a[i] | a[i] >> 4;
            a[i] = pick_bytes(words[0], words[1], (pairs & 0xff) | (pairs >> 8 & 0xff00));
        }
    } else if constexpr (f.code != SIGNED_CODE && f.code != UNSIGNED_CODE) {
        constexpr uint32_t words[4] = {code_words(f.code, 0), code_words(f.code, 1), code_words(f.code, 2),
                                       code_words(f.code, 3)};
        for (int i = 0; i < 4; i++) a[i] = look_up(a[i], words);
    }
}

// ---- scales -----------------------------------------------------------------------------------------------------------

DEVICE float bf16_to_float(uint32_t h) { return as_float(h << 16); }
DEVICE float signed_byte(uint32_t word, int i) { return (float)(int8_t)(word >> 8 * i); }
DEVICE float unsigned_byte(uint32_t word, int i) { return (float)(word >> 8 * i & 0xff); }
// NVFP4's scale, halved: its exponent and mantissa are an f16's upper ones, 2^8 too small; 0xff is NaN.
DEVICE float e4m3_half(uint32_t b) { return half_to_float((b & 0xff) << 7) * 128.0f; }

// What four groups' scales of rows g and g + 8 take.
struct quad_scales {
    alignas(16) uint32_t s[8];
};
template <class F> DEVICE void load_scales(quad_scales &q, const uint8_t *chunk, int g, int i) {
    constexpr int bytes = scale_bytes(F::facts.scale);
    const uint8_t *from = chunk + scales_at(F::facts) + (i * 8 + g) * bytes;
    if constexpr (bytes == 0)
        for (int j = 0; j < 8; j++) q.s[j] = 0;
    else if constexpr (bytes == 8)
        *(words2 *)q.s = *(const words2 *)from;
    else
        for (int j = 0; j < bytes / 16; j++) *(words4 *)(q.s + 4 * j) = *(const words4 *)(from + 16 * j);
}

// A chunk's d and min of rows g and g + 8.
struct bases {
    float d[2], min[2];
};
template <class F> DEVICE void load_bases(bases &b, const uint8_t *chunk, int g) {
    constexpr int bytes = base_bytes(F::facts.scale);
    const uint8_t *from = chunk + bases_at(F::facts) + g * bytes;
    if constexpr (bytes > 0) {
        const uint32_t d = *(const uint32_t *)from;
        b.d[0] = half_to_float(d & 0xffff) * code_unit(F::facts.code);
        b.d[1] = half_to_float(d >> 16) * code_unit(F::facts.code);
    }
    if constexpr (bytes == 8) {
        const uint32_t m = *(const uint32_t *)(from + 4);
        b.min[0] = half_to_float(m & 0xffff);
        b.min[1] = half_to_float(m >> 16);
    }
}

#endif
