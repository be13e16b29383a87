// test_tiles.c: the products on a matrix unit (kernels/tiles.inc) with the plain C model of its registers (isa/tiles.h),
// against the plain C product, bit for bit: what AMX computes is proved where there is none. test_kernels.c runs the real
// one. Returns 1 and says where they differ.
#include "check.h"
#include "isa/scalar.h"
#include "isa/tiles.h"
#include "tinyllm.h"
#define V_UNROLL
#define T_FEW few
#include "isa/isa.h"
static tl_kernels few; // what a few tokens are left to
#include "isa/tiles.inc"

static const tl_kernels *plain;
static tl_kernels tiles;

static void fill(uint8_t *p, size_t n) {
    const int extreme = random_below(6); // weights and scales of one byte find sums that overflow
    static const uint8_t extremes[] = {0x00, 0xff, 0x80, 0x7f};
    for (size_t i = 0; i < n; i++) p[i] = extreme < 4 ? extremes[extreme] : (uint8_t)(random_bits() >> 13);
}

// What packing gives and random bytes do not, by the layout of panels (formats/panel.h): f16 numbers that are finite, tables
// of codes that are signed bytes once their zero is taken off.
static void tame(uint8_t *block, const tl_format *f) {
    if (f->id >= TL_FIRST_OWN) { // floats, and what is left of 16 when a zero point is taken off
        uint8_t *floats = block + (f->id == 203 ? 576 : f->id == 201 ? 256 : 1024);
        for (int i = 0; i < 16; i++) {
            const float scale = (f->id == 203 && i % 3 == 0 ? -64 : 1 / 64.0f) * (1.5f + random_float());
            const unsigned short half = tl_f32_to_f16(scale);
            uint8_t *left = floats + (f->id == 201 ? 32 : 64) + i;
            if (f->id < 202) *left = (uint8_t)(1 + *left % 16);
            memcpy(floats + (f->id == 201 ? 2 : 4) * i, f->id == 201 ? (const void *)&half : &scale,
                   f->id == 201 ? 2 : 4);
        }
        return;
    }
    const int with_min = f->id == 3 || f->id == 7 || f->id == 10 || f->id == 12 || f->id == 13;
    const int n_halves = f->id == 39 || f->id == 40 ? 0 : 1 + with_min;
    uint8_t *halves = f->block > TL_Q ? block : block + f->panel_bytes - 32 * n_halves;
    for (int i = 0; i < 16 * n_halves; i++) halves[2 * i + 1] &= 0xbf;
    for (int i = 0; f->id == 39 && i < 16; i++) block[256 + i] = (uint8_t)(120 + random_below(10));
    for (int i = 0; f->id == 40 && i < 64; i++) block[i / 32 * 288 + 256 + i % 32] &= 0x7f;
    for (int i = 0; f->n_codes && i < 16; i++) block[32 + i] %= 87;
    for (int i = 0; f->id == 11 && i < 8 * 32; i++) { // Q3_K's scales have 6 bits
        uint8_t *scale = block + 32 + i / 32 * 224 + 192 + i % 32;
        *scale = (uint8_t)((*scale & 63) - 32);
    }
}

typedef struct shape {
    int rows, k, n_tokens, bias, add, first, last, from, to; // panels [first, last), tokens [from, to)
} shape;

static void check_product(const tl_format *f, const shape *s) {
    const int panels = (s->rows + TL_ROWS - 1) / TL_ROWS;
    tl_matrix w = {.format = f, .rows = s->rows, .k = s->k};
    w.n_bytes = (size_t)panels * (size_t)(s->k / f->block) * (size_t)f->panel_bytes;
    w.data = exactly(w.n_bytes);
    w.bias = s->bias ? random_floats((size_t)s->rows, 3) : NULL;
    for (size_t at = 0; at < w.n_bytes; at += (size_t)f->panel_bytes) {
        fill((uint8_t *)w.data + at, (size_t)f->panel_bytes);
        tame((uint8_t *)w.data + at, f);
    }
    const size_t k = (size_t)s->k, n = (size_t)s->n_tokens * k, stride = (size_t)s->rows + (size_t)(s->n_tokens % 3);
    tl_activations in = {.k = s->k, .n_rows = s->n_tokens};
    in.q = exactly(n);
    in.groups = exactly(n / TL_Q * sizeof(tl_q_group));
    in.tiles = exactly(TL_TILES_BYTES(s->n_tokens, k));
    in.scales = exactly(TL_TILES_SCALES(s->n_tokens, k) * sizeof(float));
    memset(in.tiles, 0x7f, TL_TILES_BYTES(s->n_tokens, k)); // what lies past the last token: NaN among it
    memset(in.scales, 0xff, TL_TILES_SCALES(s->n_tokens, k) * sizeof(float));
    for (int t = 0; t < s->n_tokens; t++) {
        const float size = random_below(5) == 0 ? 0 : 100;
        float *x = random_floats(k, size);
        for (size_t i = 0; i < k && t % 3 == 0; i++) x[i] = x[i] < 0 ? -size : size; // all of them 127
        plain->quantize(in.q + (size_t)t * k, in.groups + (size_t)t * (k / TL_Q), x, s->k);
        tiles.arrange(&in, t);
        free(x);
    }
    const size_t n_out = stride * (size_t)s->n_tokens;
    float *expected = random_floats(n_out, 2), *out = exactly(n_out * sizeof(float));
    memcpy(out, expected, n_out * sizeof(float));
    tl_product product = {.w = &w, .in = &in, .out = expected, .stride = stride, .add = s->add};
    plain->matmul[f - tl_formats](&product, s->first, s->last, s->from, s->to);
    product.out = out;
    const t_shapes others = {
        .palette = 1, .row_bytes = {16, 64}, .rows = {3, 5}}; // set in this thread by somebody else
    t_unit.shapes = others;
    tiles.matmul[f - tl_formats](&product, s->first, s->last, s->from, s->to);
    CHECK(!memcmp(&t_unit.shapes, &others, sizeof others), "%s: the shapes that were set before are lost", f->name);
    for (size_t i = 0; i < n_out; i++)
        CHECK(!memcmp(&out[i], &expected[i], 4),
              "%s: %d x %d, panels %d..%d, tokens %d..%d of %d: row %zu, token %zu is %.9g, not %.9g", f->name, s->rows,
              s->k, s->first, s->last, s->from, s->to, s->n_tokens, i % stride, i / stride, (double)out[i],
              (double)expected[i]);
    free(out);
    free(expected);
    free(in.q);
    free(in.groups);
    free(in.tiles);
    free(in.scales);
    free(w.data);
    free(w.bias);
}

// Every number of tokens that begins a tile or a block of them, on whole and broken groups of panels, runs of k that are
// whole, broken and both.
static void check_products(const tl_format *f) {
    static const int rows[] = {1, 40, 130}, tokens[] = {14, 21, 22, 33, 177};
    int turn = 0;
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t n = 0; n < sizeof tokens / sizeof *tokens; n++, turn++) {
            const int panels = (rows[r] + TL_ROWS - 1) / TL_ROWS, runs = 1 + turn % 2;
            shape s = {.rows = rows[r],
                       .k = f->block == 256 ? 256 * runs : f->block * (1 + turn * 5 % (13 * TL_Q / f->block)),
                       .n_tokens = tokens[n],
                       .bias = turn / 2 % 2,
                       .add = turn % 2,
                       .last = panels,
                       .to = tokens[n]};
            check_product(f, &s);
            s.first = random_below(panels);
            s.last = s.first + 1 + random_below(panels - s.first);
            s.from = random_below(s.n_tokens);
            s.to = s.from + 1 + random_below(s.n_tokens - s.from);
            check_product(f, &s);
        }
}

int main(void) {
    CHECK(tl_isa_select("scalar") == 0, "there is no scalar target");
    plain = tl_isa();
    few = *plain;
    take_tiles(&tiles);
    for (const tl_format *f = tl_formats; f->name; f++) {
        CHECK(!f->is_float == !!tiles.matmul[f - tl_formats], "%s: tiles are for quantized weights", f->name);
        if (!f->is_float) check_products(f);
    }
    printf("ok\n");
    return 0;
}
