// backend_cpu.c: the CPU's operations, each a page or less: products (cpu_products.c), attention (cpu_attend.c), and what
// lies between them. A call's buffers are cpu_run.c's, loading is cpu_load.c's. Includes cpu.h.
#include "cpu.h"
#include <string.h>

static void embed_token(void *data, int t, int thread) {
    (void)thread;
    tl_run *run = data;
    const size_t dim = (size_t)run->model->config.dim, row = (size_t)t;
    if (run->batch->tokens)
        tl_cpu_unpack_row(&run->model->embedding, run->batch->tokens[t], run->x + row * dim);
    else
        memcpy(run->x + row * dim, run->batch->x + row * dim, dim * sizeof(float));
}

static void cpu_embed(tl_run *run) { tl_parallel(run->batch->threads, run->batch->n, embed_token, run); }

// RoPE on a token's queries and keys, which then go into their page with the values.
static void rotate_and_store(void *data, int t, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const tl_batch *b = r->base.batch;
    const tl_cache *cache = r->base.cache;
    const float *cos = r->cos + t * (c->rope_dim / 2), *sin = r->sin + t * (c->rope_dim / 2);
    float *q = r->base.q + (size_t)t * r->q_width, *k = r->k + (size_t)t * r->kv_width,
          *v = r->v + (size_t)t * r->kv_width;
    tl_isa()->rope(q, cos, sin, c->n_heads, c->head_dim, c->rope_dim, c->attention_scale);
    if (cache->type == 8)
        tl_isa()->quantize(r->in.q + (size_t)t * r->q_width, r->in.groups + (size_t)t * (r->q_width / TL_Q), q,
                           (int)r->q_width);
    tl_isa()->rope(k, cos, sin, c->n_kv_heads, c->head_dim, c->rope_dim, 1);
    const int32_t *pages = b->page_tables + (size_t)b->sequences[t] * (size_t)b->max_pages;
    for (int h = 0; h < c->n_kv_heads; h++) {
        uint8_t *keys = tl_cache_head(cache, pages[b->positions[t] / TL_PAGE], r->layer, h);
        tl_isa()->store_kv(keys, keys + cache->k_bytes, k + h * c->head_dim, v + h * c->head_dim,
                           b->positions[t] % TL_PAGE, c->head_dim, cache->type);
    }
}

static void cpu_qkv(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const int n = run->batch->n;
    tl_product products[] = {{.w = &w->wq, .out = run->q, .stride = r->q_width},
                             {.w = &w->wk, .out = r->k, .stride = r->kv_width},
                             {.w = &w->wv, .out = r->v, .stride = r->kv_width}};
    tl_cpu_products(r, run->x, NULL, n, &w->attention_norm, products, 3);
    r->layer = layer;
    tl_parallel(n < TL_FEW_TOKENS ? 1 : run->batch->threads, n, rotate_and_store, r);
}

static void cpu_linear_add(tl_run *run, const float *in, const tl_matrix *w) {
    tl_product product = {.w = w, .out = run->x, .stride = (size_t)w->rows, .add = 1};
    tl_cpu_products((tl_cpu_run *)run, in, NULL, run->batch->n, NULL, &product, 1);
}

static void cpu_norm_glu(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const size_t stride = (size_t)w->w_up.rows;
    tl_product up = {.w = &w->w_up, .out = r->up, .stride = stride};
    tl_product gate = {.w = &w->w_gate, .out = run->hidden, .stride = stride, .up = &up};
    tl_cpu_products(r, run->x, NULL, run->batch->n, &w->ffn_norm, &gate, 1);
}

static void cpu_norm_linear(tl_run *run, const tl_norm *norm, const tl_matrix *w) {
    const tl_batch *b = run->batch;
    if (b->n_rows == 0) return;
    tl_product product = {.w = w, .out = b->logits, .stride = (size_t)w->rows};
    tl_cpu_products((tl_cpu_run *)run, run->x, b->rows, b->n_rows, norm, &product, 1);
}

const tl_backend tl_backend_cpu = {
    .name = "cpu",
    .alloc = tl_alloc,
    .free = tl_free,
    .clear = tl_clear,
    .copy = tl_copy,
    .upload = tl_cpu_upload,
    .upload_floats = tl_cpu_upload_floats,
    .unpack = tl_cpu_unpack,
    .begin = tl_cpu_begin,
    .embed = cpu_embed,
    .qkv = cpu_qkv,
    .attend = tl_cpu_attend,
    .linear_add = cpu_linear_add,
    .norm_glu = cpu_norm_glu,
    .norm_linear = cpu_norm_linear,
    .end = tl_cpu_end,
    .release = tl_cpu_release,
};
