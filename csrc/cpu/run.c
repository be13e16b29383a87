// cpu/run.c: a call's state on the CPU: its buffers in one arena, its rotations. Includes cpu.h, numeric.h.
#include "cpu/cpu.h"
#include "numeric.h"
#include <string.h>

// Gives every buffer its place behind base (or only adds them up, where base is NULL); returns the bytes.
static size_t place_buffers(tl_cpu_run *r, char *base) {
    const tl_config *c = &r->base.model->config;
    const tl_batch *b = r->base.batch;
    const size_t n = (size_t)b->n, width = r->q_width, kv = r->kv_width, dim = (size_t)c->dim, ff = (size_t)c->ff_dim;
    const size_t experts = (size_t)c->n_experts, visits = n * (size_t)c->n_experts_used;
    const tl_delta_sizes *d = &c->delta;
    const size_t channels = r->base.model->n_states ? (size_t)tl_delta_channels(d) : 0;
    const size_t v_width = r->base.model->n_states ? (size_t)d->v_heads * (size_t)d->v_dim : 0;
    const size_t mixed = width > v_width ? width : v_width; // what leaves attention, or what stands for it
    const size_t widest = dim > mixed ? dim : mixed, rows = experts ? visits : n; // of the feed-forward
    const size_t n_in = n * widest, n_ff = rows * (ff > dim ? ff : dim), n_q = n_in > n_ff ? n_in : n_ff;
    size_t used = 0;
#define PLACE(field, type, count)                                                                                      \
    r->field = base ? (type *)(void *)(base + used) : NULL;                                                            \
    used += ((size_t)(count) * sizeof(type) + 63) / 64 * 64
    PLACE(base.x, float, n *dim);
    PLACE(base.q, float, n *width);
    PLACE(base.attended, float, n *mixed);
    PLACE(base.hidden, float, rows *ff);
    PLACE(up, float, rows *ff);
    PLACE(k, float, n *kv);
    PLACE(v, float, n *kv);
    PLACE(normed, float, n *dim);
    PLACE(gate, float, c->gated_attention ? n * width : 0);
    PLACE(mixed, float, n *channels);
    PLACE(convolved, float, n *channels);
    PLACE(gates, float, channels ? n * 2 * (size_t)d->v_heads : 0);
    const size_t n_angles = n * (size_t)c->rope_dim / 2 * (r->base.model->local_rope_frequencies ? 2 : 1);
    PLACE(cos, float, n_angles);
    PLACE(sin, float, n_angles);
    PLACE(in.q, int8_t, n_q);
    PLACE(in.groups, tl_q_group, n_q / TL_Q);
    r->in.tiles = NULL;
    if (tl_isa()->arrange) {
        const size_t most_k = widest > ff ? widest : ff;
        PLACE(in.tiles, int8_t, n_q + 48 * most_k); // TL_TILES_BYTES of whatever rows and k
        PLACE(in.scales, float, (n_q + 16 * most_k) / TL_Q * 4);
    }
    PLACE(visits, float, visits *dim);
    PLACE(routing.scores, float, n *experts);
    PLACE(routing.experts, int, visits);
    PLACE(routing.weights, float, visits);
    PLACE(routing.rows, int, visits);
    PLACE(routing.tokens, int, visits);
    PLACE(routing.first_row, int, experts + 1);
    PLACE(routing.active, int, experts);
    PLACE(tiles, tl_tile, n * (size_t)r->group);
    PLACE(last, int, n);
    PLACE(partial, float, n *(size_t)c->n_heads *(size_t)r->n_splits *((size_t)r->v_stride + 16));
    PLACE(part, float, (size_t)b->threads * TL_COLUMNS * (size_t)r->v_stride);
    return used;
}

static void rotations(void *data, int t, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const tl_model *model = r->base.model;
    const double *frequencies[] = {model->rope_frequencies, model->local_rope_frequencies};
    const int half = c->rope_dim / 2, n = r->base.batch->n;
    for (int table = 0; table < 2 && frequencies[table]; table++)
        for (int i = 0, at = (table * n + t) * half; i < half; i++) {
            const float scale = table == 0 ? c->rope_scale : 1;
            double sin, cos;
            tl_sincos(r->base.batch->positions[t] * frequencies[table][i], &sin, &cos);
            r->cos[at + i] = (float)cos * scale;
            r->sin[at + i] = (float)sin * scale;
        }
}

tl_status tl_cpu_begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *b, tl_message *message) {
    tl_cpu_run *r = (tl_cpu_run *)*run;
    if (!r && !(r = tl_alloc(sizeof *r))) return tl_fail(message, TL_MEMORY, "no memory for a call");
    *run = &r->base;
    r->base.model = model;
    r->base.cache = cache;
    r->base.batch = b;
    r->group = model->config.n_heads / model->config.n_kv_heads;
    r->v_stride = cache->v_stride;
    r->q_width = (size_t)model->config.n_heads * (size_t)model->config.head_dim;
    r->kv_width = (size_t)model->config.n_kv_heads * (size_t)model->config.head_dim;
    int longest = 0;
    for (int t = 0; t < b->n; t++) longest = tl_max(longest, b->positions[t] / TL_SEGMENT + 1);
    int n_units = (b->n * r->group + TL_COLUMNS - 1) / TL_COLUMNS * model->config.n_kv_heads;
    r->n_splits = n_units < TL_UNITS_THREAD * b->threads ? longest : 1;
    size_t needed = place_buffers(r, NULL);
    if (needed > r->arena_bytes) {
        void *arena = r->arena;
        r->arena = NULL; // first: a process forked in the middle has this memory as it stands
        r->arena_bytes = 0;
        tl_free(arena);
        r->arena = tl_alloc(needed);
        r->arena_bytes = r->arena ? needed : 0;
        if (!r->arena)
            return tl_fail(message, TL_MEMORY, "no memory for the %zu bytes that %d tokens need", needed, b->n);
    }
    place_buffers(r, r->arena);
    tl_cpu_tiles(r);
    tl_parallel(b->n < TL_FEW_TOKENS ? 1 : b->threads, b->n, rotations, r);
    return TL_OK;
}

tl_status tl_cpu_end(tl_run *run, tl_message *message) {
    (void)message;
    const tl_batch *b = run->batch;
    size_t dim = (size_t)run->model->config.dim;
    if (b->activations) memcpy(b->activations, run->x, (size_t)b->n * dim * sizeof(float));
    return TL_OK;
}

void tl_cpu_release(tl_run *run) {
    tl_free(((tl_cpu_run *)run)->arena);
    tl_free(((tl_cpu_run *)run)->low);
    tl_free(run);
}
