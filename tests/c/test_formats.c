// test_formats.c: every fragment of formats/formats.inc, on the plain C primitives, against unpack of formats/pack.c.
// Blocks are random; products of a format's scales and codes fit 24 bits, so the comparison is exact. Returns 1 and says
// where it differs.
#include "isa/scalar.h"
#define V_UNROLL
#include "formats/formats.inc"
#include "formats/formats_small.inc"
#include "formats/formats_schemes.inc"
#include "tinyllm.h"
#include <stdio.h>

// Where a block's f16 numbers lie in the file.
static const struct {
    int id, half[2];
} halves[] = {{8, {0, -1}},    {2, {0, -1}},   {3, {0, 2}},   {6, {0, -1}},    {7, {0, 2}},   {10, {80, 82}},
              {11, {108, -1}}, {12, {0, 2}},   {13, {0, 2}},  {14, {208, -1}}, {20, {0, -1}}, {23, {0, -1}},
              {34, {52, -1}},  {35, {64, -1}}, {41, {0, -1}}, {42, {0, -1}},   {18, {0, -1}}, {21, {0, -1}},
              {16, {0, -1}},   {17, {0, -1}},  {22, {0, -1}}, {19, {0, -1}},   {29, {54, -1}}};

static uint32_t state = 1;
static uint32_t random_bits(void) { // Marsaglia's xorshift32
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

static void random_block(uint8_t *block, const tl_format *f) {
    for (int i = 0; i < f->block_bytes; i++) block[i] = (uint8_t)(random_bits() >> 13);
    for (size_t i = 0; i < sizeof halves / sizeof halves[0]; i++)
        for (int h = 0; h < 2 && halves[i].id == f->id; h++)
            if (halves[i].half[h] >= 0) block[halves[i].half[h] + 1] &= 0xbf; // |x| < 2, subnormals among them
    if (f->id < TL_FIRST_OWN) return;
    const float sign = f->id == 203 && random_bits() & 1 ? -1 : 1;
    const float scale = sign * (float)(1 + random_bits() % 4095) * 0x1p-16f; // 12 bits
    const unsigned short half = tl_f32_to_f16(scale);
    if (f->id == 201)
        memcpy(block, &half, 2);
    else
        memcpy(block + (f->id == 205), &scale, 4);
}

// A group as the matrix product sees it: row i's number k is scale[k / 16] * code + min[k / 16].
typedef struct numbers {
    uint8_t code[32][16];
    vf scale[2], min[2];
    int zero, most;
} numbers;

static void put_codes(numbers *n, const vb w[8], int zero, int fit, int offset) {
    n->zero = zero;
    n->most = !offset ? 32767 / (2 * 127 * fit) : zero == V_OFFSET && fit == 1 ? 255 : -1; // what 16 bits hold
    for (int k = 0; k < 32; k++) V_EACH n->code[k][i] = w[k / 4].v[4 * i + k % 4];
}

#define LOAD(name)                                                                                                     \
    vb w[8];                                                                                                           \
    for (int c = 0; c < 8; c++) w[c] = load_##name(b, j, c);                                                           \
    vi (*dot)(vi, vb, vq) = DOT_##name;                                                                                \
    put_codes(n, w, ZERO_##name, FIT_##name, dot == vi_dot_offset);                                                    \
    vf scale = scale_##name(b, j)
#define READ_SCALE32(name)                                                                                             \
    static int read_##name(numbers *n, const uint8_t *b, int j) {                                                      \
        LOAD(name);                                                                                                    \
        for (int h = 0; h < 2; h++) n->scale[h] = scale, n->min[h] = vf_set1(0);                                       \
        return KIND_##name == SCALE32;                                                                                 \
    }
#define READ_SCALE32_MIN(name)                                                                                         \
    static int read_##name(numbers *n, const uint8_t *b, int j) {                                                      \
        LOAD(name);                                                                                                    \
        for (int h = 0; h < 2; h++) n->scale[h] = scale, n->min[h] = min_##name(b, j);                                 \
        return KIND_##name == SCALE32_MIN;                                                                             \
    }
#define READ_SCALE16(name)                                                                                             \
    static int read_##name(numbers *n, const uint8_t *b, int j) {                                                      \
        LOAD(name);                                                                                                    \
        for (int h = 0; h < 2; h++)                                                                                    \
            n->scale[h] = vf_mul(scale, vf_from_vi(scale16_##name(b, j, h))), n->min[h] = vf_set1(0);                  \
        return KIND_##name == SCALE16;                                                                                 \
    }
#define READ_SCALE_EACH16(name)                                                                                        \
    static int read_##name(numbers *n, const uint8_t *b, int j) {                                                      \
        LOAD(name);                                                                                                    \
        n->scale[0] = scale, n->scale[1] = second_##name(b, j);                                                        \
        for (int h = 0; h < 2; h++) n->min[h] = vf_set1(0);                                                            \
        return KIND_##name == SCALE_EACH16;                                                                            \
    }
#define READ_SCALE16_MIN(name)                                                                                         \
    static int read_##name(numbers *n, const uint8_t *b, int j) {                                                      \
        LOAD(name);                                                                                                    \
        for (int h = 0; h < 2; h++)                                                                                    \
            n->scale[h] = vf_mul(scale, vf_from_vi(scale16_##name(b, j, h))),                                          \
            n->min[h] = vf_mul(min_##name(b, j), vf_from_vi(min16_##name(b, j, h)));                                   \
        return KIND_##name == SCALE16_MIN;                                                                             \
    }

#define FRAGMENTS(X)                                                                                                   \
    X(q8_0, SCALE32)                                                                                                   \
    X(q4_0, SCALE32)                                                                                                   \
    X(q4_1, SCALE32_MIN)                                                                                               \
    X(q5_0, SCALE32)                                                                                                   \
    X(q5_1, SCALE32_MIN)                                                                                               \
    X(q2_k, SCALE16_MIN)                                                                                               \
    X(q3_k, SCALE16)                                                                                                   \
    X(q4_k, SCALE32_MIN)                                                                                               \
    X(q5_k, SCALE32_MIN)                                                                                               \
    X(q6_k, SCALE16)                                                                                                   \
    X(iq4_nl, SCALE32)                                                                                                 \
    X(iq4_xs, SCALE32)                                                                                                 \
    X(mxfp4, SCALE32)                                                                                                  \
    X(nvfp4, SCALE_EACH16)                                                                                             \
    X(tq2_0, SCALE32)                                                                                                  \
    X(q2_0, SCALE32)                                                                                                   \
    X(q1_0, SCALE32)                                                                                                   \
    X(iq3_s, SCALE32)                                                                                                  \
    X(iq2_s, SCALE16)                                                                                                  \
    X(i4_128, SCALE32)                                                                                                 \
    X(i4_32, SCALE32)                                                                                                  \
    X(i8_64, SCALE32)                                                                                                  \
    X(nvfp4_64, SCALE_EACH16)

#define X(name, kind) READ_##kind(name)
FRAGMENTS(X)
#undef X

static const struct {
    const char *name;
    int (*read)(numbers *, const uint8_t *, int);
} fragments[] = {
#define X(name, ...) {#name, read_##name},
    FRAGMENTS(X)
#undef X
#define X(name, same) {#name, read_##same},
        SHARED_FRAGMENTS(X)
#undef X
};

// Rows in `present` are random, the others are NULL and must read as zero.
static int check_fragment(const tl_format *f, int (*read)(numbers *, const uint8_t *, int), uint32_t present) {
    static uint8_t blocks[16][256], panel[8192];
    static float truth[16][256];
    static numbers n;
    const uint8_t *rows[16];
    for (int i = 0; i < 16; i++) {
        random_block(blocks[i], f);
        rows[i] = present >> i & 1 ? blocks[i] : NULL;
    }
    memset(panel, 0xa5, sizeof panel);
    f->pack(panel, rows);
    for (size_t i = (size_t)f->panel_bytes; i < sizeof panel; i++)
        if (panel[i] != 0xa5) return printf("%s: pack wrote past its %d bytes\n", f->name, f->panel_bytes), 1;
    for (int i = 0; i < 16; i++) f->unpack(truth[i], panel, i);

    for (int j = 0; j < f->block / 32; j++) {
        if (!read(&n, panel, j)) return printf("%s: not the kind it says\n", f->name), 1;
        for (int at = 0; at < 16 * 32; at++) {
            int i = at / 32, k = at % 32;
            float x = n.scale[k / 16].v[i] * (float)(n.code[k][i] - n.zero) + n.min[k / 16].v[i];
            float expected = truth[i][32 * j + k];
            if ((isnan(expected) ? !isnan(x) : x != expected) || (!rows[i] && x != 0))
                return printf("%s: row %d, k %d is %g, not %g\n", f->name, i, 32 * j + k, x, expected), 1;
            if (n.code[k][i] > n.most) return printf("%s: code %d is over %d\n", f->name, n.code[k][i], n.most), 1;
        }
    }
    return 0;
}

static int check_floats(int id, vf (*load)(const uint8_t *, int)) {
    const tl_format *f = tl_format_of(id);
    uint8_t numbers[16][68], panel[1088];
    const uint8_t *rows[16];
    for (int i = 0; i < 16; i++) {
        random_block(numbers[i], f);
        for (int j = 0; j < 4 && f->block == 1; j++) numbers[i][j] &= 0xbf; // finite
        if (i && id == 205) numbers[i][0] = numbers[0][0];                  // the table is the matrix's
        rows[i] = i % 5 ? numbers[i] : NULL;
    }
    if (id == 205) rows[0] = numbers[0];
    f->pack(panel, rows);
    for (int c = 0; c < f->block; c++) {
        vf loaded = load(panel, c);
        for (int i = 0; i < 16; i++) {
            float x[64];
            f->unpack(x, panel, i);
            if (x[c] != loaded.v[i] || (!rows[i] && x[c] != 0))
                return printf("%s: row %d, number %d is %g, not %g\n", f->name, i, c, loaded.v[i], x[c]), 1;
        }
    }
    return 0;
}

static int check_sizes(void) {
    int n = 0, n_fragments = 0;
    for (const tl_format *f = tl_formats; f->name; f++, n++) {
        if (tl_format_of(f->id) != f) return printf("%s: id %d finds another format\n", f->name, f->id), 1;
        // A panel keeps at least the file's bits, and at most the 6-bit scales widened to bytes on top of them, or codes of
        // three or four bits where the file points into code books or has five digits a byte.
        int file = 16 * f->block_bytes, most = file + (f->block == 256 ? 16 * 8 : 0);
        if (f->n_codes || f->id == 34) most = 48 + 16 * f->block * (f->id == 34 ? 2 : 5) / 8;
        if (f->panel_bytes < file || f->panel_bytes > most)
            return printf("%s: a panel of %d bytes for %d in the file\n", f->name, f->panel_bytes, file), 1;
        n_fragments += !f->is_float;
    }
    if (n != TL_N_FORMATS || n_fragments != (int)(sizeof fragments / sizeof fragments[0]))
        return printf("%d formats, %d quantized: not all are tested\n", n, n_fragments), 1;
    if (tl_format_of(-1) || tl_format_of(4)) return printf("an unknown id finds a format\n"), 1;
    return 0;
}

static float half_value(unsigned h) { // the definition of IEEE 754 binary16
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float x = exponent ? ldexpf((float)(1024 + fraction), exponent - 25) : ldexpf((float)fraction, -24);
    if (exponent == 31) x = fraction ? NAN : INFINITY;
    return h & 0x8000 ? -x : x;
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static int check_halves(void) {
    for (unsigned h = 0; h < 65536; h++) {
        float x = half_value(h), y = tl_f16_to_f32((unsigned short)h), b = tl_bf16_to_f32((unsigned short)h);
        unsigned back = tl_f32_to_f16(y), b_back = tl_f32_to_bf16(b);
        if (isnan(x) ? !isnan(y) || !isnan(tl_f16_to_f32((unsigned short)back)) : bits_of(x) != bits_of(y) || back != h)
            return printf("half %04x is %g, not %g, and %04x again\n", h, y, x, back), 1;
        if (bits_of(b) != h << 16 || (isnan(b) ? (b_back | 0x40) != (h | 0x40) : b_back != h))
            return printf("bfloat16 %04x is %g and %04x again\n", h, b, b_back), 1;

        // Rounding: half way to the next is even, one float32 off either way is the nearer.
        if ((h & 0x7fff) >= 0x7bff) continue; // the largest has no next
        float next = half_value(h + 1), middle = 0.5f * (x + next);
        unsigned low = tl_f32_to_f16(nextafterf(middle, x)), high = tl_f32_to_f16(nextafterf(middle, next));
        if (tl_f32_to_f16(middle) != h + h % 2 || low != h || high != h + 1)
            return printf("near %g: %04x, %04x, %04x\n", middle, low, tl_f32_to_f16(middle), high), 1;
    }
    if (tl_f32_to_f16(65520.0f) != 0x7c00 || tl_f32_to_f16(nextafterf(65520.0f, 0)) != 0x7bff ||
        tl_f32_to_f16(-INFINITY) != 0xfc00 || !isnan(tl_f16_to_f32(tl_f32_to_f16(NAN))))
        return printf("the largest half is rounded wrongly\n"), 1;
    return 0;
}

int main(void) {
    int failed = check_sizes() | check_halves();
    for (int round = 0; round < 50 && !failed; round++)
        failed = check_floats(0, load_f32) | check_floats(1, load_f16) | check_floats(30, load_bf16) |
                 check_floats(204, load_f8_e4m3) | check_floats(205, load_bnb4) | check_floats(206, load_bnb8);
    for (size_t i = 0; i < sizeof fragments / sizeof fragments[0]; i++) {
        const tl_format *f = tl_formats;
        while (f->name && strcmp(f->name, fragments[i].name)) f++;
        if (!f->name) return printf("%s is not a format\n", fragments[i].name), 1;
        for (int round = 0; round < 50 && !failed; round++) {
            uint32_t present = round < 10 ? 0xffff : round == 10 ? 0 : random_bits();
            failed = check_fragment(f, fragments[i].read, present);
        }
    }
    return failed;
}
