// cpu/products.c: rows of activations times packed matrices: norm and rounding first, then the products cut into units of
// (panels x tokens) that belong to one thread each. Includes cpu.h; the arithmetic is in kernels/matmul.inc
// and kernels/rows.inc.
#include "cpu/cpu.h"

#define BLOCK_BYTES  (512 << 10) // weights a unit reads: about half of L2, so that they stay there for all its tokens
#define MOST_TOKENS  96          // of a unit: what it writes and reads again (gate and up) stays in L2, too
#define FEWEST_TOKEN 48          // tokens a unit is not cut below
#define MOST_TILED   176         // of a unit whose weights are unpacked for a matrix unit: once for all of its tokens

typedef struct job {
    tl_cpu_run *run;
    const float *x;      // [.., in.k]
    const int32_t *rows; // which of x, or NULL
    const tl_norm *norm; // or NULL
    int quantize;        // a matrix wants int8
    int n_tokens, token_block, n_token_blocks;
    const tl_product *products;
    int block[TL_MAX_PRODUCTS], first_unit[TL_MAX_PRODUCTS + 1]; // panels a unit, units before a product
} job;

static void prepare_row(void *data, int t, int thread) {
    (void)thread;
    job *j = data;
    tl_activations *in = &j->run->in;
    const size_t k = (size_t)in->k, row = (size_t)t;
    const float *x = j->x + (j->rows ? (size_t)j->rows[t] : row) * k;
    if (j->norm) {
        float *normed = j->run->normed + row * k;
        tl_cpu_norm(j->norm, normed, x, in->k);
        x = normed;
    }
    if (!j->quantize) return;
    tl_isa()->quantize(in->q + row * k, in->groups + row * (k / TL_Q), x, in->k);
    if (in->tiles) tl_isa()->arrange(in, t);
}

void tl_cpu_multiply(const tl_product *p, int first, int last, int from, int to) {
    tl_isa()->matmul[p->w->format - tl_formats](p, first, last, from, to);
    if (!p->up && !p->xielu) return;
    if (p->up) tl_isa()->matmul[p->up->w->format - tl_formats](p->up, first, last, from, to);
    const int row = first * TL_ROWS, n = tl_min(last * TL_ROWS, p->w->rows) - row;
    for (size_t t = (size_t)from; t < (size_t)to; t++)
        tl_isa()->glu[p->activation](p->out + t * p->stride + row, p->up ? p->up->out + t * p->stride + row : p->xielu,
                                     n);
}

int tl_cpu_block(const tl_matrix *w, int share) {
    const int most = (int)(BLOCK_BYTES / (w->n_bytes / (size_t)tl_panels(w) + 1));
    return tl_max(1, tl_min(most, share) / TL_GROUP) * TL_GROUP;
}

static void product_unit(void *data, int unit, int thread) {
    (void)thread;
    const job *j = data;
    int i = 0;
    while (unit >= j->first_unit[i + 1]) i++;
    const tl_product *p = &j->products[i];
    const int within = unit - j->first_unit[i], from = within % j->n_token_blocks * j->token_block;
    const int to = tl_min(from + j->token_block, j->n_tokens), first = within / j->n_token_blocks * j->block[i];
    const int last = tl_min(first + j->block[i], tl_panels(p->w));
    tl_cpu_multiply(p, first, last, from, to);
}

// Sizes the units: a block of weights that stays in L2, smaller where that leaves too few units for the threads.
static void cut(job *j, int n_products, int threads) {
    const int wanted = threads == 1 ? 1 : TL_UNITS_THREAD * threads;
    int panels = 0;
    for (int i = 0; i < n_products; i++) panels += tl_panels(j->products[i].w);
    const int tiled = j->run->in.tiles && j->quantize, step = tiled ? 16 : 6; // tokens at once
    const int most = tiled ? MOST_TILED : MOST_TOKENS, n_blocks = (j->n_tokens + most - 1) / most;
    j->token_block = tiled ? (j->n_tokens / n_blocks + step - 1) / step * step : tl_min(j->n_tokens, most);
    while (j->token_block > FEWEST_TOKEN && panels / TL_GROUP * (j->n_tokens / j->token_block) < wanted)
        j->token_block = (j->token_block / 2 + step - 1) / step * step;
    j->n_token_blocks = (j->n_tokens + j->token_block - 1) / j->token_block;
    for (int i = 0; i < n_products; i++) {
        const tl_matrix *w = j->products[i].w;
        const int share = panels * j->n_token_blocks / wanted;
        j->block[i] = share < TL_GROUP ? 2 : tl_cpu_block(w, share); // 32 rows, never fewer
        j->first_unit[i + 1] = j->first_unit[i] + (tl_panels(w) + j->block[i] - 1) / j->block[i] * j->n_token_blocks;
    }
}

void tl_cpu_observe(const tl_matrix *w, const float *x, int n) {
    if (!w->seen) return;
    for (int t = 0; t < n; t++, x += w->k)
        for (int i = 0; i < w->k; i++) w->seen[i] += (double)x[i] * (double)x[i];
    w->seen[w->k] += n;
}

void tl_cpu_products(tl_cpu_run *r, const float *x, const int32_t *rows, int n, const tl_norm *norm,
                     tl_product *products, int n_products) {
    const int threads = r->base.batch->threads;
    tl_product ungated = products[0];
    if (!ungated.w->data) { // a unit without a gate: up goes where the gate would
        ungated.w = products[0].up->w;
        ungated.up = NULL;
        products = &ungated;
    }
    if (norm && !norm->weight) norm = NULL;
    job j = {.run = r, .x = x, .rows = rows, .norm = norm, .n_tokens = n, .products = products};
    r->in.x = norm ? r->normed : x;
    r->in.k = products[0].w->k;
    r->in.n_rows = n;
    for (int i = 0; i < n_products; i++)
        for (tl_product *p = &products[i]; p; p = p->up) {
            p->in = &r->in;
            j.quantize |= !p->w->format->is_float;
        }
    if (norm || j.quantize) tl_parallel(n < TL_FEW_TOKENS ? 1 : threads, n, prepare_row, &j);
    for (int i = 0; i < n_products; i++)
        for (const tl_product *p = &products[i]; p; p = p->up) tl_cpu_observe(p->w, r->in.x, n);
    cut(&j, n_products, threads);
    tl_parallel(threads, j.first_unit[n_products], product_unit, &j);
}
