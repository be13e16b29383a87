// cpu/rows.c: what happens to one token at a time between the products: norms, RoPE and the way into the cache, what is
// added to x, the logits' last steps. Includes cpu.h, numeric.h; the arithmetic is in kernels/rows.inc
// and kernels/kv.inc.
#include "cpu/cpu.h"
#include "numeric.h"

void tl_cpu_norm(const tl_norm *norm, float *out, const float *x, int n) {
    (norm->kind == TL_LAYER_NORM ? tl_isa()->layernorm : tl_isa()->rmsnorm)(out, x, norm->weight, norm->eps, n);
    for (int i = 0; norm->bias && i < n; i++) out[i] += norm->bias[i];
}

static int threads_for(const tl_cpu_run *r, int n) { return n < TL_FEW_TOKENS ? 1 : r->base.batch->threads; }

// A token's queries or keys: x [n_heads * head_dim], in place.
static void norm_heads(const tl_config *c, const tl_norm *norm, float *x, int n_heads) {
    if (!norm->weight) return;
    const int all = n_heads * c->head_dim, width = c->qk_norm == TL_QK_ALL ? all : c->head_dim;
    for (int i = 0; i < all; i += width) {
        tl_norm part = *norm;
        if (c->qk_norm == TL_QK_HEADS) part.weight += i;
        tl_cpu_norm(&part, x + i, x + i, width);
    }
}

// Within [-limit, limit], a NaN as it is.
static void clamp(float *x, float limit, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

static float query_scale(const tl_config *c, int position) {
    if (c->query_growth == 0) return c->attention_scale;
    return c->attention_scale * (float)(1 + c->query_growth * tl_log(1 + position / c->query_span));
}

static void rotate_and_store(void *data, int t, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const tl_layer *layer = &r->base.model->layers[r->layer];
    const tl_batch *b = r->base.batch;
    const tl_cache *cache = r->base.cache;
    const int half = c->rope_dim / 2, rope_dim = layer->rope == TL_ROPE_NONE ? 0 : c->rope_dim;
    const size_t at = ((size_t)(layer->rope == TL_ROPE_LOCAL ? b->n : 0) + (size_t)t) * (size_t)half;
    float *q = r->base.q + (size_t)t * r->q_width, *k = r->k + (size_t)t * r->kv_width,
          *v = r->v + (size_t)t * r->kv_width;
    const float scale = query_scale(c, b->positions[t]);
    if (c->qkv_limit > 0) {
        clamp(q, c->qkv_limit, r->q_width);
        clamp(k, c->qkv_limit, r->kv_width);
        clamp(v, c->qkv_limit, r->kv_width);
    }
    if (!c->qk_norm_late) {
        norm_heads(c, &layer->q_norm, q, c->n_heads);
        norm_heads(c, &layer->k_norm, k, c->n_kv_heads);
    }
    tl_isa()->rope(q, r->cos + at, r->sin + at, c->n_heads, c->head_dim, rope_dim, c->qk_norm_late ? 1 : scale);
    if (c->qk_norm_late) {
        norm_heads(c, &layer->q_norm, q, c->n_heads);
        tl_isa()->rope(q, NULL, NULL, c->n_heads, c->head_dim, 0, scale); // which scales alone
    }
    if (cache->type == 8)
        tl_isa()->quantize(r->in.q + (size_t)t * r->q_width, r->in.groups + (size_t)t * (r->q_width / TL_Q), q,
                           (int)r->q_width);
    tl_isa()->rope(k, r->cos + at, r->sin + at, c->n_kv_heads, c->head_dim, rope_dim, 1);
    if (c->qk_norm_late) norm_heads(c, &layer->k_norm, k, c->n_kv_heads);
    const int32_t *pages = tl_cpu_pages(r, t);
    for (int h = 0; h < c->n_kv_heads; h++) {
        uint8_t *keys = tl_cache_head(cache, pages[b->positions[t] / TL_PAGE], layer->place, h);
        tl_isa()->store_kv(keys, keys + cache->k_bytes, k + h * c->head_dim, v + h * c->head_dim,
                           b->positions[t] % TL_PAGE, c->head_dim, cache->type);
    }
}

// The call's queries and keys normed and rotated; keys and values into their pages.
void tl_cpu_rotate_and_store(tl_cpu_run *r, int layer) {
    r->layer = layer;
    tl_parallel(threads_for(r, r->base.batch->n), r->base.batch->n, rotate_and_store, r);
}

typedef struct addition {
    tl_cpu_run *run;
    float *add; // [n, dim]
    const tl_norm *norm;
} addition;

static void add_row(void *data, int t, int thread) {
    (void)thread;
    const addition *a = data;
    const tl_config *c = &a->run->base.model->config;
    float *x = a->run->base.x + (size_t)t * (size_t)c->dim, *add = a->add + (size_t)t * (size_t)c->dim;
    if (a->norm->weight) tl_cpu_norm(a->norm, add, add, c->dim);
    for (int i = 0; i < c->dim; i++) x[i] += c->residual_scale * add[i];
}

// x += residual_scale * norm(add), add [n, dim] being used up.
void tl_cpu_add(tl_cpu_run *r, float *add, const tl_norm *norm) {
    addition a = {r, add, norm};
    tl_parallel(threads_for(r, r->base.batch->n), r->base.batch->n, add_row, &a);
}

static void finish_row(void *data, int i, int thread) {
    (void)thread;
    const tl_run *run = data;
    const tl_config *c = &run->model->config;
    float *logits = run->batch->logits + (size_t)i * (size_t)c->vocab_size;
    for (int j = 0; j < c->vocab_size; j++) logits[j] *= c->logit_scale;
    if (c->logit_cap > 0) tl_isa()->soft_cap(logits, c->logit_cap, c->vocab_size);
}

// The logits' scale and cap, where there are any.
void tl_cpu_finish_logits(tl_cpu_run *r) {
    const tl_config *c = &r->base.model->config;
    const int n = r->base.batch->n_rows;
    if (c->logit_scale != 1 || c->logit_cap > 0) tl_parallel(threads_for(r, n), n, finish_row, &r->base);
}
