// test_kernels.c: every kernel of every instruction set that this machine can run. The plain C target is held
// to a reference in float64, within bounds derived below; the others are held to it bit for bit.
//
// Bounds (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3): with u = 2^-24, a number that
// went through n float32 roundings is off by at most gamma(n) = n u / (1 - n u) of its size, and a sum by
// gamma(n) of the sum of its terms' sizes. Every bound counts the roundings on the longest way.
#include "check.h"
#include "isa/isa.h"
#include <math.h>
#include <string.h>

#define UNIT      0x1p-24
#define TINY      0x1p-120   // covers what underflows
#define EXP_ERROR (6 * UNIT) // vf_exp: the series' rest 2.9 u, the reduction 0.5 u, Horner's roundings 2.4 u
#define COUNT(a)  ((int)(sizeof(a) / sizeof(a)[0]))

static double gamma_of(int n) { return n * UNIT / (1 - n * UNIT); }

#define MAX_KERNELS 16
static const tl_kernels *kernels[MAX_KERNELS]; // [0] is the plain C target
static int n_kernels = 1;

static void find_kernels(void) {
    for (const char *const *name = tl_isa_names(); *name; name++) {
        CHECK(tl_isa_select(*name) == 0, "%s is listed but cannot be selected", *name);
        CHECK(!strcmp(tl_isa_name(), *name) && !strcmp(tl_isa()->name, *name), "%s gives %s", *name, tl_isa_name());
        CHECK(n_kernels < MAX_KERNELS, "too many instruction sets");
        kernels[strcmp(*name, "scalar") ? n_kernels++ : 0] = tl_isa();
    }
    CHECK(kernels[0], "there is no scalar target");
    CHECK(tl_isa_select("mmx") == -1 && tl_isa_select("") == -1, "an unknown instruction set can be selected");
}

static void *copy_of(const void *from, size_t n_bytes) {
    void *to = exactly(n_bytes);
    memcpy(to, from, n_bytes);
    return to;
}

// The first place where two arrays of 32-bit words differ, for messages; -1: none.
static long first_difference(const void *a, const void *b, size_t n_bytes) {
    if (!memcmp(a, b, n_bytes)) return -1;
    size_t i = 0;
    while (!memcmp((const char *)a + i, (const char *)b + i, 1)) i++;
    return (long)(i / 4);
}

// ---- matrices

// What of a format's block is not free: where f16 numbers lie, and where codes do in formats with a minimum.
static const struct {
    int id, half[2], codes, codes_end;
} blocks[] = {
    {8, {0, -1}, 0, 0},     {2, {0, -1}, 0, 0},    {3, {0, 2}, 4, 20},    {6, {0, -1}, 0, 0},    {7, {0, 2}, 4, 24},
    {10, {80, 82}, 16, 80}, {11, {108, -1}, 0, 0}, {12, {0, 2}, 16, 144}, {13, {0, 2}, 16, 176}, {14, {208, -1}, 0, 0},
    {20, {0, -1}, 0, 0},    {23, {0, -1}, 0, 0},   {34, {52, -1}, 0, 0},  {35, {64, -1}, 0, 0},  {41, {0, -1}, 0, 0},
    {42, {0, -1}, 0, 0},    {18, {0, -1}, 0, 0},   {21, {0, -1}, 0, 0},   {16, {0, -1}, 0, 0},   {17, {0, -1}, 0, 0},
    {22, {0, -1}, 0, 0},    {19, {0, -1}, 0, 0},   {29, {54, -1}, 0, 0},
};

static void random_block(uint8_t *block, const tl_format *f) {
    static const uint8_t extremes[] = {0x00, 0xff, 0x80, 0x7f};
    const int extreme = random_below(8); // blocks of one byte find sums that overflow
    for (int i = 0; i < f->block_bytes; i++)
        block[i] = extreme < 4 ? extremes[extreme] : (uint8_t)(random_bits() >> 13);
    if (f->id == 39) block[0] = (uint8_t)(120 + random_below(10)); // 2^-7 .. 2^2
    if (f->id >= TL_FIRST_OWN) {                                   // a float, after bnb4's byte for its table
        const float scale = (f->id == 203 ? random_below(2) ? -64.0f : 1 / 64.0f : 1) * (1.5f + random_float()) / 64;
        const unsigned short half = tl_f32_to_f16(scale);
        memcpy(block + (f->id == 205), f->id == 201 ? (const void *)&half : &scale, f->id == 201 ? 2 : 4);
        if (f->id == 205) block[0] = 1;
    }
    for (int i = 0; i < COUNT(blocks); i++)
        for (int h = 0; h < 2 && blocks[i].id == f->id; h++)
            if (blocks[i].half[h] >= 0) block[blocks[i].half[h] + 1] &= 0xbf; // |x| < 2, subnormals among them
}

typedef struct matrix {
    tl_matrix m;    // data and bias are exactly sized
    float *w, *min; // [rows, k] what it means; the minimums alone, or zeros
} matrix;

static void upload(tl_matrix *m, const tl_format *f, int rows, int k, const uint8_t *file) {
    const tl_source source = {.format = f, .fd = -1, .memory = file};
    tl_message message;
    *m = (tl_matrix){.format = f, .rows = rows, .k = k};
    tl_pool_enter();
    tl_status status = tl_backend_cpu.upload(m, &source, 1 + rows % 3, &message);
    tl_pool_leave();
    CHECK(status == TL_OK, "%s", message.text);
}

static matrix make_matrix(const tl_format *f, int rows, int k, int with_bias) {
    const size_t n_blocks = (size_t)rows * (size_t)(k / f->block), n = (size_t)rows * (size_t)k;
    uint8_t *file = exactly(n_blocks * (size_t)f->block_bytes);
    matrix a = {.w = exactly(n * sizeof(float)), .min = exactly(n * sizeof(float))};
    if (f->is_float && f->block == 1) {
        float *x = random_floats(n, 1);
        f->quantize(file, x, n, NULL);
        free(x);
    } else {
        for (size_t i = 0; i < n_blocks; i++) random_block(file + i * (size_t)f->block_bytes, f);
    }
    upload(&a.m, f, rows, k, file);
    tl_backend_cpu.unpack(&a.m, a.w);

    memset(a.min, 0, n * sizeof(float));
    for (int i = 0; i < COUNT(blocks); i++) { // the same blocks with all codes 0
        if (blocks[i].id != f->id || blocks[i].codes_end == 0) continue;
        for (size_t b = 0; b < n_blocks; b++)
            memset(file + b * (size_t)f->block_bytes + blocks[i].codes, 0,
                   (size_t)(blocks[i].codes_end - blocks[i].codes));
        tl_matrix minimums;
        upload(&minimums, f, rows, k, file);
        tl_backend_cpu.unpack(&minimums, a.min);
        tl_backend_cpu.free(minimums.data);
    }
    free(file);
    void *data = copy_of(a.m.data, a.m.n_bytes);
    tl_backend_cpu.free(a.m.data);
    a.m.data = data;
    if (with_bias) a.m.bias = random_floats((size_t)rows, 3);
    return a;
}

static void free_matrix(matrix *a) {
    free(a->m.data);
    free(a->m.bias);
    free(a->w);
    free(a->min);
}

// What is rounded, in a matrix unit's order as well: of the last instruction set that has one, as all have the same.
static void arrange(tl_activations *in, int n_tokens) {
    in->n_rows = n_tokens;
    in->tiles = exactly(TL_TILES_BYTES(n_tokens, in->k));
    in->scales = exactly(TL_TILES_SCALES(n_tokens, in->k) * sizeof(float));
    memset(in->tiles, 0, TL_TILES_BYTES(n_tokens, in->k));
    memset(in->scales, 0, TL_TILES_SCALES(n_tokens, in->k) * sizeof(float));
    for (int i = 0; i < n_kernels; i++)
        for (int t = 0; kernels[i]->arrange && t < n_tokens; t++) kernels[i]->arrange(in, t);
}

static tl_activations make_activations(const tl_format *f, int n_tokens, int k) {
    const size_t n = (size_t)n_tokens * (size_t)k;
    tl_activations in = {.k = k};
    if (f->is_float) {
        in.x = random_floats(n, 1);
        return in;
    }
    in.q = exactly(n);
    in.groups = exactly(n / TL_Q * sizeof(tl_q_group));
    for (size_t g = 0; g < n / TL_Q; g++) {
        const int extreme = random_below(6);
        for (size_t half = 0; half < 2; half++) {
            int sum = 0;
            for (size_t i = 0; i < 16; i++) {
                int q = extreme == 0 ? 127 : extreme == 1 ? -127 : random_below(255) - 127;
                in.q[g * TL_Q + half * 16 + i] = (int8_t)q;
                sum += q;
            }
            in.groups[g].half[half] = sum;
        }
        in.groups[g].sum = in.groups[g].half[0] + in.groups[g].half[1];
        in.groups[g].scale = extreme == 2 ? 0 : 0.02f * (1.5f + random_float());
        in.groups[g].scaled_sum = in.groups[g].scale * (float)in.groups[g].sum;
    }
    arrange(&in, n_tokens);
    return in;
}

static void free_activations(tl_activations *in) {
    free(in->tiles);
    free(in->scales);
    free((void *)(uintptr_t)in->x);
    free(in->q);
    free(in->groups);
}

typedef struct shape {
    int rows, k, n_tokens, bias, add, first, last, from, to; // panels [first, last), tokens [from, to)
} shape;

// out, one row and token, against float64. Its roundings: floats k fmas; blocks a product and an fma a group,
// twice with a minimum, plus one by which unpack rounded the weight; then the bias and what is added to.
static void check_output(const matrix *a, const tl_activations *in, float out, float before, int row, int t, int add) {
    const tl_format *f = a->m.format;
    const int k = a->m.k;
    double exact = 0, size = 0;
    for (int i = 0; i < k; i++) {
        const double w = (double)a->w[row * k + i], min = (double)a->min[row * k + i];
        const double x = f->is_float ? (double)in->x[t * k + i]
                                     : (double)in->q[t * k + i] * (double)in->groups[t * (k / TL_Q) + i / TL_Q].scale;
        exact += w * x;
        size += (fabs(w) + 2 * fabs(min)) * fabs(x);
    }
    const double bias = a->m.bias ? (double)a->m.bias[row] : 0, base = add ? (double)before : 0;
    const int each = f->id == 203 ? 4 : 2; // halves of 16 have products of their own
    const int roundings = f->is_float ? k + 2 : each * (k / TL_Q) + 4;
    const double bound = gamma_of(roundings) * (size + fabs(bias) + fabs(base)) + TINY;
    const double error = fabs((double)out - (exact + bias + base));
    CHECK(error <= bound, "%s scalar: %d x %d, row %d, token %d is %.9g, not %.9g (off by %g, at most %g)", f->name,
          a->m.rows, k, row, t, (double)out, exact + bias + base, error, bound);
}

static void check_product(const tl_format *f, const shape *s) {
    matrix a = make_matrix(f, s->rows, s->k, s->bias);
    tl_activations in = make_activations(f, s->n_tokens, s->k);
    const size_t stride = (size_t)s->rows + (size_t)(s->n_tokens % 3); // what lies between stays as it is
    const size_t n = stride * (size_t)(s->n_tokens - 1) + (size_t)s->rows;
    float *before = random_floats(n, 2), *expected = NULL;
    for (int i = 0; i < n_kernels; i++) {
        float *out = copy_of(before, n * sizeof(float));
        const tl_product product = {.w = &a.m, .in = &in, .out = out, .stride = stride, .add = s->add};
        kernels[i]->matmul[f - tl_formats](&product, s->first, s->last, s->from, s->to);
        if (i == 0) {
            expected = out;
            for (size_t at = 0; at < n; at++) {
                const int t = (int)(at / stride), row = (int)(at % stride);
                const int inside =
                    row < s->rows && row / TL_ROWS >= s->first && row / TL_ROWS < s->last && t >= s->from && t < s->to;
                if (inside)
                    check_output(&a, &in, out[at], before[at], row, t, s->add);
                else
                    CHECK(!memcmp(&out[at], &before[at], 4), "%s scalar wrote outside: row %d, token %d", f->name, row,
                          t);
            }
            continue;
        }
        const long at = first_difference(out, expected, n * sizeof(float));
        CHECK(at < 0, "%s %s: %d x %d, panels %d..%d, tokens %d..%d: row %ld, token %ld is %.9g, not %.9g", f->name,
              kernels[i]->name, s->rows, s->k, s->first, s->last, s->from, s->to, at % (long)stride, at / (long)stride,
              (double)out[at], (double)expected[at]);
        free(out);
    }
    free(expected);
    free(before);
    free_activations(&in);
    free_matrix(&a);
}

// A token with a number that is none gives nothing else, and harms no other.
static void check_bad_product(const tl_format *f, const tl_kernels *kernel, int n_tokens, float bad) {
    const int k = f->block == 1 ? 40 : 2 * f->block, rows = 70, bad_token = random_below(n_tokens);
    const size_t n = (size_t)n_tokens * (size_t)k;
    matrix a = make_matrix(f, rows, k, 0);
    float *x = random_floats(n, 1), *out = exactly((size_t)n_tokens * (size_t)rows * sizeof(float));
    x[bad_token * k + random_below(k)] = bad;
    tl_activations in = {.x = x, .q = exactly(n), .groups = exactly(n / TL_Q * sizeof(tl_q_group)), .k = k};
    if (!f->is_float) {
        for (int t = 0; t < n_tokens; t++) kernel->quantize(in.q + t * k, in.groups + t * (k / TL_Q), x + t * k, k);
        arrange(&in, n_tokens);
    }
    const tl_product product = {.w = &a.m, .in = &in, .out = out, .stride = (size_t)rows};
    kernel->matmul[f - tl_formats](&product, 0, (rows + TL_ROWS - 1) / TL_ROWS, 0, n_tokens);
    for (int at = 0; at < n_tokens * rows; at++)
        CHECK(!isfinite(out[at]) == (at / rows == bad_token), "%s %s: token %d of %d has %g, token %d gives %g",
              f->name, kernel->name, bad_token, n_tokens, (double)bad, at / rows, (double)out[at]);
    free(out);
    free_activations(&in);
    free_matrix(&a);
}

static void check_bad_products(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (const tl_format *f = tl_formats; f->name; f++)
        for (int i = 0; i < n_kernels; i++)
            for (int n_tokens = 1; n_tokens <= 17; n_tokens += n_tokens < 4 ? 1 : 6)
                check_bad_product(f, kernels[i], n_tokens, bad[random_below(COUNT(bad))]);
}

static void check_products(void) {
    static const int rows[] = {1, 15, 16, 17, 33, 64, 65, 80, 130}, float_k[] = {1, 7, 33, 96};
    int turn = 0; // which numbers of tokens, biases and ranges a shape gets: all of them over the shapes
    for (const tl_format *f = tl_formats; f->name; f++) {
        for (int r = 0; r < COUNT(rows); r++)
            for (int i = 0; i < (f->block == 1 ? 4 : 3); i++, turn++) {
                const int panels = (rows[r] + TL_ROWS - 1) / TL_ROWS;
                shape s = {.rows = rows[r], .k = f->block == 1 ? float_k[i] : f->block * (i + 1)};
                s.n_tokens = 1 + turn * 7 % 17;
                s.bias = turn / 2 % 2;
                s.add = turn % 2;
                s.last = panels;
                s.to = s.n_tokens;
                check_product(f, &s);
                s.first = random_below(panels);
                s.last = s.first + 1 + random_below(panels - s.first);
                s.from = random_below(s.n_tokens);
                s.to = s.from + 1 + random_below(s.n_tokens - s.from);
                check_product(f, &s);
            }
        for (int n = 1; n <= 17; n++) { // every number of tokens, on whole and broken groups of panels
            shape s = {.rows = 100, .k = f->block == 1 ? 5 : f->block, .n_tokens = n, .last = 7, .to = n};
            check_product(f, &s);
        }
    }
}

// ---- rows of activations

static const int lengths[] = {1, 7, 16, 17, 33, 64, 65, 100, 172, 1000};

static void check_rmsnorm(void) {
    for (int i = 0; i < COUNT(lengths); i++)
        for (int round = 0; round < 4; round++) {
            const int n = lengths[i];
            const float eps = round == 3 ? 0.1f : 1e-5f;
            float *x = random_floats((size_t)n, round == 0   ? 0
                                                : round == 1 ? 1e-3f
                                                             : 100),
                  *weight = random_floats((size_t)n, 2), *expected = NULL;
            for (int c = 0; c < n_kernels; c++) {
                float *out = exactly((size_t)n * sizeof(float));
                kernels[c]->rmsnorm(out, x, weight, eps, n);
                if (c == 0) {
                    expected = out;
                    double squares = 0;
                    for (int j = 0; j < n; j++) squares += (double)x[j] * (double)x[j];
                    // n / 16 fmas, 4 levels of the tree, the mean, eps, the root, the inverse, two products.
                    const double scale = 1 / sqrt(squares / n + (double)eps), bound = gamma_of((n + 15) / 16 + 10);
                    for (int j = 0; j < n; j++) {
                        const double exact = (double)x[j] * scale * (double)weight[j];
                        CHECK(fabs((double)out[j] - exact) <= bound * fabs(exact) + TINY,
                              "rmsnorm scalar: number %d of %d is %.9g, not %.9g", j, n, (double)out[j], exact);
                    }
                    continue;
                }
                CHECK(first_difference(out, expected, (size_t)n * sizeof(float)) < 0, "rmsnorm %s: n = %d",
                      kernels[c]->name, n);
                free(out);
            }
            free(expected);
            free(x);
            free(weight);
        }
}

// A group of activations by name of what is special about it; [32].
static void fill_group(float *x, int kind) {
    static const float ties[] = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, -126.5f};
    for (int i = 0; i < TL_Q; i++) {
        switch (kind) {
        case 0: x[i] = 0; break;
        case 1: x[i] = i == 20 ? 127 : ties[i % 8]; break; // the scale is 1
        case 2: x[i] = 0x1p-101f * random_float(); break;  // too small to have an inverse
        case 3: x[i] = i == 3 ? 0x1p-149f : 0; break;
        case 4: x[i] = 0x1p-98f * random_float() + (i == 9 ? 0x1p-97f : 0); break;
        case 5: x[i] = i % 2 ? 3.4028234e38f : -3.4028234e38f; break;
        case 6: x[i] = i == 31 ? -1e4f : random_float(); break;
        case 7: x[i] = i == 17 ? NAN : 10 * random_float(); break;
        case 8: x[i] = i == 2 ? -INFINITY : i == 3 ? INFINITY : random_float(); break;
        case 9: x[i] = i == 30 ? INFINITY : i == 31 ? NAN : 0; break;
        default: x[i] = 10 * random_float();
        }
    }
}

static void check_quantize(void) {
    for (int n_groups = 1; n_groups <= 40; n_groups++) {
        const size_t n = (size_t)n_groups * TL_Q;
        float *x = exactly(n * sizeof(float)), *scales = NULL;
        int8_t *numbers = NULL;
        for (int g = 0; g < n_groups; g++) fill_group(x + g * TL_Q, (g + n_groups) % 13);
        for (int c = 0; c < n_kernels; c++) {
            int8_t *q = exactly(n);
            float *scale = exactly((size_t)n_groups * sizeof(float));
            tl_q_group *groups = exactly((size_t)n_groups * sizeof *groups);
            kernels[c]->quantize(q, groups, x, (int)n);
            for (int g = 0; g < n_groups; g++) {
                const tl_q_group *group = &groups[g];
                scale[g] = group->scale;
                CHECK(group->sum == group->half[0] + group->half[1] &&
                          (group->scaled_sum == group->scale * (float)group->sum || !isfinite(group->scale)),
                      "quantize %s: group %d's sums disagree", kernels[c]->name, g);
            }
            for (int h = 0; h < n_groups * 2; h++) {
                int sum = 0;
                for (int i = 0; i < 16; i++) sum += q[h * 16 + i];
                const int got = groups[h / 2].half[h % 2];
                CHECK(got == sum, "quantize %s: sum of half %d is %d, not %d", kernels[c]->name, h, got, sum);
            }
            free(groups);
            if (c > 0) {
                CHECK(!memcmp(q, numbers, n) && !memcmp(scale, scales, (size_t)n_groups * sizeof(float)),
                      "quantize %s: %d groups differ", kernels[c]->name, n_groups);
                free(q);
                free(scale);
                continue;
            }
            numbers = q;
            scales = scale;
            for (int g = 0; g < n_groups; g++) {
                float largest = 0;
                int finite = 1;
                for (int i = 0; i < TL_Q; i++) {
                    largest = fmaxf(largest, fabsf(x[g * TL_Q + i]));
                    finite &= isfinite(x[g * TL_Q + i]) != 0;
                }
                const int zeros = largest <= 0x1p-100f || !finite;
                CHECK(finite ? isfinite(scale[g]) : !isfinite(scale[g]), "quantize scalar: group %d has the scale %g",
                      g, (double)scale[g]);
                CHECK(!finite || scale[g] == (zeros ? 0 : largest / 127.0f),
                      "quantize scalar: scale of group %d is %g, largest %g", g, (double)scale[g], (double)largest);
                for (int i = 0; i < TL_Q; i++) { // the inverse and the product are rounded before the number is
                    const double y = zeros ? 0 : (double)x[g * TL_Q + i] * 127 / (double)largest;
                    const int number = q[g * TL_Q + i];
                    CHECK(abs(number) <= 127 && fabs(number - y) <= 0.5 + gamma_of(2) * fabs(y),
                          "quantize scalar: %g of %g becomes %d", (double)x[g * TL_Q + i], (double)largest, number);
                    if (largest == 127) CHECK(number == (int)rint(y), "quantize scalar: %g becomes %d", y, number);
                }
            }
        }
        free(numbers);
        free(scales);
        free(x);
    }
}

// mean and x - mean have their roundings, e, which reach the variance as well; the rest is as for RMSNorm.
static void check_layernorm_scalar(const float *out, const float *x, const float *weight, float eps, int n) {
    double mean = 0, size = 0, squares = 0, shift = 0;
    for (int j = 0; j < n; j++) mean += (double)x[j] / n;
    for (int j = 0; j < n; j++) size += fabs((double)x[j]) / n;
    const double mean_error = gamma_of((n + 15) / 16 + 6) * size;
    for (int j = 0; j < n; j++) {
        const double c = (double)x[j] - mean;
        squares += c * c;
        shift += fabs(c) * (mean_error + UNIT * fabs(c));
    }
    const double variance = squares / n + (double)eps, scale = 1 / sqrt(variance);
    const double bound = gamma_of((n + 15) / 16 + 12) + 2 * shift / n / variance;
    for (int j = 0; j < n; j++) {
        const double c = (double)x[j] - mean, w = (double)weight[j], exact = c * scale * w;
        const double off = (mean_error + UNIT * fabs(c)) * scale * fabs(w);
        CHECK(fabs((double)out[j] - exact) <= bound * (fabs(exact) + off) + off + TINY,
              "layernorm scalar: number %d of %d is %.9g, not %.9g", j, n, (double)out[j], exact);
    }
}

static void check_layernorm(void) {
    for (int i = 0; i < COUNT(lengths); i++)
        for (int round = 0; round < 3; round++) {
            const int n = lengths[i];
            const float eps = round == 2 ? 0.1f : 1e-5f;
            float *x = random_floats((size_t)n, round == 0 ? 0 : 100), *weight = random_floats((size_t)n, 2),
                  *expected = NULL;
            for (int j = 0; j < n; j++) x[j] += 30;
            for (int c = 0; c < n_kernels; c++) {
                float *out = exactly((size_t)n * sizeof(float));
                kernels[c]->layernorm(out, x, weight, eps, n);
                if (c == 0) {
                    check_layernorm_scalar(expected = out, x, weight, eps, n);
                    continue;
                }
                CHECK(first_difference(out, expected, (size_t)n * sizeof(float)) < 0, "layernorm %s: n = %d",
                      kernels[c]->name, n);
                free(out);
            }
            free(expected);
            free(x);
            free(weight);
        }
}

// A gated unit g / (1 + e^-z) * up, z = g (SiLU) or 2 sqrt(2 / pi) (g + 0.044715 g^3) (GELU), or gpt-oss's, z = 1.702 g
// with g and up clamped and up + 1 in its place.
static void check_glu(tl_activation activation) {
    static const char *const names[] = {"silu_mul", "gelu_mul", "clamped_swiglu"};
    const char *const name = names[activation];
    for (int i = 0; i < COUNT(lengths); i++)
        for (int round = 0; round < 3; round++) {
            const int n = lengths[i];
            float *gate = random_floats((size_t)n, round == 0   ? 1e-3f
                                                   : round == 1 ? 8
                                                                : 120),
                  *up = random_floats((size_t)n, activation == TL_CLAMPED_SWIGLU ? 12 : 2), *expected = NULL;
            for (int c = 0; c < n_kernels; c++) {
                float *out = copy_of(gate, (size_t)n * sizeof(float));
                kernels[c]->glu[activation](out, up, n);
                if (c > 0) {
                    CHECK(first_difference(out, expected, (size_t)n * sizeof(float)) < 0, "%s %s: n = %d", name,
                          kernels[c]->name, n);
                    free(out);
                    continue;
                }
                expected = out;
                for (int j = 0; j < n; j++) { // roundings beside exp's: the sum, the quotient, the product
                    const int clamped_unit = activation == TL_CLAMPED_SWIGLU;
                    const double g = clamped_unit ? fmin((double)gate[j], 7) : (double)gate[j];
                    const double u = clamped_unit ? fmax(fmin((double)up[j], 7), -7) + 1 : (double)up[j];
                    const double root = sqrt(8 / acos(-1.0));
                    const double z = activation == TL_GELU ? root * (g + 0.044715 * g * g * g)
                                     : clamped_unit        ? 1.702 * g
                                                           : g;
                    const double exact = g / (1 + exp(-z)) * u;
                    const double clamped = fabs(g * u) * exp(-87); // exp stops before 88
                    // Roundings of the exponent, which e^-z turns into |z| times as much, as long as it counts: GELU's
                    // six, and of 1.702 and its product.
                    const int n_roundings = activation == TL_GELU ? 6 : clamped_unit ? 2 : 0;
                    const double exponent = expm1(gamma_of(n_roundings) * fmin(fabs(z), 88));
                    // u + 1 is rounded once, and where it nearly vanishes that is all of it: 8 * 2^-24 of |g|.
                    const double sum = clamped_unit ? fabs(g / (1 + exp(-z))) * 0x1p-21 : 0;
                    CHECK(fabs((double)out[j] - exact) <=
                              (EXP_ERROR + gamma_of(4) + exponent) * (fabs(exact) + clamped) + clamped + sum,
                          "%s scalar: %g, %g give %.9g, not %.9g", name, (double)gate[j], (double)up[j], (double)out[j],
                          exact);
                }
            }
            free(expected);
            free(gate);
            free(up);
        }
}

// A unit without a gate: ReLU squared, exactly; or xIELU in double. Beside the roundings of its sums there is that of
// e^x - 1, a few units of its own last place.
static void check_ungated(tl_activation activation) {
    static const float numbers[][TL_XIELU_NUMBERS] = {{0.8f, 0.8f, 0.5f, -1e-6f}, {0.3f, 1.7f, -0.2f, -0.5f}};
    for (int i = 0; i < COUNT(lengths); i++)
        for (int round = 0; round < 6; round++) {
            const int n = lengths[i];
            const float *a = numbers[round % 2];
            float *x = random_floats((size_t)n, round < 2 ? 1e-3f : round < 4 ? 4 : 200), *expected = NULL;
            for (int c = 0; c < n_kernels; c++) {
                float *out = copy_of(x, (size_t)n * sizeof(float));
                kernels[c]->glu[activation](out, a, n);
                if (c > 0) {
                    CHECK(first_difference(out, expected, (size_t)n * sizeof(float)) < 0, "unit %d %s: n = %d",
                          (int)activation, kernels[c]->name, n);
                    free(out);
                    continue;
                }
                expected = out;
                for (int j = 0; j < n; j++) {
                    if (activation == TL_RELU_SQUARED) {
                        CHECK(out[j] == (x[j] > 0 ? x[j] * x[j] : 0), "relu squared of %g is %.9g", (double)x[j],
                              (double)out[j]);
                        continue;
                    }
                    const double y = (double)x[j], linear = (double)a[2] * y, least = fmin(y, (double)a[3]);
                    const double curved = expm1(least) - y, alpha = (double)a[1];
                    const double exact = y > 0 ? (double)a[0] * y * y + linear : alpha * curved + linear;
                    const double sizes = y > 0 ? (double)a[0] * y * y + fabs(linear)
                                               : fabs(alpha) * (fabs(expm1(least)) + fabs(y)) + fabs(linear);
                    const double clamped = fabs(alpha) * exp(-87); // exp stops before that
                    CHECK(fabs((double)out[j] - exact) <= (EXP_ERROR + gamma_of(4)) * sizes + clamped + TINY,
                          "xielu scalar: %g gives %.9g, not %.9g", y, (double)out[j], exact);
                }
            }
            free(expected);
            free(x);
        }
}

// NaN comes through what clamps its numbers, at every place of a row; so does what is infinite through a cap, and squares that
// overflow through a norm.
static void check_bad_rows(void) {
    enum { N = 40 };
    for (int c = 0; c < n_kernels; c++)
        for (int at = 0; at < N; at++)
            for (int what = 0; what < 13;
                 what++) { // three gated units with a bad gate, with a bad up; caps; norms; others
                float *gate = random_floats(N, 5), *up = random_floats(N, 5);
                static const float capped[] = {NAN, INFINITY, -INFINITY};
                (what < 3 ? up : gate)[at] = what < 6 || what > 10 ? NAN : what < 9 ? capped[what - 6] : 1e20f;
                if (what < 6)
                    kernels[c]->glu[what % 3](gate, up, N);
                else if (what > 10)
                    kernels[c]->glu[what == 11 ? TL_RELU_SQUARED : TL_XIELU](gate, up, N);
                else if (what < 9)
                    kernels[c]->soft_cap(gate, 30, N);
                else
                    (what < 10 ? kernels[c]->rmsnorm : kernels[c]->layernorm)(gate, gate, up, 1e-5f, N);
                for (int i = 0; i < N; i++)
                    CHECK(isnan(gate[i]) == (i == at || what == 9 || what == 10),
                          "%s: what is bad at %d of %d gives %g at %d", kernels[c]->name, at, what, (double)gate[i], i);
                free(gate);
                free(up);
            }
}

// What soft_cap may be off by: exp's error and a few roundings of numbers up to 1, times the cap. The exponent's own
// roundings weigh |y| / cosh(y)^2 < 1/2.
static double cap_error(float cap) { return (double)cap * (EXP_ERROR + gamma_of(8)); }

static void check_soft_cap(void) {
    static const float caps[] = {0.5f, 30, 50};
    for (int i = 0; i < COUNT(lengths) * COUNT(caps); i++) {
        const int n = lengths[i / COUNT(caps)];
        const float cap = caps[i % COUNT(caps)];
        float *x = random_floats((size_t)n, i % 2 ? 100 : 1000), *expected = NULL;
        for (int c = 0; c < n_kernels; c++) {
            float *out = copy_of(x, (size_t)n * sizeof(float));
            kernels[c]->soft_cap(out, cap, n);
            if (c > 0) {
                CHECK(first_difference(out, expected, (size_t)n * sizeof(float)) < 0, "soft_cap %s: n = %d",
                      kernels[c]->name, n);
                free(out);
                continue;
            }
            expected = out;
            for (int j = 0; j < n; j++) {
                const double exact = (double)cap * tanh((double)x[j] / (double)cap);
                CHECK(fabs((double)out[j] - exact) <= cap_error(cap), "soft_cap scalar: %g becomes %.9g, not %.9g",
                      (double)x[j], (double)out[j], exact);
            }
        }
        free(expected);
        free(x);
    }
}

static void check_rope(void) {
    static const struct {
        int head_dim, rope_dim, n_heads;
    } shapes[] = {{8, 8, 1},   {8, 0, 2},   {8, 2, 5},   {20, 20, 3}, {20, 6, 2},    {20, 18, 4},  {64, 64, 2},
                  {64, 32, 1}, {80, 80, 3}, {80, 50, 2}, {80, 32, 2}, {128, 128, 2}, {128, 66, 1}, {128, 126, 1}};
    for (int i = 0; i < COUNT(shapes) * 2; i++) {
        const int d = shapes[i / 2].head_dim, half = shapes[i / 2].rope_dim / 2, heads = shapes[i / 2].n_heads;
        const size_t n = (size_t)d * (size_t)heads;
        const float scale = i % 2 ? 0.125f * 1.1f : 1;
        float *x = random_floats(n, 4), *cosines = exactly((size_t)half * sizeof(float)),
              *sines = exactly((size_t)half * sizeof(float)), *expected = NULL;
        for (int j = 0; j < half; j++) {
            const double angle = 40 * (double)random_float();
            cosines[j] = (float)cos(angle);
            sines[j] = (float)sin(angle);
        }
        for (int c = 0; c < n_kernels; c++) {
            float *out = copy_of(x, n * sizeof(float));
            kernels[c]->rope(out, cosines, sines, heads, d, 2 * half, scale);
            if (c > 0) {
                const long at = first_difference(out, expected, n * sizeof(float));
                CHECK(at < 0, "rope %s: %d of %d dimensions, number %ld is %.9g, not %.9g", kernels[c]->name, 2 * half,
                      d, at, (double)out[at], (double)expected[at]);
                free(out);
                continue;
            }
            expected = out;
            for (size_t at = 0; at < n; at++) {
                const int j = (int)(at % (size_t)d);
                double exact = (double)x[at], size = fabs(exact);
                if (j < 2 * half) {
                    const int pair = j % half;
                    const double other = (double)x[j < half ? at + (size_t)half : at - (size_t)half];
                    const double along = exact * (double)cosines[pair];
                    const double across = other * (double)sines[pair];
                    exact = j < half ? along - across : along + across;
                    size = fabs(along) + fabs(across);
                }
                exact *= (double)scale; // roundings: one product, the fma, the scale
                CHECK(fabs((double)out[at] - exact) <= gamma_of(3) * size * (double)scale + TINY,
                      "rope scalar: %d of %d dimensions, number %zu is %.9g, not %.9g", 2 * half, d, at,
                      (double)out[at], exact);
            }
        }
        free(expected);
        free(x);
        free(cosines);
        free(sines);
    }
}

// ---- attention
static const int head_dims[] = {8, 20, 32, 64, 80, 128}, kv_types[] = {0, 1, 8};

// Q8_0 caches are for heads of whole groups.
static int has_type(int head_dim, int type) { return type != 8 || head_dim % TL_Q == 0; }

static int stride_of(int head_dim) { return (head_dim + 15) / 16 * 16; }

#define Q8_BYTES 34 // of a block in the file: an f16 scale, 32 int8
static size_t key_bytes(int head_dim, int type) {
    return TL_PAGE * (type == 8 ? (size_t)(head_dim / TL_Q) * Q8_BYTES : (size_t)head_dim * (type == 0 ? 4 : 2));
}
static size_t value_bytes(int head_dim, int type) {
    return type == 8 ? key_bytes(head_dim, type) : key_bytes(stride_of(head_dim), type);
}

// Where a number lies in a page's keys [4][head_dim][16].
static size_t key_at(int slot, int d, int head_dim) {
    return ((size_t)(slot / 16) * (size_t)head_dim + (size_t)d) * 16 + (size_t)(slot % 16);
}

static void put_number(uint8_t *page, size_t at, float x, int type) {
    const unsigned short half = tl_f32_to_f16(x);
    if (type == 0)
        memcpy(page + 4 * at, &x, 4);
    else
        memcpy(page + 2 * at, &half, 2);
}

static float get_number(const uint8_t *page, size_t at, int type) {
    float x;
    unsigned short half;
    memcpy(&x, page + (type == 0 ? 4 * at : 0), 4);
    memcpy(&half, page + 2 * at, 2);
    return type == 0 ? x : tl_f16_to_f32(half);
}

static float get_key(const uint8_t *page, int slot, int d, int head_dim, int type) {
    if (type != 8) return get_number(page, key_at(slot, d, head_dim), type);
    const tl_format *f = tl_format_of(8);
    float group[TL_Q];
    f->unpack(group, page + ((slot / 16) * (head_dim / TL_Q) + d / TL_Q) * f->panel_bytes, slot % 16);
    return group[d % TL_Q];
}

static float get_value(const uint8_t *page, int slot, int d, int head_dim, int type) {
    if (type != 8) return get_number(page, (size_t)(slot * stride_of(head_dim) + d), type);
    const uint8_t *block = page + (slot * (head_dim / TL_Q) + d / TL_Q) * Q8_BYTES;
    unsigned short scale;
    memcpy(&scale, block, 2);
    return tl_f16_to_f32(scale) * (float)(int8_t)block[2 + d % TL_Q];
}

static const int slots[] = {0, 1, 15, 16, 37, 48, 63};

static void check_stored(int c, const char *what, const uint8_t *page, const uint8_t *expected, size_t n, int d,
                         int slot, int type) {
    CHECK(!memcmp(page, expected, n), "store_kv %s: %s, head_dim %d, slot %d, type %d", kernels[c]->name, what, d, slot,
          type);
}

// Float types: the numbers in their places, zeros behind a value, nothing else.
static void check_store_floats(int d, int type, int slot) {
    const size_t stride = (size_t)stride_of(d), k_bytes = key_bytes(d, type), v_bytes = value_bytes(d, type);
    float *k = random_floats((size_t)d, 1e3f), *v = random_floats((size_t)d, 1e-6f); // f16 subnormals too
    uint8_t *k_expected = exactly(k_bytes), *v_expected = exactly(v_bytes);
    memset(k_expected, 0xa5, k_bytes);
    memset(v_expected, 0xa5, v_bytes);
    for (int j = 0; j < d; j++) put_number(k_expected, key_at(slot, j, d), k[j], type);
    for (size_t j = 0; j < stride; j++)
        put_number(v_expected, (size_t)slot * stride + j, j < (size_t)d ? v[j] : 0, type);
    for (int c = 0; c < n_kernels; c++) {
        uint8_t *k_page = exactly(k_bytes), *v_page = exactly(v_bytes);
        memset(k_page, 0xa5, k_bytes);
        memset(v_page, 0xa5, v_bytes);
        kernels[c]->store_kv(k_page, v_page, k, v, slot, d, type);
        check_stored(c, "keys", k_page, k_expected, k_bytes, d, slot, type);
        check_stored(c, "values", v_page, v_expected, v_bytes, d, slot, type);
        free(k_page);
        free(v_page);
    }
    free(k_expected);
    free(v_expected);
    free(k);
    free(v);
}

// Keys of a page [64] of blocks [head_dim / 32], packed like weights.
static void pack_keys(uint8_t *page, const uint8_t *blocks, int head_dim) {
    const tl_format *f = tl_format_of(8);
    const int groups = head_dim / TL_Q;
    for (int i = 0; i < 4 * groups; i++) {
        const uint8_t *rows[TL_ROWS];
        for (int r = 0; r < TL_ROWS; r++) rows[r] = blocks + ((i / groups * 16 + r) * groups + i % groups) * Q8_BYTES;
        f->pack(page + i * f->panel_bytes, rows);
    }
}

// Q8_0: a token's key and value are the same vector here. Its blocks, seen in the values, are what the vector rounds to
// (scale = largest / 127 as f16; the inverse of the unrounded scale and the product are rounded before the number is);
// and keys are those blocks packed like weights, among other tokens' that stay.
static void check_store_blocks(int d, int slot) {
    const int groups = d / TL_Q;
    const size_t n = key_bytes(d, 8), at = (size_t)(slot * groups) * Q8_BYTES;
    float *x = random_floats((size_t)d, 5);
    uint8_t *before = exactly(n), *k_before = exactly(n), *k_expected = exactly(n), *v_expected = NULL;
    if (slot % 2) memset(x, 0, TL_Q * sizeof *x);
    for (size_t i = 0; i < n; i++) before[i] = (uint8_t)(random_bits() >> 13);
    pack_keys(k_before, before, d);
    for (int c = 0; c < n_kernels; c++) {
        uint8_t *k_page = copy_of(k_before, n), *v_page = copy_of(before, n);
        kernels[c]->store_kv(k_page, v_page, x, x, slot, d, 8);
        if (c == 0) {
            for (int g = 0; g < groups; g++) {
                const uint8_t *block = v_page + at + g * Q8_BYTES;
                float largest = 0;
                unsigned short scale;
                memcpy(&scale, block, 2);
                for (int i = 0; i < TL_Q; i++) largest = fmaxf(largest, fabsf(x[g * TL_Q + i]));
                CHECK(scale == tl_f32_to_f16(largest / 127), "store_kv scalar: scale %04x for %g", scale,
                      (double)largest);
                for (int i = 0; i < TL_Q; i++) {
                    const double y = largest > 0 ? (double)x[g * TL_Q + i] * 127 / (double)largest : 0;
                    const int number = (int8_t)block[2 + i];
                    CHECK(abs(number) <= 127 && fabs(number - y) <= 0.5 + gamma_of(3) * fabs(y),
                          "store_kv scalar: %g of %g becomes %d", (double)x[g * TL_Q + i], (double)largest, number);
                }
            }
            v_expected = copy_of(before, n);
            memcpy(v_expected + at, v_page + at, (size_t)groups * Q8_BYTES);
            pack_keys(k_expected, v_expected, d);
        }
        check_stored(c, "keys", k_page, k_expected, n, d, slot, 8);
        check_stored(c, "values", v_page, v_expected, n, d, slot, 8);
        free(k_page);
        free(v_page);
    }
    free(before);
    free(k_before);
    free(k_expected);
    free(v_expected);
    free(x);
}

static void check_store_kv(void) {
    for (int i = 0; i < COUNT(head_dims) * COUNT(slots); i++) {
        const int slot = slots[i % COUNT(slots)], d = head_dims[i / COUNT(slots)];
        check_store_floats(d, 0, slot);
        check_store_floats(d, 1, slot);
        if (has_type(d, 8)) check_store_blocks(d, slot);
    }
}

// A segment's pages hold numbers where some column looks and NaN elsewhere; pages that none looks at are not there.
static void fill_pages(tl_segment *s, int from, int to) {
    const int d = s->head_dim;
    for (int page = from / TL_PAGE; page <= (to - 1) / TL_PAGE; page++) {
        uint8_t *keys = exactly(key_bytes(d, s->type)), *values = exactly(value_bytes(d, s->type));
        memset(keys, 0xff, key_bytes(d, s->type)); // NaN, or int8 with a scale of NaN
        memset(values, 0xff, value_bytes(d, s->type));
        for (int slot = 0; slot < TL_PAGE; slot++) {
            if (page * TL_PAGE + slot < from || page * TL_PAGE + slot >= to) continue;
            float *k = random_floats((size_t)d, 1), *v = random_floats((size_t)d, 1);
            kernels[0]->store_kv(keys, values, k, v, slot, d, s->type);
            free(k);
            free(v);
        }
        s->k[page] = keys;
        s->v[page] = values;
    }
}

static void make_query(tl_segment *s, int c, float size) {
    const size_t d = (size_t)s->head_dim;
    s->q[c] = random_floats(d, size);
    if (s->type != 8) return;
    int8_t *q8 = exactly(d);
    tl_q_group *groups = exactly(d / TL_Q * sizeof *groups);
    kernels[0]->quantize(q8, groups, s->q[c], (int)d);
    s->q8[c] = q8;
    s->groups[c] = groups;
}

static void free_query(tl_segment *s, int c) {
    free((void *)(uintptr_t)s->q[c]);
    free((void *)(uintptr_t)s->q8[c]);
    free((void *)(uintptr_t)s->groups[c]);
}

// One column against float64, given its own maximum. A score's roundings: an fma a dimension, or for Q8_0 a product and
// an fma a group. An exponent is off by that and the subtraction's rounding, so p by expm1 of it and by exp's own error;
// a sum then has at most 256 fmas (values), or 16 additions and 4 levels of the tree (weights).
static void check_column(const tl_segment *s, int c) {
    const int roundings = s->type == 8 ? s->head_dim / TL_Q + 1 : s->head_dim;
    double score[TL_SEGMENT] = {0}, p[TL_SEGMENT] = {0}, p_error[TL_SEGMENT] = {0}, sum = 0, sum_error = 0,
           top = -INFINITY, top_error = 0;
    for (int i = s->from[c]; i < s->to[c]; i++) {
        double size = 0;
        for (int d = 0; d < s->head_dim; d++) {
            const double q =
                s->type == 8 ? (double)s->q8[c][d] * (double)s->groups[c][d / TL_Q].scale : (double)s->q[c][d];
            const double x = q * (double)get_key(s->k[i / TL_PAGE], i % TL_PAGE, d, s->head_dim, s->type);
            score[i] += x;
            size += fabs(x);
        }
        double error = gamma_of(roundings) * size + TINY;
        if (s->cap > 0) { // it brings scores nearer to each other
            score[i] = (double)s->cap * tanh(score[i] / (double)s->cap);
            error += cap_error(s->cap);
        }
        const double down = score[i] - (double)s->max[c];
        p[i] = exp(down);
        p_error[i] = p[i] * (expm1(error + UNIT * (fabs(down) + error)) * (1 + EXP_ERROR) + EXP_ERROR) + exp(-87);
        sum += p[i];
        sum_error += p_error[i] + gamma_of(20) * (p[i] + p_error[i]);
        top = fmax(top, score[i]);
        top_error = fmax(top_error, error);
    }
    CHECK(fabs((double)s->max[c] - top) <= top_error, "segment scalar: column %d's maximum is %.9g, not %.9g", c,
          (double)s->max[c], top);
    CHECK(fabs((double)s->sum[c] - sum) <= sum_error, "segment scalar: column %d's sum is %.9g, not %.9g", c,
          (double)s->sum[c], sum);
    for (int d = 0; d < s->v_stride; d++) {
        double exact = 0, bound = TINY;
        for (int i = s->from[c]; i < s->to[c]; i++) {
            const double v = (double)get_value(s->v[i / TL_PAGE], i % TL_PAGE, d, s->head_dim, s->type);
            exact += p[i] * v;
            bound += (p_error[i] + gamma_of(TL_SEGMENT) * (p[i] + p_error[i])) * fabs(v);
        }
        CHECK(fabs((double)s->out[c][d] - exact) <= bound,
              "segment scalar: head_dim %d, type %d, column %d of %d, %d..%d: number %d is %.9g, not %.9g", s->head_dim,
              s->type, c, s->n_columns, s->from[c], s->to[c], d, (double)s->out[c][d], exact);
    }
}

static void run_segment(tl_segment *s, const tl_kernels *k) {
    for (int c = 0; c < s->n_columns; c++) s->out[c] = exactly((size_t)s->v_stride * sizeof(float));
    k->segment(s);
}

static void check_same_column(const tl_segment *s, int c, const tl_segment *t, int e, const char *what) {
    CHECK(!memcmp(&s->max[c], &t->max[e], 4) && !memcmp(&s->sum[c], &t->sum[e], 4) &&
              !memcmp(s->out[c], t->out[e], (size_t)s->v_stride * sizeof(float)),
          "segment %s: head_dim %d, type %d, column %d of %d, %d..%d: maximum %.9g and %.9g, sum %.9g and %.9g", what,
          s->head_dim, s->type, e, t->n_columns, t->from[e], t->to[e], (double)s->max[c], (double)t->max[e],
          (double)s->sum[c], (double)t->sum[e]);
}

static void free_outputs(tl_segment *s) {
    for (int c = 0; c < s->n_columns; c++) free(s->out[c]);
}

// ranges: 0 as in decoding and prefill (from 0, ends near each other), 1 a window (starts differ as well),
// 2 anything. Each column alone must give the same bits as among the others.
static void check_segment(int head_dim, int type, int n_columns, int ranges, float query_size) {
    tl_segment s = {.n_columns = n_columns, .head_dim = head_dim, .v_stride = stride_of(head_dim), .type = type};
    if (n_columns % 4 == 1) s.cap = 20;
    int from = TL_SEGMENT, to = 0;
    const int end = 1 + random_below(TL_SEGMENT);
    for (int c = 0; c < n_columns; c++) {
        make_query(&s, c, query_size);
        s.to[c] = ranges == 2 ? 1 + random_below(TL_SEGMENT) : end + c < TL_SEGMENT ? end + c : TL_SEGMENT;
        s.from[c] = ranges == 0 ? 0 : ranges == 1 ? s.to[c] / 3 : random_below(s.to[c]);
        from = s.from[c] < from ? s.from[c] : from;
        to = s.to[c] > to ? s.to[c] : to;
    }
    fill_pages(&s, from, to);
    tl_segment expected = s;
    run_segment(&expected, kernels[0]);
    for (int c = 0; c < n_columns; c++) check_column(&expected, c);
    for (int i = 0; i < n_kernels; i++) {
        tl_segment together = s;
        memcpy(together.next_k, s.k, sizeof s.k); // asking for pages changes no number
        memcpy(together.next_v, s.v, sizeof s.v);
        run_segment(&together, kernels[i]);
        for (int c = 0; c < n_columns; c++) {
            tl_segment alone = s;
            alone.n_columns = 1;
            alone.q[0] = s.q[c];
            alone.q8[0] = s.q8[c];
            alone.groups[0] = s.groups[c];
            alone.from[0] = s.from[c];
            alone.to[0] = s.to[c];
            run_segment(&alone, kernels[i]);
            check_same_column(&together, c, &expected, c, kernels[i]->name);
            check_same_column(&alone, 0, &expected, c, "alone");
            free_outputs(&alone);
        }
        free_outputs(&together);
    }
    free_outputs(&expected);
    for (int c = 0; c < n_columns; c++) free_query(&s, c);
    for (int i = 0; i < TL_SEGMENT / TL_PAGE; i++) {
        free((void *)(uintptr_t)s.k[i]);
        free((void *)(uintptr_t)s.v[i]);
    }
}

static void check_segments(void) {
    for (int i = 0; i < COUNT(head_dims) * COUNT(kv_types); i++) {
        const int d = head_dims[i / COUNT(kv_types)], type = kv_types[i % COUNT(kv_types)];
        for (int n_columns = 1; n_columns <= TL_COLUMNS && has_type(d, type); n_columns++)
            for (int ranges = 0; ranges < 3; ranges++)
                check_segment(d, type, n_columns, ranges, n_columns % 3 == 0 ? 30 : 1);
    }
}

// A query, a key or a value that is no number: so is what becomes of it, for the columns that see it. (A key may be
// infinite: a score of -inf weighs nothing.)
static void check_bad_segment(int type, int what, float bad, const tl_kernels *kernel) {
    const int d = 64, to = 1 + random_below(TL_SEGMENT), n_columns = 1 + random_below(TL_COLUMNS),
              at = random_below(to);
    tl_segment s = {.n_columns = n_columns, .head_dim = d, .v_stride = d, .type = type};
    for (int c = 0; c < n_columns; c++) {
        make_query(&s, c, 1);
        s.to[c] = to;
    }
    fill_pages(&s, 0, to);
    float *k = random_floats((size_t)d, 1), *v = random_floats((size_t)d, 1), *q = random_floats((size_t)d, 1);
    (what == 0 ? q : what == 1 ? k : v)[random_below(d)] = bad;
    free_query(&s, 0);
    s.q[0] = q;
    if (type == 8) {
        int8_t *q8 = exactly((size_t)d);
        tl_q_group *groups = exactly((size_t)d / TL_Q * sizeof *groups);
        kernel->quantize(q8, groups, q, d);
        s.q8[0] = q8;
        s.groups[0] = groups;
    }
    kernel->store_kv((uint8_t *)(uintptr_t)s.k[at / TL_PAGE], (uint8_t *)(uintptr_t)s.v[at / TL_PAGE], k, v,
                     at % TL_PAGE, d, type);
    run_segment(&s, kernel);
    for (int c = 0; c < n_columns; c++) {
        float *out = random_floats((size_t)d, 1), max = 1, sum = 3;
        kernel->merge(out, &max, &sum, s.out[c], s.max[c], s.sum[c], d);
        int n_finite = 0;
        for (int i = 0; i < d; i++) n_finite += isfinite(out[i] / sum) != 0;
        const int expected = what == 0 ? (c == 0 ? 0 : d) : what == 1 ? 0 : type == 8 ? d - TL_Q : d - 1;
        CHECK(n_finite == expected, "segment %s: type %d, %g in the %s: column %d of %d gives %d numbers, not %d",
              kernel->name, type, (double)bad,
              what == 0   ? "query"
              : what == 1 ? "key"
                          : "value",
              c, n_columns, n_finite, expected);
        free(out);
        free_query(&s, c);
    }
    free_outputs(&s);
    for (int i = 0; i < TL_SEGMENT / TL_PAGE; i++) {
        free((void *)(uintptr_t)s.k[i]);
        free((void *)(uintptr_t)s.v[i]);
    }
    free(k);
    free(v);
}

static void check_bad_segments(void) {
    for (int i = 0; i < n_kernels * COUNT(kv_types) * 3 * 8; i++)
        check_bad_segment(kv_types[i % COUNT(kv_types)], i / 3 % 3, i % 2 || i / 3 % 3 == 1 ? NAN : INFINITY,
                          kernels[i / 9 % n_kernels]);
}

static void check_merge(void) {
    static const struct {
        float max, sum, part_max, part_sum;
    } cases[] = {{-INFINITY, 0, 1.5f, 40}, {-INFINITY, 0, -300, 1}, {2, 10, 2, 20},        {2.5f, 10, 1.25f, 20},
                 {-3, 1, 4, 100},          {-80, 3, 60, 2},         {500, 256, -500, 256}, {0.1f, 5, 0.3f, 1}};
    for (int i = 0; i < COUNT(cases) * COUNT(head_dims); i++) {
        const int n = stride_of(head_dims[i / COUNT(cases)]), at = i % COUNT(cases);
        float *running = random_floats((size_t)n, isinf(cases[at].max) ? 0 : 3), *part = random_floats((size_t)n, 3),
              *expected = NULL, expected_max = 0, expected_sum = 0;
        for (int c = 0; c < n_kernels; c++) {
            float *out = copy_of(running, (size_t)n * sizeof(float)), max = cases[at].max, sum = cases[at].sum;
            kernels[c]->merge(out, &max, &sum, part, cases[at].part_max, cases[at].part_sum, n);
            if (c > 0) {
                CHECK(first_difference(out, expected, (size_t)n * sizeof(float)) < 0 && max == expected_max &&
                          sum == expected_sum,
                      "merge %s: case %d", kernels[c]->name, at);
                free(out);
                continue;
            }
            expected = out;
            expected_max = max;
            expected_sum = sum;
            const double top = fmax((double)cases[at].max, (double)cases[at].part_max),
                         old = (double)cases[at].max - top, new = (double)cases[at].part_max - top;
            CHECK((double)max == top, "merge scalar: case %d's maximum is %g, not %g", at, (double)max, top);
            for (int d = -1; d < n; d++) { // -1: the sum
                const double a = exp(old) * (double)(d < 0 ? cases[at].sum : running[d]),
                             b = exp(new) * (double)(d < 0 ? cases[at].part_sum : part[d]),
                             got = (double)(d < 0 ? sum : out[d]);
                // The subtraction's rounding in the exponent, exp's own error, the product and the fma.
                const double a_bound = a == 0 ? 0 : fabs(a) * (expm1(UNIT * -old) + EXP_ERROR + gamma_of(3)),
                             b_bound = fabs(b) * (expm1(UNIT * -new) + EXP_ERROR + gamma_of(3));
                const double clamped = 256 * exp(-87);
                CHECK(fabs(got - (a + b)) <= a_bound + b_bound + clamped,
                      "merge scalar: case %d, number %d is %.9g, not %.9g", at, d, got, a + b);
            }
        }
        free(expected);
        free(running);
        free(part);
    }
}

// ---- floats -> BF16

// The nearest bfloat16, of two the even one; beyond the largest is where 2^128 would be. NaN stays one, made quiet.
static uint16_t to_bf16(uint32_t bits) {
    const uint16_t toward_zero = (uint16_t)(bits >> 16), sign = toward_zero & 0x8000;
    if ((bits & 0x7fffffff) > 0x7f800000) return toward_zero | 0x40;
    if ((bits & 0x7fffffff) == 0x7f800000) return toward_zero;
    double at[3]; // the number, the bfloat16s on both sides of it
    const uint32_t of[3] = {bits & 0x7fffffff, bits & 0x7fff0000, (bits & 0x7fff0000) + 0x10000};
    for (int i = 0; i < 3; i++) {
        float x;
        memcpy(&x, &of[i], 4);
        at[i] = of[i] == 0x7f800000 ? 0x1p128 : (double)x;
    }
    const double below = at[0] - at[1], above = at[2] - at[0];
    return (uint16_t)(sign | (of[below < above || (below == above && !(toward_zero & 1)) ? 1 : 2] >> 16));
}

// Every upper half with lower halves around all that matters, at widths that are no multiple of 16 as well.
static void check_to_bf16(void) {
    static const uint16_t lower[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234};
    for (uint32_t first = 0; first < 0x10000; first += 64) {
        const size_t n = 64 * COUNT(lower) - first / 64 % 33;
        float *x = exactly(n * sizeof(float));
        uint16_t *expected = exactly(n * 2);
        for (size_t i = 0; i < n; i++) {
            const uint32_t bits = (first + (uint32_t)i / COUNT(lower)) << 16 | lower[i % COUNT(lower)];
            memcpy(x + i, &bits, 4);
            expected[i] = to_bf16(bits);
        }
        for (int c = 0; c < n_kernels; c++) {
            uint8_t *got = exactly(n * 2);
            kernels[c]->to_blocks[TL_INDEX_bf16](got, x, n, NULL);
            for (size_t i = 0; i < n; i++) {
                uint16_t h;
                memcpy(&h, got + 2 * i, 2);
                CHECK(h == expected[i], "bf16 %s: %a becomes %04x, not %04x", kernels[c]->name, (double)x[i], h,
                      expected[i]);
            }
            free(got);
        }
        free(expected);
        free(x);
    }
}

int main(void) {
    find_kernels();
    check_to_bf16();
    check_rmsnorm();
    check_layernorm();
    check_quantize();
    check_glu(TL_SILU);
    check_glu(TL_GELU);
    check_glu(TL_CLAMPED_SWIGLU);
    check_ungated(TL_RELU_SQUARED);
    check_ungated(TL_XIELU);
    check_soft_cap();
    check_bad_rows();
    check_rope();
    check_store_kv();
    check_merge();
    check_segments();
    check_bad_segments();
    check_products();
    check_bad_products();
    return 0;
}
