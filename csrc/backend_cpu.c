// backend_cpu.c: the CPU's operations. Each is a few parallel loops over rows of activations, panels of weights or tiles of
// queries; the arithmetic is the instruction set's (isa/isa.h), the buffers are cpu_run.c's. Includes cpu.h.
#include "cpu.h"
#include <math.h>
#include <string.h>

#define BLOCK_BYTES (512 << 10) // weights a unit reads: about half of L2, so that they stay there for all its tokens

static void embed_token(void *data, int t, int thread) {
    (void)thread;
    tl_run *run = data;
    const size_t dim = (size_t)run->model->config.dim;
    if (run->batch->tokens)
        tl_cpu_unpack_row(&run->model->embedding, run->batch->tokens[t], run->x + (size_t)t * dim);
    else
        memcpy(run->x + (size_t)t * dim, run->batch->x + (size_t)t * dim, dim * sizeof(float));
}

static void cpu_embed(tl_run *run) { tl_parallel(run->batch->threads, run->batch->n, embed_token, run); }

// ---- products --------------------------------------------------------------------------------------------------------

typedef struct prepare_job { // rows of activations on their way into products
    tl_cpu_run *run;
    const float *x;      // [.., in.k]
    const int32_t *rows; // which of x, or NULL
    const tl_norm *norm; // or NULL
    int quantize;
} prepare_job;

static void prepare_row(void *data, int t, int thread) {
    (void)thread;
    prepare_job *job = data;
    tl_activations *in = &job->run->in;
    const int k = in->k;
    const float *x = job->x + (size_t)(job->rows ? job->rows[t] : t) * (size_t)k;
    if (job->norm) {
        float *normed = job->run->normed + (size_t)t * (size_t)k;
        tl_isa()->rmsnorm(normed, x, job->norm->weight, job->norm->eps, k);
        x = normed;
    }
    if (job->quantize)
        tl_isa()->quantize(in->q + (size_t)t * (size_t)k, in->scale + (size_t)t * (size_t)(k / TL_Q),
                           in->sums + (size_t)t * (size_t)(k / TL_Q * 2), x, k);
}

// run->in = rows of x, normed, rounded to int8 where one of the matrices wants that.
static void prepare(tl_cpu_run *r, const float *x, const tl_norm *norm, const int32_t *rows, int n, int k, int quantize) {
    prepare_job job = {r, x, rows, norm, quantize};
    r->in.x = norm ? r->normed : x;
    r->in.k = k;
    if (norm || quantize) tl_parallel(n < 4 ? 1 : r->base.batch->threads, n, prepare_row, &job);
}

typedef struct product_job {
    tl_product products[3];
    int n_products, n_tokens, token_block, n_token_blocks;
    int panels[3], block[3], first_unit[4]; // panels of a product, panels a unit, units before it
    int glu;                                // the second product is the first one's gate: same units
} product_job;

static void product_unit(void *data, int unit, int thread) {
    (void)thread;
    const product_job *job = data;
    int i = 0;
    while (unit >= job->first_unit[i + 1]) i++;
    const int within = unit - job->first_unit[i], from = within % job->n_token_blocks * job->token_block;
    const int first = within / job->n_token_blocks * job->block[i], last = tl_min(first + job->block[i], job->panels[i]);
    const int to = tl_min(from + job->token_block, job->n_tokens);
    const tl_product *p = &job->products[i];
    tl_isa()->matmul[p->w->format - tl_formats](p, first, last, from, to);
    if (!job->glu) return;
    const tl_product *up = &job->products[1];
    tl_isa()->matmul[up->w->format - tl_formats](up, first, last, from, to);
    const int row = first * TL_ROWS, n = tl_min(last * TL_ROWS, p->w->rows) - row;
    for (int t = from; t < to; t++)
        tl_isa()->silu_mul(p->out + (size_t)t * p->stride + row, up->out + (size_t)t * p->stride + row, n);
}

// Cuts products of n tokens into units of (panels x tokens) that belong to one thread each, and runs them.
static void run_products(product_job *job, int n_tokens, int threads) {
    const int n = job->glu ? 1 : job->n_products;
    int total = 0;
    for (int i = 0; i < n; i++) total += (job->products[i].w->rows + TL_ROWS - 1) / TL_ROWS;
    job->n_tokens = job->token_block = n_tokens;
    const int wanted = threads == 1 ? 1 : TL_UNITS_THREAD * threads;
    while (job->token_block > 48 && total / TL_GROUP * (n_tokens / job->token_block) < wanted)
        job->token_block = (job->token_block / 2 + 5) / 6 * 6;
    job->n_token_blocks = (n_tokens + job->token_block - 1) / job->token_block;
    for (int i = 0; i < n; i++) {
        const tl_matrix *w = job->products[i].w;
        job->panels[i] = (w->rows + TL_ROWS - 1) / TL_ROWS;
        int most = (int)(BLOCK_BYTES / (w->n_bytes / (size_t)job->panels[i] + 1));
        int share = total * job->n_token_blocks / wanted;
        job->block[i] = tl_max(TL_GROUP, tl_min(most, share) / TL_GROUP * TL_GROUP);
        if (total * job->n_token_blocks / TL_GROUP < wanted) job->block[i] = 2; // 32 rows, never fewer
        int n_blocks = (job->panels[i] + job->block[i] - 1) / job->block[i];
        job->first_unit[i + 1] = job->first_unit[i] + n_blocks * job->n_token_blocks;
    }
    tl_parallel(threads, job->first_unit[n], product_unit, job);
}

static int wants_int8(const tl_matrix *w) { return !w->format->is_float; }

static void store_token(void *data, int t, int thread) {
    (void)thread;
    struct {
        tl_cpu_run *r;
        int layer;
    } *job = data;
    tl_cpu_run *r = job->r;
    const tl_config *c = &r->base.model->config;
    const tl_batch *b = r->base.batch;
    const size_t width = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const float *cos = r->cos + t * (c->rope_dim / 2), *sin = r->sin + t * (c->rope_dim / 2);
    const tl_cache *cache = r->base.cache;
    tl_isa()->rope(r->base.q + (size_t)t * width, cos, sin, c->n_heads, c->head_dim, c->rope_dim, c->attention_scale);
    tl_isa()->rope(r->k + (size_t)t * kv, cos, sin, c->n_kv_heads, c->head_dim, c->rope_dim, 1);
    const int position = b->positions[t];
    const int page = b->page_tables[(size_t)b->sequences[t] * (size_t)b->max_pages + (size_t)(position / TL_PAGE)];
    for (int h = 0; h < c->n_kv_heads; h++) {
        uint8_t *keys = tl_cache_head(cache, page, job->layer, h);
        const size_t at = (size_t)t * kv + (size_t)h * (size_t)c->head_dim;
        tl_isa()->store_kv(keys, keys + cache->k_bytes, r->k + at, r->v + at, position % TL_PAGE, c->head_dim, cache->type);
    }
}

static void cpu_qkv(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const tl_config *c = &run->model->config;
    const int n = run->batch->n, threads = run->batch->threads;
    const size_t width = (size_t)c->n_heads * (size_t)c->head_dim, kv = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    prepare(r, run->x, &w->attention_norm, NULL, n, c->dim, wants_int8(&w->wq) || wants_int8(&w->wk) || wants_int8(&w->wv));
    product_job products = {
        .products = {{&w->wq, &r->in, run->q, width, 0}, {&w->wk, &r->in, r->k, kv, 0}, {&w->wv, &r->in, r->v, kv, 0}},
        .n_products = 3};
    run_products(&products, n, threads);
    struct {
        tl_cpu_run *r;
        int layer;
    } store = {r, layer};
    tl_parallel(n < 4 ? 1 : threads, n, store_token, &store);
}

static void cpu_linear_add(tl_run *run, const float *in, const tl_matrix *w) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    prepare(r, in, NULL, NULL, run->batch->n, w->k, wants_int8(w));
    product_job job = {.products = {{w, &r->in, run->x, (size_t)w->rows, 1}}, .n_products = 1};
    run_products(&job, run->batch->n, run->batch->threads);
}

static void cpu_norm_glu(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const tl_config *c = &run->model->config;
    prepare(r, run->x, &w->ffn_norm, NULL, run->batch->n, c->dim, wants_int8(&w->w_gate) || wants_int8(&w->w_up));
    product_job job = {.products = {{&w->w_gate, &r->in, run->hidden, (size_t)c->ff_dim, 0},
                                    {&w->w_up, &r->in, r->up, (size_t)c->ff_dim, 0}},
                       .n_products = 2,
                       .glu = 1};
    run_products(&job, run->batch->n, run->batch->threads);
}

static void cpu_norm_linear(tl_run *run, const tl_norm *norm, const tl_matrix *w) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_batch *b = run->batch;
    if (b->n_rows == 0) return;
    prepare(r, run->x, norm, b->rows, b->n_rows, w->k, wants_int8(w));
    product_job job = {.products = {{w, &r->in, b->logits, (size_t)w->rows, 0}}, .n_products = 1};
    run_products(&job, b->n_rows, b->threads);
}

// ---- attention -------------------------------------------------------------------------------------------------------

typedef struct attend_job {
    tl_cpu_run *r;
    int layer;
} attend_job;

// Where a query's running result over a split stands: [v_stride] sums, then maximum and sum.
static float *partial_of(const tl_cpu_run *r, int token, int head, int split) {
    const size_t n_heads = (size_t)r->base.model->config.n_heads, stride = (size_t)r->v_stride + 16;
    return r->partial + (((size_t)token * n_heads + (size_t)head) * (size_t)r->n_splits + (size_t)split) * stride;
}

// One tile, one kv head, one split (a segment, or all of them).
static void attend_unit(void *data, int unit, int thread) {
    const attend_job *job = data;
    tl_cpu_run *r = job->r;
    const tl_config *c = &r->base.model->config;
    const tl_batch *b = r->base.batch;
    const tl_cache *cache = r->base.cache;
    const int split = unit % r->n_splits, kv_head = unit / r->n_splits % c->n_kv_heads;
    const tl_tile *tile = &r->tiles[unit / r->n_splits / c->n_kv_heads];
    const int first = r->n_splits > 1 ? split : 0, last = r->n_splits > 1 ? tl_min(split + 1, tile->n_segments) : tile->n_segments;
    const int32_t *pages = b->page_tables + (size_t)b->sequences[tile->token] * (size_t)b->max_pages;
    float *running[TL_COLUMNS];
    int positions[TL_COLUMNS];
    const float *q[TL_COLUMNS];
    for (int i = 0; i < tile->n; i++) {
        int token = tile->token + (tile->first + i) / r->group;
        int head = kv_head * r->group + (tile->first + i) % r->group;
        running[i] = partial_of(r, token, head, split);
        positions[i] = b->positions[token];
        q[i] = r->base.q + ((size_t)token * (size_t)c->n_heads + (size_t)head) * (size_t)c->head_dim;
        memset(running[i], 0, (size_t)r->v_stride * sizeof(float));
        running[i][r->v_stride] = -INFINITY;
        running[i][r->v_stride + 1] = 0;
    }
    for (int s = first; s < last; s++) {
        tl_segment segment = {.head_dim = c->head_dim, .v_stride = r->v_stride, .type = cache->type};
        float *into[TL_COLUMNS];
        for (int i = 0; i < tile->n; i++) { // columns that see something of the segment
            const int to = tl_min(positions[i] + 1 - s * TL_SEGMENT, TL_SEGMENT), column = segment.n_columns;
            if (to <= 0) continue;
            segment.q[column] = q[i];
            segment.to[column] = to;
            segment.out[column] = r->part + ((size_t)thread * TL_COLUMNS + (size_t)i) * (size_t)r->v_stride;
            into[column] = running[i];
            segment.n_columns++;
        }
        for (int i = 0; i < TL_SEGMENT / TL_PAGE; i++) {
            const int page = s * (TL_SEGMENT / TL_PAGE) + i;
            if (page > positions[tile->n - 1] / TL_PAGE) break; // a tile's last column sees farthest
            segment.k[i] = tl_cache_head(cache, pages[page], job->layer, kv_head);
            segment.v[i] = segment.k[i] + cache->k_bytes;
        }
        tl_isa()->segment(&segment);
        for (int i = 0; i < segment.n_columns; i++)
            tl_isa()->merge(into[i], into[i] + r->v_stride, into[i] + r->v_stride + 1, segment.out[i], segment.max[i],
                            segment.sum[i], r->v_stride);
    }
}

// The splits of one token's heads, in ascending order; then out = sum / weight (+ 0: no negative zeros from underflow).
static void attend_finish(void *data, int t, int thread) {
    (void)thread;
    const attend_job *job = data;
    tl_cpu_run *r = job->r;
    const tl_config *c = &r->base.model->config;
    const int n_splits = r->n_splits > 1 ? r->base.batch->positions[t] / TL_SEGMENT + 1 : 1;
    for (int h = 0; h < c->n_heads; h++) {
        float *sum = partial_of(r, t, h, 0), *out = r->base.attended + ((size_t)t * (size_t)c->n_heads + (size_t)h) * (size_t)c->head_dim;
        for (int s = 1; s < n_splits; s++) {
            const float *part = partial_of(r, t, h, s);
            tl_isa()->merge(sum, sum + r->v_stride, sum + r->v_stride + 1, part, part[r->v_stride], part[r->v_stride + 1],
                            r->v_stride);
        }
        for (int d = 0; d < c->head_dim; d++) out[d] = sum[d] / sum[r->v_stride + 1] + 0.0f;
    }
}

static void cpu_attend(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    attend_job job = {r, layer};
    const int n = run->batch->n, threads = run->batch->threads;
    tl_parallel(threads, r->n_tiles * run->model->config.n_kv_heads * r->n_splits, attend_unit, &job);
    tl_parallel(n < 4 ? 1 : threads, n, attend_finish, &job);
}

// ---- the table -------------------------------------------------------------------------------------------------------

static tl_status cpu_clear(void *to, size_t n_bytes) {
    memset(to, 0, n_bytes);
    return TL_OK;
}

static tl_status cpu_copy(void *to, const void *from, size_t n_bytes) {
    memcpy(to, from, n_bytes);
    return TL_OK;
}

const tl_backend tl_backend_cpu = {
    .name = "cpu",
    .alloc = tl_alloc,
    .free = tl_free,
    .clear = cpu_clear,
    .copy = cpu_copy,
    .upload = tl_cpu_upload,
    .upload_floats = tl_cpu_upload_floats,
    .unpack = tl_cpu_unpack,
    .begin = tl_cpu_begin,
    .embed = cpu_embed,
    .qkv = cpu_qkv,
    .attend = cpu_attend,
    .linear_add = cpu_linear_add,
    .norm_glu = cpu_norm_glu,
    .norm_linear = cpu_norm_linear,
    .end = tl_cpu_end,
    .release = tl_cpu_release,
};
