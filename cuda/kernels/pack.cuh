// kernels/pack.cuh: from a file's blocks to tiles (pack_matrix), and from tiles back to floats (value_at: the slow truth,
// and the embedding's rows). Includes formats.cuh, whose comment says where everything lies.
#ifndef TINYLLM_CUDA_PACK_CUH
#define TINYLLM_CUDA_PACK_CUH

#include "formats.cuh"

// ---- a file's block -----------------------------------------------------------------------------------------------------

DEVICE uint32_t half_at(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

DEVICE uint32_t word_at(const uint8_t *p) { return half_at(p) | half_at(p + 2) << 16; }

// Digit `digit` of base 3 of a byte that is a fraction of 256.
DEVICE uint32_t ternary_digit(uint32_t byte, int digit) {
    for (; digit > 0; digit--) byte = byte * 3 & 0xff;
    return byte * 3 >> 8;
}

// Sign i of eight, of which seven are there and the last makes their sum even.
DEVICE uint32_t even_sign(uint32_t seven, int i) {
    seven &= 127;
    uint32_t sum = seven ^ seven >> 4;
    sum ^= sum >> 2;
    return (seven | ((sum ^ sum >> 1) & 1) << 7) >> i & 1;
}

// Number i of a code of eight digits of 2 bits, of four of 3 bits, and its sign above it.
DEVICE uint32_t of_eight(uint32_t code, int i, uint32_t sign) { return (code >> 2 * i & 3) | sign << 2; }
DEVICE uint32_t of_four(uint32_t code, int i, uint32_t sign) { return (code >> 3 * i & 7) | sign << 3; }

// file_code of formats whose blocks point into code books.
DEVICE uint32_t looked_up_code(int format, const uint16_t *codes, const uint8_t *b, int i) {
    const int j = i / 32, eight = i / 8, e = i % 8, o = eight % 4; // o: which eight of the group
    switch (format) {
    case 16: return of_eight(codes[b[2 + 8 * j + o]], e, even_sign(word_at(b + 6 + 8 * j) >> 7 * o, e));
    case 17: {
        const uint32_t word = half_at(b + 2 + 2 * eight);
        return of_eight(codes[word & 511], e, even_sign(word >> 9, e));
    }
    case 22: {
        const uint32_t place = b[2 + eight] | ((uint32_t)(b[66 + j] >> 2 * o) & 3) << 8;
        return of_eight(codes[place], e, (uint32_t)(b[34 + eight] >> e) & 1);
    }
    case 18: return of_four(codes[b[2 + i / 4]], i % 4, even_sign(word_at(b + 66 + 4 * j) >> 7 * o, e));
    case 21: {
        const uint32_t place = b[2 + i / 4] | ((uint32_t)(b[66 + j] >> i / 4 % 8) & 1) << 8;
        return of_four(codes[place], i % 4, (uint32_t)(b[74 + eight] >> e) & 1);
    }
    case 19: {
        const uint32_t high = half_at(b + 34 + 2 * j);
        return of_eight(codes[b[2 + eight] | (high >> 3 * o & 7) << 8], e, high >> 15);
    }
    default: { // 29, iq1_m
        const uint32_t high = (uint32_t)b[32 + eight / 2] >> eight % 2 * 4 & 15;
        return of_eight(codes[b[eight] | (high & 7) << 8], e, high >> 3);
    }
    }
}

// Element i's code, without a sign: what formats/pack.c on the CPU calls the code, too.
DEVICE uint32_t file_code(int format, const uint16_t *codes, const uint8_t *b, int i) {
    if (codes) return looked_up_code(format, codes, b, i);
    const int j = i / 32, e = i % 32; // group of a block of 256, element of the group
    switch (format) {
    case 40: return (uint32_t)(b[4 + i / 16 * 8 + i % 8] >> i % 16 / 8 * 4) & 15;
    case 34: // 32 bytes of five numbers, 16 of five, 4 of four
        if (i < 160) return ternary_digit(b[i % 32], i / 32);
        return i < 240 ? ternary_digit(b[32 + i % 16], (i - 160) / 16) : ternary_digit(b[48 + i % 4], (i - 240) / 4);
    case 35: return (uint32_t)(b[32 * (j / 4) + e] >> j % 4 * 2) & 3;
    case 42: return (uint32_t)(b[2 + i / 4] >> i % 4 * 2) & 3;
    case 41: return (uint32_t)(b[2 + i / 8] >> i % 8) & 1;
    case 8: return b[2 + e] ^ 0x80u;
    case 2:
    case 20: return (uint32_t)(b[2 + e % 16] >> e / 16 * 4) & 15;
    case 3: return (uint32_t)(b[4 + e % 16] >> e / 16 * 4) & 15;
    case 6: return ((uint32_t)(b[6 + e % 16] >> e / 16 * 4) & 15) | ((uint32_t)(b[2 + e / 8] >> e % 8) & 1) << 4;
    case 7: return ((uint32_t)(b[8 + e % 16] >> e / 16 * 4) & 15) | ((uint32_t)(b[4 + e / 8] >> e % 8) & 1) << 4;
    case 39: return (uint32_t)(b[1 + e % 16] >> e / 16 * 4) & 15;
    case 10: return (uint32_t)(b[16 + 32 * (j / 4) + e] >> j % 4 * 2) & 3;
    case 11: return ((uint32_t)(b[32 + 32 * (j / 4) + e] >> j % 4 * 2) & 3) | ((uint32_t)(b[e] >> j) & 1) << 2;
    case 12: return (uint32_t)(b[16 + 32 * (j / 2) + e] >> j % 2 * 4) & 15;
    case 13: return ((uint32_t)(b[48 + 32 * (j / 2) + e] >> j % 2 * 4) & 15) | ((uint32_t)(b[16 + e] >> j) & 1) << 4;
    case 14:
        return ((uint32_t)(b[64 * (j / 4) + 32 * (j % 2) + e] >> j % 4 / 2 * 4) & 15) |
               ((uint32_t)(b[128 + 32 * (j / 4) + e] >> j % 4 * 2) & 3) << 4;
    default: return (uint32_t)(b[8 + 16 * j + e % 16] >> e / 16 * 4) & 15; // 23, iq4_xs
    }
}

// The block's 16-bit d (which 0) and min (1, with the sign that makes it something to add).
DEVICE uint32_t file_half(int format, const uint8_t *b, int which) {
    switch (format) {
    case 3:
    case 7: return half_at(b + 2 * which);
    case 10: return which ? half_at(b + 82) ^ 0x8000u : half_at(b + 80);
    case 11: return half_at(b + 108);
    case 12:
    case 13: return which ? half_at(b + 2) ^ 0x8000u : half_at(b);
    case 14: return half_at(b + 208);
    case 34: return half_at(b + 52);
    case 35: return half_at(b + 64);
    case 29: // a nibble in each of four words
        return half_at(b + 48) >> 12 | half_at(b + 50) >> 12 << 4 | half_at(b + 52) >> 12 << 8 |
               half_at(b + 54) >> 12 << 12;
    case 39: // 2^(e - 128) as a bf16, 255 is NaN
        return b[0] == 255 ? 0x7fc0u : b[0] < 2 ? 0x20u << b[0] : (uint32_t)(b[0] - 1) << 7;
    default: return half_at(b);
    }
}

// The bytes of scales of group j: scale and min, or those of the two halves.
DEVICE uint32_t file_scale(int format, const uint8_t *b, int j, int which) {
    switch (format) {
    case 10: return b[2 * j + which];
    case 11: {
        const int s = 2 * j + which;
        const uint32_t low = (uint32_t)(b[96 + s % 8] >> s / 8 * 4) & 15,
                       high = (uint32_t)(b[104 + s % 4] >> s / 4 * 2) & 3;
        return ((low | high << 4) - 32) & 0xff;
    }
    case 12:
    case 13: {
        const uint8_t *s = b + 4;
        if (j < 4) return s[j + 4 * which] & 63u;
        return which ? (uint32_t)(s[4 + j] >> 4) | (uint32_t)(s[j] >> 6) << 4
                     : (s[4 + j] & 15u) | (uint32_t)(s[j - 4] >> 6) << 4;
    }
    case 14: return b[192 + 2 * j + which];
    case 23: {
        const uint32_t low = (uint32_t)(b[4 + j / 2] >> j % 2 * 4) & 15, high = half_at(b + 2) >> 2 * j & 3;
        return which ? 0 : ((low | high << 4) - 32) & 0xff;
    }
    case 40: { // as formats/pack.c
        const uint8_t scale = b[2 * j + which], *p = b + 4 + 16 * j + 8 * which;
        const bool no_numbers = word_at(p) == 0x88888888u && word_at(p + 4) == 0x88888888u;
        return scale != 0x7f ? scale & 0x7fu : no_numbers ? 0xff : 0;
    }
    case 18: return 2 * (word_at(b + 66 + 4 * j) >> 28) + 1;
    case 21: return 2 * ((uint32_t)(b[106 + j / 2] >> j % 2 * 4) & 15) + 1;
    case 16: return 2 * (word_at(b + 6 + 8 * j) >> 28) + 1;
    case 17: return 2 * ((uint32_t)(b[66 + j] >> 4 * which) & 15) + 1;
    case 22: return 2 * ((uint32_t)(b[74 + j] >> 4 * which) & 15) + 1;
    case 19: return 2 * (half_at(b + 34 + 2 * j) >> 12 & 7) + 1;
    case 29: return 2 * (half_at(b + 48 + j / 2 * 2) >> (j % 2 * 6 + 3 * which) & 7) + 1;
    default: return 0;
    }
}

// ---- packing ------------------------------------------------------------------------------------------------------------

struct pack_arguments {
    const uint8_t *rows; // [n_rows] of the file, row_bytes apart
    uint8_t *tiles;      // of the matrix, from the first row's tile on
    size_t row_bytes;
    int n_rows, k, n_chunks; // of a tile
    int format;
    const uint16_t *codes; // the format's code book, or NULL
};

// One lane's part of a chunk.
template <class F> DEVICE void pack_lane(const pack_arguments &p, uint8_t *to, int first_row, int chunk, int lane) {
    constexpr format_facts f = F::facts;
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < f.groups; j++) {
        const int first_k = (chunk * f.groups + j) * 32;
        uint32_t w8[4] = {0}, w4[2] = {0}, w2 = 0, w1 = 0;
        for (int i = 0; i < 4; i++) {
            const int row = first_row + g + i % 2 * 8, k = first_k + i / 2 * 16 + 4 * t;
            for (int b = 0; b < 4 && row < p.n_rows && k < p.k; b++) {
                const uint8_t *block = p.rows + (size_t)row * p.row_bytes + (size_t)(k / f.block) * f.block_bytes;
                uint32_t code = file_code(f.id, p.codes, block, k % f.block + b);
                if (f.code == SIGNED_CODE) code ^= 1u << (f.bits - 1);
                if (f.bits == 8) w8[i] |= code << 8 * b;
                if (plane4_bytes(f)) w4[i % 2] |= (code & 15) << (8 * b + i / 2 * 4);
                if (plane2_bytes(f)) w2 |= (f.bits == 6 ? code >> 4 : code & 3) << (8 * b + 2 * i);
                if (plane1_bytes(f)) w1 |= code >> (f.bits - 1) << (8 * b + j % 2 * 4 + i);
            }
        }
        if (f.bits == 8)
            for (int i = 0; i < 4; i++) *(uint32_t *)(to + j * 512 + lane * 16 + 4 * i) = w8[i];
        if (plane4_bytes(f))
            for (int i = 0; i < 2; i++) *(uint32_t *)(to + j / 2 * 512 + lane * 16 + j % 2 * 8 + 4 * i) = w4[i];
        if (plane2_bytes(f)) *(uint32_t *)(to + plane2_at(f) + j / 4 * 512 + lane * 16 + j % 4 * 4) = w2;
        if (plane1_bytes(f)) {
            uint32_t *both =
                (uint32_t *)(to + plane1_at(f) + j / 4 * 256 + lane * 8 + j % 4 / 2 * 4); // groups j, j + 1
            *both = j % 2 ? *both | w1 : w1;
        }
    }
}

DEVICE void put_half(uint8_t *to, uint32_t h) {
    to[0] = (uint8_t)h;
    to[1] = (uint8_t)(h >> 8);
}

// A row's scales of a chunk; row g stands first, row g + 8 second.
template <class F> DEVICE void pack_scales(const pack_arguments &p, uint8_t *to, int first_row, int chunk, int row16) {
    constexpr format_facts f = F::facts;
    const int g = row16 % 8, second = row16 / 8, row = first_row + row16;
    for (int j = 0; j < f.groups; j++) {
        const int k = (chunk * f.groups + j) * 32;
        const bool there = row < p.n_rows && k < p.k;
        const uint8_t *block =
            p.rows + (size_t)(there ? row : 0) * p.row_bytes + (size_t)((there ? k : 0) / f.block) * f.block_bytes;
        uint8_t *record = to + scales_at(f) + (j / 4 * 8 + g) * scale_bytes(f.scale);
        const int of_block = k % f.block / 32;
        if (f.scale <= F16_SCALE_MIN) {
            put_half(record + j % 4 * 4 + second * 2, there ? file_half(f.id, block, 0) : 0);
            if (f.scale == F16_SCALE_MIN)
                put_half(record + 16 + j % 4 * 4 + second * 2, there ? file_half(f.id, block, 1) : 0);
        } else if (f.scale != F16_CHUNK) {
            const int each = f.scale == BYTE_SCALE ? 2 : 4;
            record[j % 4 * each + second] = (uint8_t)(there ? file_scale(f.id, block, of_block, 0) : 0);
            if (each == 4) record[j % 4 * 4 + 2 + second] = (uint8_t)(there ? file_scale(f.id, block, of_block, 1) : 0);
        }
        if (base_bytes(f.scale) && j == 0) { // the scale of a chunk is that of its only block
            uint8_t *base = to + bases_at(f) + g * base_bytes(f.scale) + second * 2;
            put_half(base, there ? file_half(f.id, block, 0) : 0);
            if (base_bytes(f.scale) == 8) put_half(base + 4, there ? file_half(f.id, block, 1) : 0);
        }
    }
}

// Float formats: lane 4g + t, load i of 16 bytes.
DEVICE int float_row(int lane, int i) { return lane / 4 + i % 2 * 8; }

DEVICE void pack_floats(const pack_arguments &p, uint8_t *to, int first_row, int chunk, int lane) {
    const int size = p.format == 0 ? 4 : 2, k_chunk = p.format == 0 ? 32 : 64;
    for (int i = 0; i < 4; i++) {
        const int row = first_row + float_row(lane, i);
        // F32: two loads hold a row's 8 numbers; else each load holds 8 of one of two runs of 32.
        const int k = chunk * k_chunk + lane % 4 * 8 + (size == 4 ? i / 2 * 4 : i / 2 * 32);
        for (int b = 0; b < 16; b++) {
            const bool there = row < p.n_rows && k + b / size < p.k;
            to[i * 512 + lane * 16 + b] = there ? p.rows[(size_t)row * p.row_bytes + (size_t)k * size + b] : 0;
        }
    }
}

// A warp a chunk: block_x the tile, block_y times the block's warps the chunk.
KERNEL(256, 1) pack_matrix(const pack_arguments p) {
    const int lane = lane_id(), chunk = block_y() * 8 + warp_id(), first_row = block_x() * 16;
    if (chunk >= p.n_chunks) return;
    const size_t tile = (size_t)block_x() * (size_t)p.n_chunks + (size_t)chunk;
    switch (p.format) {
#define X(name, id, ...)                                                                                               \
    case id: {                                                                                                         \
        uint8_t *to = p.tiles + tile * (size_t)chunk_bytes(format_##name::facts);                                      \
        pack_lane<format_##name>(p, to, first_row, chunk, lane);                                                       \
        if (lane < 16) pack_scales<format_##name>(p, to, first_row, chunk, lane);                                      \
        break;                                                                                                         \
    }
        QUANTIZED_FORMATS(X)
        SAME_TILES(X)
#undef X
    default: pack_floats(p, p.tiles + tile * FLOAT_CHUNK_BYTES, first_row, chunk, lane);
    }
}

// ---- and back -----------------------------------------------------------------------------------------------------------

DEVICE float code_value(format_facts f, uint32_t code) {
    switch (f.code) {
    case SIGNED_CODE: return (float)((int)(code ^ 1u << (f.bits - 1)) - (1 << (f.bits - 1)));
    case UNSIGNED_CODE: return (float)code;
    case MINUS_ONE_CODE: return (float)((int)code - 1);
    case SIGN_CODE: return (float)(2 * (int)code - 1);
    default: return (float)(int8_t)(code_words(f.code, (int)code / 4) >> code % 4 * 8);
    }
}

template <class F> DEVICE float value_in_chunk(const uint8_t *chunk, int row16, int k) {
    constexpr format_facts f = F::facts;
    const int j = k / 32, e = k % 32, g = row16 % 8, second = row16 / 8, lane = g * 4 + e % 16 / 4, b = e % 4;
    const int i = second + e / 16 * 2; // the register of the fragment
    uint32_t code = 0;
    if (f.bits == 8) code = chunk[j * 512 + lane * 16 + i * 4 + b];
    if (plane4_bytes(f))
        code = (uint32_t)(chunk[j / 2 * 512 + lane * 16 + j % 2 * 8 + i % 2 * 4 + b] >> i / 2 * 4) & 15;
    if (plane2_bytes(f)) {
        const uint32_t two = (uint32_t)(chunk[plane2_at(f) + j / 4 * 512 + lane * 16 + j % 4 * 4 + b] >> 2 * i) & 3;
        code |= f.bits == 6 ? two << 4 : two;
    }
    if (plane1_bytes(f)) {
        const uint8_t ones = chunk[plane1_at(f) + j / 4 * 256 + lane * 8 + j % 4 / 2 * 4 + b];
        code |= ((uint32_t)(ones >> (j % 2 * 4 + i)) & 1) << (f.bits - 1);
    }
    const float x = code_value(f, code);

    const uint8_t *record = chunk + scales_at(f) + (j / 4 * 8 + g) * scale_bytes(f.scale);
    const uint8_t *base = chunk + bases_at(f) + g * base_bytes(f.scale) + second * 2;
    const uint32_t first = half_at(record + j % 4 * 4 + second * 2);
    const uint8_t of_half = record[j % 4 * 4 + e / 16 * 2 + second];
    switch (f.scale) {
    case F16_SCALE: return half_to_float(first) * x;
    case BF16_SCALE: return bf16_to_float(first) * x;
    case F16_SCALE_MIN: return half_to_float(first) * x + half_to_float(half_at(record + 16 + j % 4 * 4 + second * 2));
    case F16_CHUNK: return half_to_float(half_at(base)) * x;
    case E4M3_HALVES: return e4m3_half(of_half) * x;
    case BYTE_SCALE:
        return half_to_float(half_at(base)) * code_unit(f.code) * (float)(int8_t)record[j % 4 * 2 + second] * x;
    case BYTE_SCALE_MIN:
        return half_to_float(half_at(base)) * (float)record[j % 4 * 4 + second] * x +
               half_to_float(half_at(base + 4)) * (float)record[j % 4 * 4 + 2 + second];
    case HALF_SCALES: return half_to_float(half_at(base)) * code_unit(f.code) * (float)(int8_t)of_half * x;
    default:
        return half_to_float(half_at(base)) * (float)(of_half & 15) * x +
               half_to_float(half_at(base + 4)) * (float)(of_half >> 4);
    }
}

// The number at (row, k) of a packed matrix, exactly what the file's block means.
DEVICE float value_at(const uint8_t *data, int format, int n_chunks, int row, int k) {
    const size_t tile = (size_t)(row / 16) * (size_t)n_chunks;
    switch (format) {
#define X(name, id, ...)                                                                                               \
    case id: {                                                                                                         \
        constexpr int chunk_k = format_##name::facts.groups * 32;                                                      \
        const uint8_t *chunk = data + (tile + (size_t)(k / chunk_k)) * (size_t)chunk_bytes(format_##name::facts);      \
        return value_in_chunk<format_##name>(chunk, row % 16, k % chunk_k);                                            \
    }
        QUANTIZED_FORMATS(X)
#undef X
    default: {
        const int chunk_k = format == 0 ? 32 : 64, e = k % chunk_k, second = row % 16 / 8;
        const uint8_t *chunk = data + (tile + (size_t)(k / chunk_k)) * FLOAT_CHUNK_BYTES;
        const int lane = row % 8 * 4 + e % 32 / 8;
        if (format == 0) return *(const float *)(chunk + (second + e % 8 / 4 * 2) * 512 + lane * 16 + e % 4 * 4);
        const uint32_t h = half_at(chunk + (second + e / 32 * 2) * 512 + lane * 16 + e % 8 * 2);
        return format == 1 ? half_to_float(h) : bf16_to_float(h);
    }
    }
}

struct unpack_arguments {
    const uint8_t *data;
    float *out;                                 // [n_rows, k]
    int format, first_row, n_rows, k, n_chunks; // format: tiles_id's
    float factor;
};

// The slow truth of rows first_row..: a block a row.
KERNEL(256, 1) unpack_rows(const unpack_arguments u) {
    const int row = block_x();
    for (int k = thread_id(); k < u.k; k += n_threads())
        u.out[(size_t)row * (size_t)u.k + (size_t)k] =
            value_at(u.data, u.format, u.n_chunks, u.first_row + row, k) * u.factor;
}

#endif
