// adapters.cuh: the operations for a batch with adapters: those of backend_cuda.cu, and beside every matrix its low-rank
// pairs (kernels/low_rank.cuh). Which pairs meet which rows is one table a call, made before its first kernel. Such calls
// are not recorded. Included by backend_cuda.cu, after its operations.
#ifndef TINYLLM_CUDA_ADAPTERS_CUH
#define TINYLLM_CUDA_ADAPTERS_CUH

#include "kernels/low_rank.cuh"
#include <vector>

enum { OF_EMBEDDING, OF_OUTPUT, OF_LAYERS }; // products outside the layers, then a layer's:
enum { OF_QKV, OF_ATTENDED, OF_GATE_AND_UP, OF_DOWN, OF_ROUTER, LAYER_PRODUCTS };
#define MOST_TARGETS 3 // matrices of a product

// What calls with adapters need beside the others.
struct adapted_run {
    uint8_t *block, *buffers; // the table; x as floats, low, up
    size_t block_bytes, buffer_bytes;
    low_rank_pair *pairs; // [products, MOST_TARGETS, n_adapters]
    int *adapters;        // [tokens, uses]
    float *strengths;
    float *x, *low, *up;
    int n_adapters, uses, low_stride, most_rows;
};

static void release_adapted(cuda_run *r) {
    if (!r->adapted) return;
    (void)gpu_use(r->device->index);
    if (r->adapted->block) gpu_free(r->adapted->block);
    if (r->adapted->buffers) gpu_free(r->adapted->buffers);
    delete r->adapted;
}

static tl_status upload_pair(const gpu *d, tl_pair *pair, const tl_source *a, const tl_source *b, tl_message *message) {
    struct {
        tl_matrix *matrix;
        const tl_source *from;
    } both[] = {{&pair->a, a}, {&pair->b, b}};
    int error = gpu_use(d->index);
    for (auto &one : both) {
        tl_matrix *m = one.matrix;
        m->n_bytes = (size_t)m->rows * (size_t)m->k * (size_t)m->format->block_bytes;
        if (!error) error = gpu_alloc(&m->data, m->n_bytes);
        if (!error) error = gpu_copy_in(d->stream, m->data, one.from->memory, m->n_bytes);
    }
    if (!error) error = gpu_wait(d->stream);
    return error ? gpu_fail(d, error, "an adapter", message) : TL_OK;
}

// The matrices of a product; their number.
static int targets_of(const tl_model *model, int product, const tl_matrix *to[MOST_TARGETS]) {
    if (product < OF_LAYERS) {
        to[0] = product == OF_EMBEDDING ? &model->embedding : &model->output;
        return 1;
    }
    const tl_layer &w = model->layers[(product - OF_LAYERS) / LAYER_PRODUCTS];
    switch ((product - OF_LAYERS) % LAYER_PRODUCTS) {
    case OF_QKV: to[0] = &w.wq, to[1] = &w.wk, to[2] = &w.wv; return 3;
    case OF_ATTENDED: to[0] = &w.wo; return 1;
    case OF_GATE_AND_UP: to[0] = &w.w_up, to[1] = &w.w_gate; return w.w_gate.data ? 2 : 1;
    case OF_DOWN: to[0] = &w.w_down; return 1;
    default: to[0] = &w.router; return 1;
    }
}

// The table of a call, on the device, and its buffers.
static tl_status make_table(cuda_run *r, tl_message *message) {
    const tl_model *model = r->base.model;
    const tl_batch *b = r->base.batch;
    const tl_config &c = model->config;
    const gpu *d = r->device;
    if (!r->adapted) r->adapted = new adapted_run();
    adapted_run *ad = r->adapted;
    std::vector<const tl_adapter *> adapters;
    ad->uses = 1;
    for (int s = 0, first = 0; s < b->n_sequences; first = b->use_ends[s++]) {
        if (b->use_ends[s] - first > ad->uses) ad->uses = b->use_ends[s] - first;
        for (int u = first; u < b->use_ends[s]; u++) {
            bool known = false;
            for (const tl_adapter *adapter : adapters) known = known || adapter == b->uses[u].adapter;
            if (!known) adapters.push_back(b->uses[u].adapter);
        }
    }
    const int n_products = OF_LAYERS + c.n_layers * LAYER_PRODUCTS;
    ad->n_adapters = adapters.empty() ? 1 : (int)adapters.size();
    ad->low_stride = 1;
    std::vector<low_rank_pair> pairs((size_t)n_products * MOST_TARGETS * (size_t)ad->n_adapters);
    for (size_t i = 0; i < adapters.size(); i++) {
        int found = 0;
        for (int product = 0; product < n_products; product++) {
            const tl_matrix *targets[MOST_TARGETS];
            const int n = targets_of(model, product, targets);
            for (int t = 0; t < n; t++) {
                const tl_pair *p = tl_adapter_pair(adapters[i], targets[t]);
                if (!p) continue;
                pairs[((size_t)product * MOST_TARGETS + (size_t)t) * (size_t)ad->n_adapters + i] = {
                    (const uint8_t *)p->a.data,
                    (const uint8_t *)p->b.data,
                    p->a.format->id,
                    p->b.format->id,
                    p->rank,
                    p->a.k,
                    p->b.rows,
                    p->b.k,
                    p->scale};
                if (p->b.k > ad->low_stride) ad->low_stride = p->b.k;
                found++;
            }
        }
        if (found < adapters[i]->n_pairs)
            return tl_fail(message, TL_UNSUPPORTED,
                           "%d of an adapter's %d pairs are of experts: such adapters run on the CPU alone",
                           adapters[i]->n_pairs - found, adapters[i]->n_pairs);
    }
    std::vector<int> of_tokens((size_t)b->n * (size_t)ad->uses, -1);
    std::vector<float> strengths(of_tokens.size());
    for (int t = 0; t < b->n; t++) {
        const int s = b->sequences[t], first = s ? b->use_ends[s - 1] : 0;
        for (int u = first; u < b->use_ends[s]; u++) {
            const size_t at = (size_t)t * (size_t)ad->uses + (size_t)(u - first);
            for (size_t i = 0; i < adapters.size(); i++)
                if (adapters[i] == b->uses[u].adapter) of_tokens[at] = (int)i;
            strengths[at] = b->uses[u].scale;
        }
    }
    const size_t pair_bytes = pairs.size() * sizeof(low_rank_pair), token_bytes = of_tokens.size() * 4;
    bool changed;
    int error = grow(&ad->block, &ad->block_bytes, pair_bytes + 2 * token_bytes, false, &changed);
    if (!error) {
        ad->pairs = (low_rank_pair *)(void *)ad->block;
        ad->adapters = (int *)(void *)(ad->block + pair_bytes);
        ad->strengths = (float *)(void *)(ad->block + pair_bytes + token_bytes);
        error = gpu_copy_in(d->stream, ad->pairs, pairs.data(), pair_bytes);
        if (!error) error = gpu_copy_in(d->stream, ad->adapters, of_tokens.data(), token_bytes);
        if (!error) error = gpu_copy_in(d->stream, ad->strengths, strengths.data(), token_bytes);
    }
    int widest = c.dim > c.ff_dim ? c.dim : c.ff_dim;
    if (q_width(c) > widest) widest = q_width(c);
    activations x;
    ad->most_rows = r->shape.n;
    const size_t x_bytes = (place_activations(&x, NULL, ad->most_rows, widest, false, true) + 255) / 256 * 256;
    const size_t low_bytes = (MOST_TARGETS * (size_t)ad->most_rows * (size_t)ad->low_stride * 4 + 255) / 256 * 256;
    const size_t up_bytes = (size_t)ad->most_rows * (size_t)c.ff_dim * 4;
    if (!error) error = grow(&ad->buffers, &ad->buffer_bytes, x_bytes + low_bytes + up_bytes, false, &changed);
    if (!error) {
        ad->x = (float *)(void *)ad->buffers;
        ad->low = (float *)(void *)(ad->buffers + x_bytes);
        ad->up = (float *)(void *)(ad->buffers + x_bytes + low_bytes);
        error = gpu_wait(d->stream); // the vectors go
    }
    return error ? gpu_fail(d, error, "a call's adapters", message) : TL_OK;
}

// Rows of x (normed where there is a norm; none: rows of the embedding's a are looked up), n at most, `count` there are from
// `first` on, and what a product made of them: the pairs' part is added to it.
static void add_pairs(cuda_run *r, int product, const float *x, const int *rows, const tl_norm *norm, int k, int n,
                      const int *count, int first, float *const out[MOST_TARGETS], float scale) {
    const adapted_run *ad = r->adapted;
    const tl_matrix *targets[MOST_TARGETS];
    const int n_targets = targets_of(r->base.model, product, targets);
    low_rank_arguments a = {};
    a.pairs = ad->pairs + (size_t)product * MOST_TARGETS * (size_t)ad->n_adapters;
    a.adapters = ad->adapters;
    a.strengths = ad->strengths;
    a.n_adapters = ad->n_adapters;
    a.uses = ad->uses;
    a.n = count;
    a.rows = rows;
    a.first = first;
    a.most = n;
    a.low = ad->low;
    a.low_stride = ad->low_stride;
    a.scale = scale;
    int widest = 0;
    for (int i = 0; i < n_targets; i++) {
        a.out[i] = out[i];
        const int width = product == OF_EMBEDDING ? targets[i]->k : targets[i]->rows;
        widest = width > widest ? width : widest;
    }
    if (x) {
        activations in;
        place_activations(&in, (uint8_t *)(void *)ad->x, n, k, false, true);
        a.x = in.x;
        a.x_stride = in.x_stride;
        const activation_source source = {x, rows, norm ? norm_of(norm) : row_norm{}, k, false, true};
        const prepare_arguments p = {source, in, count, first};
        launch(r, prepare, {n, 1, 1}, BLOCK_THREADS, NORM_SUMS * sizeof(float), true, p);
    } else {
        a.ids = in_block(r, r->at.tokens);
    }
    for (a.use = 0; a.use < a.uses; a.use++) {
        launch(r, low_rank_in, {n, n_targets, 1}, BLOCK_THREADS, 0, true, a);
        launch(r, low_rank_out, {n, n_targets, (widest + BLOCK_THREADS - 1) / BLOCK_THREADS}, BLOCK_THREADS, 0, true,
               a);
    }
}

// The same of all tokens and one of a layer's products.
static void add_layer_pairs(cuda_run *r, int layer, int product, const float *x, const tl_norm *norm, int k,
                            float *out0, float *out1, float *out2, float scale) {
    float *const out[MOST_TARGETS] = {out0, out1, out2};
    add_pairs(r, OF_LAYERS + layer * LAYER_PRODUCTS + product, x, NULL, norm, k, r->shape.n, in_block(r, 4 * N_TOKENS),
              0, out, scale);
}

static void adapted_embedding(tl_run *run) {
    cuda_run *r = run_of(run);
    embedding(run);
    if (!run->batch->tokens) return;
    float *const out[MOST_TARGETS] = {run->x};
    add_pairs(r, OF_EMBEDDING, NULL, NULL, NULL, 0, r->shape.n, in_block(r, 4 * N_TOKENS), 0, out,
              run->model->config.embedding_scale);
}

static void adapted_qkv(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    product_qkv(run, layer);
    add_layer_pairs(r, layer, OF_QKV, run->x, &w->attention_norm, w->wq.k, run->q, r->k, r->v, 1);
}

// Which of a layer's products w is, and of which layer.
static int layer_of(const tl_model *model, const tl_matrix *w, int *product) {
    int layer = 0;
    while (&model->layers[layer].wo != w && &model->layers[layer].w_down != w) layer++;
    *product = &model->layers[layer].wo == w ? OF_ATTENDED : OF_DOWN;
    return layer;
}

static void adapted_linear_add(tl_run *run, const float *in, const tl_matrix *w, const tl_norm *norm) {
    cuda_run *r = run_of(run);
    const float scale = run->model->config.residual_scale;
    int product;
    const int layer = layer_of(run->model, w, &product);
    if (!norm->weight) {
        linear_add(run, in, w, norm);
        add_layer_pairs(r, layer, product, in, NULL, w->k, run->x, NULL, NULL, scale);
        return;
    }
    const int *n = in_block(r, 4 * N_TOKENS);
    product_arguments a = product_into(STORE, 1);
    a.w[0] = matrix_of(w, r->added);
    products(r, a, in, NULL, NULL, w->k, r->shape.n, n, 0);
    add_layer_pairs(r, layer, product, in, NULL, w->k, r->added, NULL, NULL, 1);
    const add_arguments add = {run->x, r->added, norm_of(norm), scale, w->rows, n};
    launch(r, add_normed, {r->shape.n, 1, 1}, BLOCK_THREADS, NORM_SUMS * sizeof(float), true, add);
}

static void adapted_norm_glu(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    const int *n = in_block(r, 4 * N_TOKENS);
    const bool has_gate = w->w_gate.data != NULL;
    float *up = has_gate ? r->adapted->up : run->hidden;
    product_arguments a = product_into(STORE, has_gate ? 2 : 1);
    a.w[0] = matrix_of(&w->w_up, up);
    if (has_gate) a.w[1] = matrix_of(&w->w_gate, run->hidden);
    products(r, a, run->x, NULL, &w->ffn_norm, w->w_up.k, r->shape.n, n, 0);
    add_layer_pairs(r, layer, OF_GATE_AND_UP, run->x, &w->ffn_norm, w->w_up.k, up, run->hidden, NULL, 1);
    const tl_config &c = run->model->config;
    const finish_arguments gate = {
        run->hidden, has_gate ? up : NULL, gating_of(c), unit_of(c, *w), 1, 0, w->w_up.rows, 0, n};
    launch(r, finish, {r->shape.n, 1, 1}, BLOCK_THREADS, 0, true, gate);
}

static void adapted_moe(tl_run *run, int layer) { // of experts there are no pairs here: make_table
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    score_experts(run, layer);
    add_layer_pairs(r, layer, OF_ROUTER, run->x, &w->ffn_norm, w->router.k, r->scores, NULL, NULL, 1);
    visit_experts(run, layer);
}

static void adapted_norm_linear(tl_run *run, const tl_norm *norm, const tl_matrix *w) {
    cuda_run *r = run_of(run);
    const tl_batch *b = run->batch;
    const tl_config &c = run->model->config;
    const size_t vocabulary = (size_t)w->rows;
    const int *rows = in_block(r, r->at.rows), *count = in_block(r, 4 * N_ROWS);
    for (int first = 0; first < b->n_rows; first += LOGIT_ROWS) {
        const int left = b->n_rows - first, n = left < LOGIT_ROWS ? left : LOGIT_ROWS;
        product_arguments a = product_into(STORE, 1);
        a.w[0] = matrix_of(w, r->logits);
        products(r, a, run->x, rows, norm, w->k, n, count, first);
        float *const out[MOST_TARGETS] = {r->logits};
        add_pairs(r, OF_OUTPUT, run->x, rows, norm, w->k, n, count, first, out, 1);
        const finish_arguments end = {r->logits, NULL, {}, {}, c.logit_scale, c.logit_cap, w->rows, first, count};
        if (c.logit_scale != 1 || c.logit_cap > 0) launch(r, finish, {n, 1, 1}, BLOCK_THREADS, 0, true, end);
        if (b->n_candidates)
            candidates(r, n);
        else if (!r->error)
            r->error = gpu_copy_out(r->device->stream, b->logits + (size_t)first * vocabulary, r->logits,
                                    (size_t)n * vocabulary * sizeof(float));
    }
}

#endif
