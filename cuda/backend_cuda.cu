// backend_cuda.cu: the GPU's implementation of the operations that csrc/model.c calls, and what the library exports. An
// operation launches one kernel, two where many tokens share the weights. An error in one is kept for `end`. Includes
// call.cuh (a call's buffers and graphs) and load.cuh (weights in and out); the arithmetic is in kernels/.
#include "bandwidth.cuh"
#include "call.cuh"
#include <mutex>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

#define MANY_FROM 33 // tokens from which on larger tiles pay

static cuda_run *run_of(tl_run *run) { return (cuda_run *)run; }
static row_norm norm_of(const tl_norm *norm) {
    return {norm->weight, norm->bias, norm->eps, norm->kind == TL_LAYER_NORM};
}

// A layer's i-th of [experts, EXPERT_MATRICES].
static const tl_matrix *expert_matrix(const tl_layer &layer, int i) {
    const tl_expert &e = layer.experts[i / EXPERT_MATRICES];
    const tl_matrix *const matrices[EXPERT_MATRICES] = {&e.w_gate, &e.w_up, &e.w_down};
    return matrices[i % EXPERT_MATRICES];
}

template <class A>
static void launch(cuda_run *r, void (*kernel)(A), gpu_grid grid, int threads, size_t shared_bytes, bool after,
                   const A &arguments) {
    const gpu *d = r->device;
    if (!r->error)
        r->error = gpu_launch(r->recording ? d->recorder : d->stream, kernel, grid, threads, shared_bytes,
                              after && d->waits, arguments);
}

// ---- products -----------------------------------------------------------------------------------------------------------

// As many slots for a warp's ring as leave room for two blocks a processor; else for one.
static int slots_for(const gpu *d, const product_arguments &a, size_t others) {
    const int most[] = {6, 4, 3, 2};
    for (int blocks = 2; blocks >= 1; blocks--) {
        size_t room = (size_t)d->shared_processor / (size_t)blocks - 1024;
        if (room > (size_t)d->shared_block) room = (size_t)d->shared_block;
        for (int n : most)
            if (others + (size_t)BLOCK_WARPS * (size_t)n * (size_t)a.slot_bytes <= room) return n;
    }
    return 0;
}

// The kernel of product_many.cuh for a format, and the bytes of one of its steps; NULL where there is none.
typedef void (*product_kernel)(product_arguments);
template <class F> static product_kernel many_kernel_of(size_t *step_bytes) {
    if constexpr (F::facts.scale == HALF_SCALES_MIN) {
        return NULL;
    } else {
        *step_bytes = (size_t)many_layout(F::facts).n_bytes;
        return product_many<F>;
    }
}
static product_kernel many_kernel(int format, size_t *step_bytes) {
    switch (format) {
#define X(name, id, ...)                                                                                               \
    case id: return many_kernel_of<format_##name>(step_bytes);
        QUANTIZED_FORMATS(X)
#undef X
    default: return NULL;
    }
}

// For many tokens (to each of the experts, on average), if all matrices are of one format that has such a kernel and its
// steps fit.
static bool launch_many(cuda_run *r, product_arguments a, int n) {
    const tl_config &c = r->base.model->config;
    size_t step = 0;
    const bool many = a.experts ? n / c.n_experts >= MANY_FROM / 2 : n >= MANY_FROM;
    product_kernel kernel = many ? many_kernel(a.w[0].format, &step) : NULL;
    for (int i = 1; i < a.n_matrices; i++)
        if (a.w[i].format != a.w[0].format) kernel = NULL;
    const size_t room = (size_t)r->device->shared_block;
    if (!kernel || 2 * step > room) return false;
    a.n_slots = 3 * step <= room ? 3 : 2;
    int units = a.epilogue == GLU ? (a.w[0].rows + 31) / 32 : 0;
    for (int i = 0; i < a.n_matrices && a.epilogue != GLU; i++) units += (a.w[i].rows + 63) / 64;
    a.pieces = r->to.many_pieces;
    a.n_pieces = r->to.counts + N_MANY_PIECES;
    const int n_pieces = a.experts ? most_pieces(c, n, MANY_TOKENS) : (n + MANY_TOKENS - 1) / MANY_TOKENS;
    launch(r, kernel, {units, n_pieces, 1}, BLOCK_THREADS, (size_t)a.n_slots * step, true, a);
    return true;
}

// The chosen rows of x (NULL: as they come; from `first` on), normed where there is a norm, times matrices that are all
// quantized or all floats. n: rows at most, count: there are (on the device).
static void product_of(cuda_run *r, product_arguments a, const float *x, const int *rows, const tl_norm *norm, int k,
                       int n, const int *count, int first) {
    const gpu *d = r->device;
    const bool floats = quantized_index(a.w[0].format) < 0;
    a.source = {x, rows, norm ? norm_of(norm) : row_norm{}, k, !floats, floats};
    a.n_units = (a.w[0].rows + 15) / 16;
    for (int i = 0; i < a.n_matrices; i++) {
        if (i > 0 && a.epilogue != GLU) a.n_units += (a.w[i].rows + 15) / 16;
        if (a.w[i].chunk_bytes > a.slot_bytes) a.slot_bytes = a.w[i].chunk_bytes;
    }
    a.n = count;
    a.first = first;
    a.most = n;
    const int together = a.experts ? r->shape.n : n; // that meet the same weights, at most
    a.prepared = together > 2;                       // few tokens: every block prepares them for itself
    size_t shared = product_shared_bytes(a, together);
    if (!a.prepared && slots_for(d, a, shared) == 0) {
        a.prepared = true;
        shared = product_shared_bytes(a, together);
    }
    if (a.prepared) {
        place_activations(&a.in, r->prepared, n, k, !floats, floats);
        const prepare_arguments p = {a.source, a.in, count, first};
        launch(r, prepare, {n, 1, 1}, BLOCK_THREADS, NORM_SUMS * sizeof(float), true, p);
    }
    if (a.prepared && launch_many(r, a, n)) return;
    a.n_slots = slots_for(d, a, shared);
    shared = product_shared_bytes(a, together);
    const int blocks = 2 * (shared + 1024) <= (size_t)d->shared_processor ? 2 : 1;
    const int most = d->info.n_processors * blocks;
    a.pieces = r->to.pieces;
    a.n_pieces = r->to.counts + N_PIECES;
    const int n_pieces = a.experts ? most_pieces(r->base.model->config, n, TOKENS) : (n + TOKENS - 1) / TOKENS;
    const gpu_grid grid = {a.n_units < most ? a.n_units : most, n_pieces, 1};
    void (*const kernels[2][2])(product_arguments) = {{product<TOKENS, false>, product<TOKENS, true>},
                                                      {product<1, false>, product<1, true>}};
    launch(r, kernels[together == 1][floats], grid, BLOCK_THREADS, shared, true, a);
}

// The same for any matrices: the quantized ones first. (Both of GLU's are of one kind.)
static void products(cuda_run *r, const product_arguments &all, const float *x, const int *rows, const tl_norm *norm,
                     int k, int n, const int *count, int first) {
    for (int floats = 0; floats < 2; floats++) {
        product_arguments some = all;
        some.n_matrices = 0;
        for (int i = 0; i < all.n_matrices; i++)
            if ((quantized_index(all.w[i].format) < 0) == floats) some.w[some.n_matrices++] = all.w[i];
        if (some.n_matrices > 0) product_of(r, some, x, rows, norm, k, n, count, first);
    }
}

// Of n_matrices that are still to be named.
static product_arguments product_into(epilogue epilogue, int n_matrices) {
    product_arguments a = {};
    a.n_matrices = n_matrices;
    a.epilogue = epilogue;
    a.scale = 1;
    return a;
}

static void product_qkv(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    product_arguments a = product_into(STORE, 3);
    a.w[0] = matrix_of(&w->wq, run->q);
    a.w[1] = matrix_of(&w->wk, r->k);
    a.w[2] = matrix_of(&w->wv, r->v);
    products(r, a, run->x, NULL, &w->attention_norm, w->wq.k, r->shape.n, in_block(r, 4 * N_TOKENS), 0);
}

static void linear_add(tl_run *run, const float *in, const tl_matrix *w, const tl_norm *norm) {
    cuda_run *r = run_of(run);
    const int *n = in_block(r, 4 * N_TOKENS);
    const float scale = run->model->config.residual_scale;
    product_arguments a = product_into(norm->weight ? STORE : ADD, 1);
    a.w[0] = matrix_of(w, norm->weight ? r->added : run->x);
    if (!norm->weight) a.scale = scale;
    products(r, a, in, NULL, NULL, w->k, r->shape.n, n, 0);
    if (!norm->weight) return;
    const add_arguments add = {run->x, r->added, norm_of(norm), scale, w->rows, n};
    launch(r, add_normed, {r->shape.n, 1, 1}, BLOCK_THREADS, NORM_SUMS * sizeof(float), true, add);
}

static gating gating_of(const tl_config &c) {
    static const gating activations[] = {{-1, 0, INFINITY, 0},                           // SiLU
                                         {-1.5957691216057308f, 0.044715f, INFINITY, 0}, // GELU, -2 sqrt(2 / pi)
                                         {-1.702f, 0, 7, 1}};                            // gpt-oss's
    return activations[c.activation < TL_RELU_SQUARED ? c.activation : TL_SILU];         // without a gate nobody asks
}

// A layer's unit without a gate, if it has one.
static ungated unit_of(const tl_config &c, const tl_layer &w) {
    return {c.activation >= TL_RELU_SQUARED, c.activation == TL_XIELU, w.xielu[0], w.xielu[1], w.xielu[2], w.xielu[3]};
}

// hidden = activation(gate) * up, of rows of x. experts: w is the first of theirs.
static void glu(cuda_run *r, const tl_matrix *gate, const tl_matrix *up, const expert_weights *experts, const int *rows,
                const tl_norm *norm, int n, const int *count) {
    const float *x = r->base.x;
    product_arguments a = product_into(GLU, 2);
    a.activation = gating_of(r->base.model->config);
    a.experts = experts;
    a.w[0] = matrix_of(gate, r->base.hidden);
    a.w[1] = matrix_of(up, r->base.hidden);
    if (gate->format->is_float == up->format->is_float) {
        products(r, a, x, rows, norm, up->k, n, count, 0);
        return;
    }
    a.n_matrices = 1; // they read different activations: one after the other
    a.epilogue = STORE;
    products(r, a, x, rows, norm, up->k, n, count, 0);
    a.epilogue = GATED;
    a.w[0] = a.w[1];
    a.experts = experts ? experts + 1 : NULL;
    products(r, a, x, rows, norm, up->k, n, count, 0);
}

static void norm_glu(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    if (!w->w_gate.data) {
        product_arguments a = product_into(STORE, 1);
        a.unit = unit_of(run->model->config, *w);
        a.w[0] = matrix_of(&w->w_up, run->hidden);
        products(r, a, run->x, NULL, &w->ffn_norm, w->w_up.k, r->shape.n, in_block(r, 4 * N_TOKENS), 0);
        return;
    }
    glu(r, &w->w_gate, &w->w_up, NULL, NULL, &w->ffn_norm, r->shape.n, in_block(r, 4 * N_TOKENS));
}

static void score_experts(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    product_arguments router = product_into(STORE, 1);
    router.w[0] = matrix_of(&w->router, r->scores);
    products(r, router, run->x, NULL, &w->ffn_norm, run->model->config.dim, r->shape.n, in_block(r, 4 * N_TOKENS), 0);
}

// By their scores: routing, gate and up, down, the sum.
static void visit_experts(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_layer *w = &run->model->layers[layer];
    const tl_config &c = run->model->config;
    const int *n = in_block(r, 4 * N_TOKENS), *n_visits = r->to.counts + N_VISITS;
    const int most_visits = r->shape.n * c.n_experts_used;
    const expert_weights *experts = r->experts + (size_t)layer * (size_t)c.n_experts * EXPERT_MATRICES;
    const route_arguments to = {r->scores, n, c.n_experts, c.n_experts_used, c.norm_topk_prob != 0, r->to};
    launch(r, route, {r->shape.n, 1, 1}, BLOCK_THREADS, route_shared_bytes(c.n_experts), true, to);
    const tl_expert &any = w->experts[0];
    glu(r, &any.w_gate, &any.w_up, experts, r->to.tokens, &w->ffn_norm, most_visits, n_visits);
    product_arguments down = product_into(STORE, 1);
    down.w[0] = matrix_of(&any.w_down, r->added);
    down.experts = experts + 2;
    products(r, down, run->hidden, NULL, NULL, c.ff_dim, most_visits, n_visits, 0);
    const add_visits_arguments add = {run->x, r->added, r->to, c.dim, c.n_experts_used, n};
    launch(r, add_visits, {r->shape.n, 1, 1}, BLOCK_THREADS, 0, true, add);
}

static void moe(tl_run *run, int layer) {
    score_experts(run, layer);
    visit_experts(run, layer);
}

// Of the rows of logits just computed, LOGIT_ROWS at most.
static void candidates(cuda_run *r, int n) {
    const int vocabulary = r->base.model->config.vocab_size, k = r->base.batch->n_candidates;
    const uint32_t *allowed = (const uint32_t *)(const void *)(r->block + r->at.allowed);
    candidate_arguments c = {};
    c.logits = r->logits;
    c.n_rows = in_block(r, 4 * N_ROWS);
    c.n = vocabulary;
    c.k = k;
    c.allowed = r->shape.mask_words ? allowed : NULL;
    c.best = r->best;
    c.largest = r->largest;
    c.result = r->result;
    c.parts = r->sum_parts;
    c.arrived = r->row_arrived;
    const int pieces = n_sorted(vocabulary);
    const size_t sorted = BLOCK_WARPS * sizeof(float) + SORT_PIECE * sizeof(uint64_t);
    launch(r, sort_pieces, {pieces, n, 1}, BLOCK_THREADS, sorted, true, c);
    launch(r, merge_pieces, {n, 1, 1}, BLOCK_THREADS, (size_t)power_from(pieces * k) * sizeof(uint64_t), true, c);
    launch(r, sum_exponentials, {n_summed(vocabulary), n, 1}, BLOCK_THREADS, SUM_PIECE * sizeof(float) + 16, true, c);
}

// Recorded: all rows (they are few); end fetches them. Else: some rows at a time, fetched at once. Candidates: end does.
static void norm_linear(tl_run *run, const tl_norm *norm, const tl_matrix *w) {
    cuda_run *r = run_of(run);
    const tl_batch *b = run->batch;
    product_arguments a = product_into(STORE, 1);
    a.w[0] = matrix_of(w, r->logits);
    a.scale = run->model->config.logit_scale;
    a.cap = run->model->config.logit_cap;
    for (int first = 0; first < b->n_rows; first += LOGIT_ROWS) {
        const int left = b->n_rows - first, n = r->recording ? r->shape.n_rows : left < LOGIT_ROWS ? left : LOGIT_ROWS;
        products(r, a, run->x, in_block(r, r->at.rows), norm, w->k, n, in_block(r, 4 * N_ROWS), first);
        const size_t vocabulary = (size_t)w->rows;
        if (b->n_candidates)
            candidates(r, n);
        else if (!r->recording && !r->error)
            r->error = gpu_copy_out(r->device->stream, b->logits + (size_t)first * vocabulary, r->logits,
                                    (size_t)n * vocabulary * sizeof(float));
    }
}

// ---- attention and the embedding ----------------------------------------------------------------------------------------

// Weights of the config's kind of norm for a layer's queries or keys, n_heads of them.
static head_norm head_norm_of(const tl_config &c, const tl_norm &norm, int n_heads) {
    return {norm_of(&norm), c.qk_norm == TL_QK_HEAD ? 0 : c.head_dim, c.qk_norm == TL_QK_ALL ? n_heads : 1,
            c.qk_norm_late != 0, c.qkv_limit};
}

static void attention(tl_run *run, int layer) {
    cuda_run *r = run_of(run);
    const tl_config &c = run->model->config;
    const tl_layer &w = run->model->layers[layer];
    const tl_cache *cache = run->cache;
    attend_arguments a = {};
    a.q = run->q;
    a.k = r->k;
    a.v = r->v;
    a.out = run->attended;
    const size_t rope = w.rope == TL_ROPE_LOCAL ? (size_t)r->shape.n * ((size_t)c.rope_dim / 2) : 0;
    a.cos = r->cos + rope;
    a.sin = r->sin + rope;
    a.query_scales = (const float *)(const void *)(r->block + r->at.query_scales);
    a.sinks = w.sinks;
    a.q_norm = head_norm_of(c, w.q_norm, c.n_heads);
    a.k_norm = head_norm_of(c, w.k_norm, c.n_kv_heads);
    a.positions = in_block(r, r->at.positions);
    a.sequences = in_block(r, r->at.sequences);
    a.n = in_block(r, 4 * N_TOKENS);
    a.tiles = (const attend_tile *)(const void *)(r->block + r->at.tiles);
    a.n_tiles = in_block(r, 4 * N_TILES);
    a.pages = (const uint64_t *)(const void *)(r->block + r->at.pages) + w.table * r->at.page_stride;
    a.page_stride = run->model->n_tables * r->at.page_stride;
    a.head_at = (size_t)w.place * (size_t)c.n_kv_heads * (cache->k_bytes + cache->v_bytes);
    a.k_bytes = cache->k_bytes;
    a.v_bytes = cache->v_bytes;
    a.n_kv_heads = c.n_kv_heads;
    a.group = heads_a_kv_head(c);
    a.head_dim = c.head_dim;
    a.v_stride = cache->v_stride;
    a.rope_dim = w.rope == TL_ROPE_NONE ? 0 : c.rope_dim;
    a.window = w.window;
    a.cap = c.attention_cap;
    a.bidirectional = c.bidirectional;
    a.kind = page_kind_of(cache->type, c.head_dim);
    a.stores = r->shape.stores;
    a.n_splits = r->n_splits;
    a.partial = r->partial;
    a.arrived = r->arrived;
    if (!a.stores) {
        const gpu_grid heads = {r->shape.n, (2 * c.n_kv_heads + ATTEND_WARPS - 1) / ATTEND_WARPS, 1};
        launch(r, store_kv, heads, ATTEND_THREADS, 0, true, a);
    }
    attend_shared s;
    size_t shared = place_attend(&s, NULL, a.kind, a.head_dim, a.v_stride);
    const size_t staged = shared + SEGMENT_PAGES * (cache->k_bytes + cache->v_bytes);
    const int blocks = r->tile_limit * c.n_kv_heads * a.n_splits; // many hide each other's waits
    a.staged = a.kind == F16_FRAGMENTS && a.n_splits == r->shape.n_segments &&
               staged <= (size_t)r->device->shared_block && blocks <= 4 * r->device->info.n_processors;
    if (a.staged) shared = staged;
    launch(r, attend, {r->tile_limit, c.n_kv_heads, a.n_splits}, ATTEND_THREADS, shared, true, a);
}

static void embedding(tl_run *run) {
    cuda_run *r = run_of(run);
    const tl_config &c = run->model->config;
    const tl_matrix *w = &run->model->embedding;
    embed_arguments e = {};
    e.data = (const uint8_t *)w->data;
    e.format = w->format ? tiles_id(w->format->id) : 0;
    e.factor = factor_of(w);
    e.n_chunks = w->format ? chunks_of(w) : 0;
    e.dim = c.dim;
    e.rope_dim = c.rope_dim;
    e.tokens = run->batch->tokens ? in_block(r, r->at.tokens) : NULL;
    e.positions = in_block(r, r->at.positions);
    e.n = in_block(r, 4 * N_TOKENS);
    e.frequencies = r->frequencies;
    e.scale = c.embedding_scale;
    e.n_ropes = n_ropes(run->model);
    e.rope_scale = c.rope_scale;
    e.x = run->x;
    e.cos = r->cos;
    e.sin = r->sin;
    launch(r, embed, {r->shape.n, 1, 1}, 256, 0, false, e); // after the copies, so never before they have ended
}

#include "adapters.cuh"

// ---- a call -------------------------------------------------------------------------------------------------------------

// What this backend cannot compute, by name.
static tl_status check_model(const gpu *d, const tl_model *model, tl_message *message) {
    const tl_config &c = model->config;
    attend_shared s;
    for (int kind = F16_FRAGMENTS; kind <= PLAIN_Q8_0; kind++)
        if (place_attend(&s, NULL, (page_kind)kind, c.head_dim, (c.head_dim + 15) / 16 * 16) > (size_t)d->shared_block)
            return tl_fail(message, TL_UNSUPPORTED, "heads of %d dimensions are too wide for device %d (%s)",
                           c.head_dim, d->index, d->info.name);
    for (int l = 0; l < c.n_layers; l++) {
        const tl_layer &w = model->layers[l];
        for (int i = EXPERT_MATRICES; i < c.n_experts * EXPERT_MATRICES; i++) {
            const tl_format *one = expert_matrix(w, i)->format, *first = expert_matrix(w, i % EXPERT_MATRICES)->format;
            if (one != first)
                return tl_fail(message, TL_UNSUPPORTED,
                               "experts 0 and %d of layer %d are %s and %s: on a GPU a layer's must be alike",
                               i / EXPERT_MATRICES, l, first->name, one->name);
        }
    }
    return TL_OK;
}

static tl_status new_run(gpu *d, tl_run **run, const tl_model *model, tl_message *message) {
    const tl_status status = check_model(d, model, message);
    if (status != TL_OK) return status;
    cuda_run *r = new cuda_run();
    r->device = d;
    r->base.model = model;
    *run = &r->base;
    const size_t half = (size_t)model->config.rope_dim / 2, n_bytes = half * sizeof(double);
    void *data = NULL;
    int error = gpu_alloc(&data, n_bytes ? (size_t)n_ropes(model) * n_bytes : 8);
    r->frequencies = (double *)data;
    if (!error) error = gpu_copy_in(d->stream, data, model->rope_frequencies, n_bytes);
    if (!error && n_ropes(model) > 1)
        error = gpu_copy_in(d->stream, r->frequencies + half, model->local_rope_frequencies, n_bytes);
    std::vector<expert_weights> experts;
    for (int l = 0; l < model->config.n_layers; l++)
        for (int i = 0; i < model->config.n_experts * EXPERT_MATRICES; i++) {
            const tl_matrix *m = expert_matrix(model->layers[l], i);
            experts.push_back({(const uint8_t *)m->data, m->bias, factor_of(m)});
        }
    const size_t experts_bytes = experts.size() * sizeof(expert_weights);
    data = NULL;
    if (!error && experts_bytes) error = gpu_alloc(&data, experts_bytes);
    r->experts = (expert_weights *)data;
    if (!error && experts_bytes) error = gpu_copy_in(d->stream, data, experts.data(), experts_bytes);
    if (!error) error = gpu_wait(d->stream);
    if (!error) return TL_OK;
    release_run(r);
    *run = NULL;
    return gpu_fail(d, error, "a call", message);
}

static tl_status begin_call(gpu *d, tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *b,
                            tl_message *message) {
    int error = gpu_use(d->index);
    if (error) return gpu_fail(d, error, "a call", message);
    free_staging(d);
    if (!*run) {
        const tl_status status = new_run(d, run, model, message);
        if (status != TL_OK) return status;
    }
    cuda_run *r = run_of(*run);
    if (r->open) { // the call before was cancelled: its copies may still read the buffers that are filled below
        if (r->recording) (void)gpu_record_end(d->recorder, NULL);
        error = gpu_wait(d->stream);
        if (error) return gpu_fail(d, error, "the call before", message);
    }
    if (n_sorted(model->config.vocab_size) * b->n_candidates > MOST_MERGED)
        return tl_fail(message, TL_UNSUPPORTED, "%d candidates of %d logits are too many; ask for logits",
                       b->n_candidates, model->config.vocab_size);
    r->open = true;
    r->recording = false;
    r->error = 0;
    r->base.cache = cache;
    r->base.batch = b;
    error = prepare_call(r);
    if (!error) {
        fill_block(r, r->host_block);
        error = gpu_copy_in(d->stream, r->block, r->host_block, r->at.n_bytes);
    }
    if (!error && b->x)
        error = gpu_copy_in(d->stream, r->base.x, b->x, (size_t)b->n * (size_t)model->config.dim * sizeof(float));
    if (error) return gpu_fail(d, error, "the buffers of a call", message);
    r->record = b->tokens && !b->activations && !b->use_ends && b->n <= GRAPH_TOKENS && b->first_layer == 0 &&
                b->last_layer == model->config.n_layers;
    if (!r->record) return TL_OK;
    const auto known = r->graphs.find(r->shape);
    if (known != r->graphs.end()) {
        r->error = gpu_run(d->stream, known->second);
        return TL_REPLAYED;
    }
    error = gpu_record(d->recorder);
    if (error) return gpu_fail(d, error, "recording a call", message);
    r->recording = true;
    return TL_OK;
}

static tl_status begin_adapted(gpu *d, tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *b,
                               tl_message *message) {
    const tl_status status = begin_call(d, run, model, cache, b, message);
    return status == TL_OK ? make_table(run_of(*run), message) : status;
}

static tl_status end_call(tl_run *run, tl_message *message) {
    cuda_run *r = run_of(run);
    const gpu *d = r->device;
    const tl_batch *b = run->batch;
    r->open = false;
    if (r->recording) {
        gpu_graph graph = NULL;
        const int error = gpu_record_end(d->recorder, r->error ? NULL : &graph);
        r->recording = false;
        if (!r->error) r->error = error;
        if (!r->error) {
            r->graphs[r->shape] = graph;
            r->error = gpu_run(d->stream, graph);
        }
    }
    const size_t k = (size_t)b->n_candidates, row_bytes = k ? (2 + k) * 8 : (size_t)run->model->config.vocab_size * 4;
    const size_t n_bytes = (size_t)b->n_rows * row_bytes;
    const bool fetch = b->n_rows > 0 && (k || (r->record && b->logits));
    bool changed;
    if (fetch && !r->error) r->error = grow(&r->fetched, &r->fetched_bytes, n_bytes, true, &changed);
    if (fetch && !r->error)
        r->error = gpu_copy_out(d->stream, r->fetched, k ? (void *)r->result : (void *)r->logits, n_bytes);
    if (b->activations && !r->error)
        r->error = gpu_copy_out(d->stream, b->activations, run->x,
                                (size_t)b->n * (size_t)run->model->config.dim * sizeof(float));
    const int waited = gpu_wait(d->stream);
    if (!r->error) r->error = waited;
    if (r->error) return gpu_fail(d, r->error, "a call", message);
    if (fetch && !k) memcpy(b->logits, r->fetched, n_bytes);
    for (size_t i = 0; fetch && k && i < (size_t)b->n_rows; i++) {
        const uint64_t *row = (const uint64_t *)(const void *)(r->fetched + i * row_bytes);
        memcpy(&b->totals[i].sum, row, sizeof b->totals[i].sum);
        memcpy(&b->totals[i].largest, row + 1, sizeof b->totals[i].largest); // of 8 bytes the first 4
        for (size_t j = 0; j < k; j++) {
            tl_candidate *c = b->candidates + i * k + j;
            const uint32_t bits = candidate_bits(row[2 + j]);
            c->token = (int32_t)(uint32_t)row[2 + j];
            memcpy(&c->logit, &bits, sizeof c->logit);
        }
    }
    return TL_OK;
}

// ---- devices ------------------------------------------------------------------------------------------------------------

static gpu gpus[MAX_DEVICES];
static std::mutex gpus_lock;

// The seam's functions do not say which device they are for, so each device has its own.
template <int I> struct on_device {
    static void *alloc(size_t n_bytes) {
        void *p = NULL;
        if (gpu_use(I) || gpu_alloc(&p, n_bytes ? n_bytes : 1)) return NULL;
        if (!gpu_clear(gpus[I].stream, p, n_bytes) && !gpu_wait(gpus[I].stream)) return p;
        gpu_free(p);
        return NULL;
    }
    static void free(void *p) {
        if (p && !gpu_use(I)) gpu_free(p);
    }
    static tl_status clear(void *to, size_t n_bytes) {
        return gpu_use(I) || gpu_clear(gpus[I].stream, to, n_bytes) ? TL_MEMORY : TL_OK;
    }
    static tl_status copy(void *to, const void *from, size_t n_bytes) {
        return gpu_use(I) || gpu_copy(gpus[I].stream, to, from, n_bytes) ? TL_MEMORY : TL_OK;
    }
    static tl_status read(void *to, const void *from, size_t n_bytes) {
        const gpu_stream s = gpus[I].stream;
        return gpu_use(I) || gpu_copy_out(s, to, from, n_bytes) || gpu_wait(s) ? TL_MEMORY : TL_OK;
    }
    static tl_status write(void *to, const void *from, size_t n_bytes) {
        const gpu_stream s = gpus[I].stream;
        return gpu_use(I) || gpu_copy_in(s, to, from, n_bytes) || gpu_wait(s) ? TL_MEMORY : TL_OK;
    }
    static tl_status upload(tl_matrix *m, const tl_source *source, int threads, tl_message *message) {
        return upload_matrix(&gpus[I], m, source, threads, message);
    }
    static tl_status upload_floats(float **to, const tl_source *source, int n, tl_message *message) {
        return upload_vector(&gpus[I], to, source, n, message);
    }
    static tl_status unpack(const tl_matrix *m, float *out) { return unpack_matrix(&gpus[I], m, out); }
    static tl_status begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *b, tl_message *message) {
        return begin_call(&gpus[I], run, model, cache, b, message);
    }
    static tl_status adapted_begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *b,
                                   tl_message *message) {
        return begin_adapted(&gpus[I], run, model, cache, b, message);
    }
    static tl_status upload_of_pair(tl_pair *pair, const tl_source *a, const tl_source *b, tl_message *message) {
        return upload_pair(&gpus[I], pair, a, b, message);
    }
    static void release(tl_run *run) {
        release_adapted(run_of(run));
        release_run(run_of(run));
    }
    static const tl_backend *adapted() {
        static const tl_backend made = [] {
            tl_backend t = {};
            t.name = "cuda";
            t.begin = adapted_begin;
            t.embed = adapted_embedding;
            t.qkv = adapted_qkv;
            t.attend = attention;
            t.linear_add = adapted_linear_add;
            t.norm_glu = adapted_norm_glu;
            t.moe = adapted_moe;
            t.norm_linear = adapted_norm_linear;
            t.end = end_call;
            t.upload_pair = upload_of_pair;
            return t;
        }();
        return &made;
    }
    static const tl_backend *table() {
        static const tl_backend made = [] {
            tl_backend t = {}; // an operation that is not named here is one this backend lacks
            t.name = "cuda";
            t.most_candidates = MOST_CANDIDATES;
            t.alloc = alloc;
            t.free = free;
            t.clear = clear;
            t.copy = copy;
            t.read = read;
            t.write = write;
            t.upload = upload;
            t.upload_floats = upload_floats;
            t.unpack = unpack;
            t.begin = begin;
            t.embed = embedding;
            t.qkv = product_qkv;
            t.attend = attention;
            t.linear_add = linear_add;
            t.norm_glu = norm_glu;
            t.moe = moe;
            t.norm_linear = norm_linear;
            t.end = end_call;
            t.release = release;
            t.adapted = adapted();
            return t;
        }();
        return &made;
    }
};

template <int... I> static const tl_backend *table_of(int device, std::integer_sequence<int, I...>) {
    static const tl_backend *(*const tables[])() = {on_device<I>::table...};
    return tables[device]();
}

EXPORT int tl_cuda_abi(void) { return tl_seam_abi(); }

EXPORT int tl_cuda_device_count(tl_message *why) {
    int n = 0;
    gpu_count(&n, why->text, sizeof why->text);
    return n < MAX_DEVICES ? n : MAX_DEVICES;
}

static tl_status check_device(int device, tl_message *message) {
    tl_message why;
    const int n = tl_cuda_device_count(&why);
    if (n == 0) return tl_fail(message, TL_UNSUPPORTED, "%s", why.text);
    if (device >= 0 && device < n) return TL_OK;
    return tl_fail(message, TL_ARGUMENT, "device %d is not one of the %d there are (0 to %d)", device, n, n - 1);
}

EXPORT tl_status tl_cuda_device_info(int device, tl_cuda_info *info, tl_message *message) {
    memset(info, 0, sizeof *info);
    tl_status status = check_device(device, message);
    if (status != TL_OK) return status;
    const int error = gpu_info(device, info);
    return error ? tl_fail(message, TL_UNSUPPORTED, "device %d does not answer: %s", device, gpu_reason(error)) : TL_OK;
}

// A device is set up when it is first asked for.
static tl_status set_up(int device, tl_message *message) {
    gpu *d = &gpus[device];
    d->index = device;
    tl_status status = tl_cuda_device_info(device, &d->info, message);
    if (status != TL_OK) return status;
    if (d->info.major < 8)
        return tl_fail(message, TL_UNSUPPORTED,
                       "device %d (%s) has compute capability %d.%d; tinyllm needs 8.0 or newer", device, d->info.name,
                       d->info.major, d->info.minor);
    int error = gpu_shared_bytes(device, &d->shared_block, &d->shared_processor);
    if (!error) error = gpu_allow_shared(product<1, false>, d->shared_block);
    if (!error) error = gpu_allow_shared(product<1, true>, d->shared_block);
    if (!error) error = gpu_allow_shared(product<TOKENS, false>, d->shared_block);
    if (!error) error = gpu_allow_shared(product<TOKENS, true>, d->shared_block);
    if (!error) error = gpu_allow_shared(attend, d->shared_block);
    if (!error) error = gpu_allow_shared(prepare, d->shared_block);
    if (!error) error = gpu_allow_shared(add_normed, d->shared_block);
    if (!error) error = gpu_allow_shared(route, d->shared_block);
    if (!error) error = gpu_allow_shared(add_visits, d->shared_block);
    if (!error) error = gpu_allow_shared(sort_pieces, d->shared_block);
    if (!error) error = gpu_allow_shared(merge_pieces, d->shared_block);
    if (!error) error = gpu_allow_shared(sum_exponentials, d->shared_block);
    if (!error) error = gpu_allow_shared(store_kv, d->shared_block);
    if (!error) error = gpu_allow_shared(embed, d->shared_block);
    if (!error) error = gpu_allow_shared(low_rank_in, d->shared_block);
    if (!error) error = gpu_allow_shared(low_rank_out, d->shared_block);
    if (!error) error = gpu_allow_shared(finish, d->shared_block);
    for (int i = 0; i < n_quantized_formats && !error; i++) {
        size_t step;
        const product_kernel kernel = many_kernel(quantized_facts[i].id, &step);
        if (kernel) error = gpu_allow_shared(kernel, d->shared_block);
    }
    d->waits = d->info.major >= 9 && gpu_waits(attend);
    if (!error) error = gpu_stream_create(&d->recorder);
    if (!error) error = gpu_stream_create(&d->stream);
    return error ? gpu_fail(d, error, "being set up", message) : TL_OK;
}

EXPORT tl_status tl_cuda_backend(int device, const tl_backend **backend, tl_message *message) {
    std::lock_guard<std::mutex> locked(gpus_lock);
    *backend = NULL;
    tl_status status = check_device(device, message);
    if (status == TL_OK && !gpus[device].stream) status = set_up(device, message);
    if (status == TL_OK) *backend = table_of(device, std::make_integer_sequence<int, MAX_DEVICES>());
    return status;
}

EXPORT tl_status tl_cuda_read_bandwidth(int device, double *gb_s, size_t n_bytes, int repetitions,
                                        tl_message *message) {
    const size_t n_read = n_bytes / READ_UNIT_BYTES * READ_UNIT_BYTES;
    double seconds = 0;
    tl_status status = check_device(device, message);
    if (status != TL_OK) return status;
    if (n_read == 0 || repetitions < 1)
        return tl_fail(message, TL_ARGUMENT, "%zu bytes (at least %zu), %d repetitions (at least 1)", n_bytes,
                       READ_UNIT_BYTES, repetitions);
    const int error = read_timed(device, &seconds, n_read, repetitions);
    if (error)
        return tl_fail(message, gpu_out_of_memory(error) ? TL_MEMORY : TL_UNSUPPORTED,
                       "%zu bytes of device %d could not be read: %s", n_read, device, gpu_reason(error));
    *gb_s = 1e-9 * (double)n_read * repetitions / seconds;
    return TL_OK;
}
