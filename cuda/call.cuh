// call.cuh: a call's state on the device. What changes from call to call (tokens, masks, pages) goes as one block of
// integers into a fixed place, so that the launches of a call can be recorded as a graph and run again by the next call of
// the same shape: as many tokens (rounded up to a power of two) and segments. Includes gpu.h, load.cuh.
#ifndef TINYLLM_CUDA_CALL_CUH
#define TINYLLM_CUDA_CALL_CUH

#include "gpu.h"
#include "load.cuh"
#include <map>
#include <tuple>

#define GRAPH_TOKENS 64 // calls of more are not recorded: their kernels are long
#define LOGIT_ROWS   64 // rows of logits computed at a time

// What decides which kernels a call launches, and with which arguments.
struct call_shape {
    int n, n_segments, n_rows; // rounded up
    bool stores;               // every sequence has one token
    int cache_type, n_candidates;
    int mask_words; // of a row; 0: every token may be a candidate
    bool operator<(const call_shape &o) const {
        return std::tie(n, n_segments, n_rows, stores, cache_type, n_candidates, mask_words) <
               std::tie(o.n, o.n_segments, o.n_rows, o.stores, o.cache_type, o.n_candidates, o.mask_words);
    }
};

// A call's integers: where each array stands in the block, in bytes.
struct call_block {
    size_t tokens, positions, sequences, rows, query_scales, allowed, tiles, pages, n_bytes;
    int page_stride; // pages of a table
};
enum { N_TOKENS, N_ROWS, N_TILES, N_COUNTS = 4 }; // the block's first integers

struct cuda_run {
    tl_run base;
    gpu *device;
    int error;              // the first that an operation met: end reports it
    bool open;              // begun and not ended
    bool recording, record; // a graph is being recorded; this call's is to be
    call_shape shape;
    call_block at;
    uint8_t *block, *host_block; // on the device; pinned
    size_t block_bytes, host_block_bytes;
    uint8_t *arena; // every buffer below, and base's
    size_t arena_bytes;
    int capacity, logit_rows, n_units, n_parts; // what the arena is for: tokens, rows, (tile, kv head)s, their splits
    int candidates;                             // of a row
    float *k, *v, *cos, *sin, *logits, *partial;
    float *added;      // what attention or feed-forward gives, until it is added to x
    uint8_t *prepared; // activations of many tokens
    float *scores;     // [n, n_experts]
    routing to;
    expert_weights *experts; // [layers, experts, EXPERT_MATRICES], as long as the run
    int *arrived;
    uint64_t *best, *result; // candidates.cuh, of up to LOGIT_ROWS rows
    float *largest, *sum_parts;
    int *row_arrived;
    double *frequencies; // [n_ropes, rope_dim / 2]
    uint8_t *fetched;    // pinned: logits, or candidates with their totals
    size_t fetched_bytes;
    std::map<call_shape, gpu_graph> graphs;
    int n_tiles, tile_limit;     // of this call: there are; there may be
    int n_splits;                // blocks that share a tile's segments
    struct adapted_run *adapted; // of calls with adapters (adapters.cuh), or NULL
};

static int round_up_to_power(int n) {
    int power = 1;
    while (power < n) power *= 2;
    return power;
}

static void forget_graphs(cuda_run *r) {
    for (auto &entry : r->graphs) gpu_graph_free(entry.second);
    r->graphs.clear();
}

static int q_width(const tl_config &c) { return c.n_heads * c.head_dim; }
static int kv_width(const tl_config &c) { return c.n_kv_heads * c.head_dim; }
static int heads_a_kv_head(const tl_config &c) { return c.n_heads / c.n_kv_heads; }
static int n_ropes(const tl_model *model) { return model->local_rope_frequencies ? 2 : 1; }

// Pieces of `size` that n visits may take at most: an expert's last one need not be full.
static int most_pieces(const tl_config &c, int n, int size) {
    const int most = (int)((n + (int64_t)c.n_experts * (size - 1)) / size);
    return n < most ? n : most;
}

// Places the buffers behind base (or only counts, base NULL); returns the bytes.
static size_t place_buffers(cuda_run *r, uint8_t *base) {
    const tl_config &c = r->base.model->config;
    const size_t n = (size_t)r->capacity, experts = (size_t)c.n_experts;
    const size_t n_angles = n * (size_t)n_ropes(r->base.model) * ((size_t)c.rope_dim / 2);
    const size_t visits = n * (size_t)c.n_experts_used, rows_ff = experts ? visits : n; // of the feed-forward
    const int v_stride = (c.head_dim + 15) / 16 * 16;
    size_t used = 0;
#define PLACE(field, type, n_bytes)                                                                                    \
    r->field = (type *)(void *)(base + used);                                                                          \
    used += ((size_t)(n_bytes) + 255) / 256 * 256
    PLACE(base.x, float, n *(size_t)c.dim * 4);
    PLACE(base.q, float, n *(size_t)q_width(c) * 4);
    PLACE(base.attended, float, n *(size_t)q_width(c) * 4);
    PLACE(base.hidden, float, rows_ff *(size_t)c.ff_dim * 4);
    PLACE(added, float, (c.norm_place == TL_NORM_BEFORE ? visits : rows_ff) * (size_t)c.dim * 4);
    PLACE(k, float, n *(size_t)kv_width(c) * 4);
    PLACE(v, float, n *(size_t)kv_width(c) * 4);
    PLACE(cos, float, n_angles * 4);
    PLACE(sin, float, n_angles * 4);
    PLACE(logits, float, (size_t)r->logit_rows *(size_t)c.vocab_size * 4);
    int widest = c.dim > c.ff_dim ? c.dim : c.ff_dim;
    if (q_width(c) > widest) widest = q_width(c);
    activations a;
    const size_t for_all = place_activations(&a, NULL, (int)n, widest, true, true);
    const size_t of_visits = place_activations(&a, NULL, (int)visits, c.dim > c.ff_dim ? c.dim : c.ff_dim, true, true);
    PLACE(prepared, uint8_t, for_all > of_visits ? for_all : of_visits);
    PLACE(scores, float, n * experts * 4);
    PLACE(to.experts, int, visits * 4);
    PLACE(to.weights, float, visits * 4);
    PLACE(to.rows, int, visits * 4);
    PLACE(to.tokens, int, visits * 4);
    PLACE(to.pieces, piece, (size_t)most_pieces(c, (int)visits, TOKENS) * sizeof(piece));
    PLACE(to.many_pieces, piece, (size_t)most_pieces(c, (int)visits, MANY_TOKENS) * sizeof(piece));
    PLACE(to.counts, int, N_ROUTED * 4);
    PLACE(to.visits, int, (experts + 1) * 4);
    PLACE(arrived, int, (size_t)r->n_units * sizeof(int));
    PLACE(row_arrived, int, LOGIT_ROWS * sizeof(int));
    const size_t rows = r->candidates > 0 ? (size_t)r->logit_rows : 0, k = (size_t)r->candidates;
    PLACE(best, uint64_t, rows *(size_t)n_sorted(c.vocab_size) * k * 8);
    PLACE(largest, float, rows *(size_t)n_sorted(c.vocab_size) * 4);
    PLACE(result, uint64_t, rows * (2 + k) * 8);
    PLACE(sum_parts, float, rows *(size_t)n_summed(c.vocab_size) * SUM_LANES * 4);
    PLACE(partial, float, (size_t)r->n_parts *partial_size(v_stride) * 4);
#undef PLACE
    return used;
}

// The pages stand last: how many sequences there are is no part of the shape. (A power of two, so that it seldom grows.)
static call_block block_of(const call_shape &s, int tile_capacity, int n_page_tables) {
    call_block b = {};
    const size_t n = (size_t)s.n;
    b.tokens = N_COUNTS * 4;
    b.positions = b.tokens + 4 * n;
    b.sequences = b.positions + 4 * n;
    b.rows = b.sequences + 4 * n;
    b.query_scales = b.rows + 4 * n;
    b.allowed = b.query_scales + 4 * n;
    b.tiles = b.allowed + 4 * (size_t)s.n_rows * (size_t)s.mask_words;
    b.page_stride = s.n_segments * SEGMENT_PAGES;
    b.pages = (b.tiles + (size_t)tile_capacity * sizeof(attend_tile) + 7) / 8 * 8;
    b.n_bytes = b.pages + (size_t)n_page_tables * (size_t)b.page_stride * 8;
    return b;
}

// A buffer of at least n_bytes, new if it must be; `changed` says so.
template <class T> static int grow(T **buffer, size_t *has, size_t n_bytes, bool pinned, bool *changed) {
    if (n_bytes <= *has) return 0;
    void *p = NULL;
    if (*buffer) pinned ? gpu_free_pinned(*buffer) : gpu_free(*buffer);
    *buffer = NULL;
    *has = 0;
    *changed = true;
    const int error = pinned ? gpu_alloc_pinned(&p, n_bytes) : gpu_alloc(&p, n_bytes);
    if (error) return error;
    *buffer = (T *)p;
    *has = n_bytes;
    return 0;
}

// What a token's queries are multiplied by.
static float query_scale(const tl_config &c, int position) {
    if (c.query_growth == 0) return c.attention_scale;
    return c.attention_scale * (float)(1 + c.query_growth * log(1 + position / c.query_span));
}

// Writes the call's integers: the sequences that have tokens are numbered anew, pages become addresses.
static void fill_block(cuda_run *r, uint8_t *to) {
    const tl_batch *b = r->base.batch;
    const tl_cache *cache = r->base.cache;
    const tl_config &c = r->base.model->config;
    const int group = heads_a_kv_head(c), n_tables = r->base.model->n_tables;
    float *query_scales = (float *)(void *)(to + r->at.query_scales);
    int *counts = (int *)(void *)to, *sequences = (int *)(void *)(to + r->at.sequences);
    attend_tile *tiles = (attend_tile *)(void *)(to + r->at.tiles);
    uint64_t *pages = (uint64_t *)(void *)(to + r->at.pages);
    if (b->tokens) memcpy(to + r->at.tokens, b->tokens, (size_t)b->n * 4);
    memcpy(to + r->at.positions, b->positions, (size_t)b->n * 4);
    if (b->n_rows) memcpy(to + r->at.rows, b->rows, (size_t)b->n_rows * 4);
    if (b->allowed) memcpy(to + r->at.allowed, b->allowed, (size_t)b->n_rows * (size_t)r->shape.mask_words * 4);
    for (int t = 0; t < b->n; t++) query_scales[t] = query_scale(c, b->positions[t]);
    int n_sequences = 0;
    r->n_tiles = 0;
    for (int t = 0, end; t < b->n; t = end, n_sequences++) {
        for (end = t; end < b->n && b->sequences[end] == b->sequences[t]; end++) sequences[end] = n_sequences;
        for (int column = 0; column < (end - t) * group; column += TOKENS) {
            const int left = (end - t) * group - column, n = left < TOKENS ? left : TOKENS;
            tiles[r->n_tiles++] = {t + column / group, column % group, n, b->positions[end - 1], n_sequences};
        }
        const int32_t *tables = b->page_tables + (size_t)b->sequences[t] * (size_t)n_tables * (size_t)b->max_pages;
        for (int table = 0; table < n_tables; table++)
            for (int i = 0; i <= b->positions[end - 1] / PAGE_TOKENS; i++) {
                const int page = tables[(size_t)table * (size_t)b->max_pages + (size_t)i];
                const uint8_t *slab = (const uint8_t *)cache->slabs[page / cache->pages_per_slab];
                pages[(n_sequences * n_tables + table) * r->at.page_stride + i] =
                    (uint64_t)(uintptr_t)(slab + (size_t)(page % cache->pages_per_slab) * cache->page_bytes);
            }
    }
    counts[N_TOKENS] = b->n;
    counts[N_ROWS] = b->n_rows;
    counts[N_TILES] = r->n_tiles;
}

// The call's shape, and room for it.
static int prepare_call(cuda_run *r) {
    const tl_batch *b = r->base.batch;
    const tl_config &c = r->base.model->config;
    int longest = 1, n_sequences = 0;
    for (int t = 0; t < b->n; t++) {
        const int n = b->positions[t] / SEGMENT + 1;
        if (n > longest) longest = n;
        n_sequences += t == 0 || b->sequences[t] != b->sequences[t - 1];
    }
    r->shape = {round_up_to_power(b->n),
                round_up_to_power(longest),
                b->logits || b->n_candidates ? round_up_to_power(b->n_rows) : 0,
                n_sequences == b->n,
                r->base.cache->type,
                b->n_candidates,
                b->allowed ? mask_words(c.vocab_size) : 0};
    // Tiles: every sequence may begin one that is not full.
    const int tiles = r->shape.n * ((heads_a_kv_head(c) + TOKENS - 1) / TOKENS);
    const int units = tiles * c.n_kv_heads;
    r->tile_limit = tiles;
    r->n_splits = units < 4 * r->device->info.n_processors ? r->shape.n_segments : 1;
    const int parts = r->n_splits > 1 ? units * r->n_splits : 0;
    const int logit_rows = r->shape.n_rows < LOGIT_ROWS ? r->shape.n_rows : LOGIT_ROWS;
    const bool fits = r->shape.n <= r->capacity && units <= r->n_units && parts <= r->n_parts &&
                      logit_rows <= r->logit_rows && b->n_candidates <= r->candidates;
    bool changed = !fits;
    int error = 0;
    if (!fits) { // it only grows, in each of its measures, so that recorded graphs keep their places
        r->capacity = r->shape.n > r->capacity ? r->shape.n : r->capacity;
        r->n_units = units > r->n_units ? units : r->n_units;
        r->n_parts = parts > r->n_parts ? parts : r->n_parts;
        r->logit_rows = logit_rows > r->logit_rows ? logit_rows : r->logit_rows;
        r->candidates = b->n_candidates > r->candidates ? b->n_candidates : r->candidates;
        forget_graphs(r);
        error = grow(&r->arena, &r->arena_bytes, place_buffers(r, NULL), false, &changed);
        if (error) {
            r->capacity = 0; // the next call tries again
            return error;
        }
        place_buffers(r, r->arena);
        error = gpu_clear(r->device->stream, r->arrived, (size_t)r->n_units * sizeof(int));
        if (!error) error = gpu_clear(r->device->stream, r->row_arrived, LOGIT_ROWS * sizeof(int));
        if (!error) error = gpu_clear(r->device->stream, r->to.visits, ((size_t)c.n_experts + 1) * sizeof(int));
    }
    r->at = block_of(r->shape, tiles, round_up_to_power(n_sequences) * r->base.model->n_tables);
    changed = false;
    if (!error) error = grow(&r->host_block, &r->host_block_bytes, r->at.n_bytes, true, &changed);
    if (!error) error = grow(&r->block, &r->block_bytes, r->at.n_bytes, false, &changed);
    if (changed) forget_graphs(r);
    return error;
}

static const int *in_block(const cuda_run *r, size_t at) { return (const int *)(const void *)(r->block + at); }

static void release_run(cuda_run *r) {
    (void)gpu_use(r->device->index);
    if (r->recording) (void)gpu_record_end(r->device->recorder, NULL);
    (void)gpu_wait(r->device->stream);
    forget_graphs(r);
    if (r->arena) gpu_free(r->arena);
    if (r->block) gpu_free(r->block);
    if (r->host_block) gpu_free_pinned(r->host_block);
    if (r->frequencies) gpu_free(r->frequencies);
    if (r->experts) gpu_free(r->experts);
    if (r->fetched) gpu_free_pinned(r->fetched);
    delete r;
}

#endif
