// cpu/attend.c: who computes which part of attention: queries in tiles, positions in segments, and the segments' results
// put together in ascending order, so that the bits do not depend on who did what. Includes cpu.h; the arithmetic is in
// kernels/attention.inc.
#include "cpu/cpu.h"
#include <math.h>
#include <string.h>

// Queries that share a sequence and a kv head's keys, at most 8; the tiles of all kv heads are alike. And what each token
// may attend to: up to itself, or to the end of its sequence.
void tl_cpu_tiles(tl_cpu_run *r) {
    const tl_batch *b = r->base.batch;
    const int bidirectional = r->base.model->config.bidirectional;
    r->n_tiles = 0;
    for (int t = 0, end; t < b->n; t = end) {
        for (end = t + 1; end < b->n && b->sequences[end] == b->sequences[t];) end++;
        for (int c = 0; c < (end - t) * r->group; c += TL_COLUMNS) {
            r->tiles[r->n_tiles++] = (tl_tile){t, c, tl_min(TL_COLUMNS, (end - t) * r->group - c)};
        }
        for (int i = t; i < end; i++) r->last[i] = b->positions[bidirectional ? end - 1 : i];
    }
}

// A query's running result over a split stands here: [v_stride] sums, then the maximum and the sum of the weights.
static float *running_result(const tl_cpu_run *r, int token, int head, int split) {
    const size_t n_heads = (size_t)r->base.model->config.n_heads, stride = (size_t)r->v_stride + 16;
    return r->partial + (((size_t)token * n_heads + (size_t)head) * (size_t)r->n_splits + (size_t)split) * stride;
}

static void merge(const tl_cpu_run *r, float *into, const float *out, float max, float sum) {
    tl_isa()->merge(into, into + r->v_stride, into + r->v_stride + 1, out, max, sum, r->v_stride);
}

// The first position that a token attends to in a layer, and the last.
static int first_seen(const tl_cpu_run *r, int token) {
    const int window = r->base.model->layers[r->layer].window;
    return window ? tl_max(0, r->base.batch->positions[token] + 1 - window) : 0;
}

static int last_seen(const tl_cpu_run *r, int token) {
    const int window = r->base.model->layers[r->layer].window, position = r->base.batch->positions[token];
    return window && r->last[token] - position >= window ? position + window - 1 : r->last[token];
}

// Of a tile's column.
static int token_of(const tl_cpu_run *r, const tl_tile *tile, int column) {
    return tile->token + (tile->first + column) / r->group;
}

// A unit's work: one tile, one kv head, and one split: a segment, or all of them.
typedef struct span {
    const tl_tile *tile;
    int kv_head, split, first, last; // segments [first, last)
} span;

static span span_of(const tl_cpu_run *r, int unit) {
    const int n_kv_heads = r->base.model->config.n_kv_heads, split = unit % r->n_splits;
    const tl_tile *tile = &r->tiles[unit / r->n_splits / n_kv_heads];
    const int first = first_seen(r, token_of(r, tile, 0)) / TL_SEGMENT;
    const int end = last_seen(r, token_of(r, tile, tile->n - 1)) / TL_SEGMENT + 1;
    return (span){tile, unit / r->n_splits % n_kv_heads, split, tl_max(r->n_splits > 1 ? split : 0, first),
                  r->n_splits > 1 ? tl_min(split + 1, end) : end};
}

// The pages of a segment, as far as the tile's last column sees: its keys, and its values.
static void find_pages(const tl_cpu_run *r, const span *at, int segment, const uint8_t **k, const uint8_t **v) {
    const tl_cache *cache = r->base.cache;
    const int first = segment * (TL_SEGMENT / TL_PAGE);
    const int last = last_seen(r, token_of(r, at->tile, at->tile->n - 1)) / TL_PAGE;
    const int32_t *pages = tl_cpu_pages(r, at->tile->token);
    for (int i = 0; i < TL_SEGMENT / TL_PAGE && first + i <= last; i++) {
        k[i] = tl_cache_head(cache, pages[first + i], r->base.model->layers[r->layer].place, at->kv_head);
        v[i] = k[i] + cache->k_bytes;
    }
}

static void attend_unit(void *data, int unit, int thread) {
    tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const span at = span_of(r, unit);
    const tl_tile *tile = at.tile;
    size_t q[TL_COLUMNS]; // where a column's query begins among all the call's
    float *running[TL_COLUMNS];
    int first[TL_COLUMNS], end[TL_COLUMNS]; // the positions that it sees
    for (int i = 0; i < tile->n; i++) {
        const int token = token_of(r, tile, i);
        const int head = at.kv_head * r->group + (tile->first + i) % r->group;
        q[i] = (size_t)token * r->q_width + (size_t)head * (size_t)c->head_dim;
        first[i] = first_seen(r, token);
        end[i] = last_seen(r, token) + 1;
        running[i] = running_result(r, token, head, at.split);
        memset(running[i], 0, ((size_t)r->v_stride + 2) * sizeof(float));
        running[i][r->v_stride] = -INFINITY;
    }
    const int more = unit + 1 < r->n_tiles * c->n_kv_heads * r->n_splits;
    const span after = more ? span_of(r, unit + 1) : (span){0};
    for (int s = at.first; s < at.last; s++) {
        tl_segment segment = {
            .head_dim = c->head_dim, .v_stride = r->v_stride, .type = r->base.cache->type, .cap = c->attention_cap};
        int column[TL_COLUMNS];
        for (int i = 0; i < tile->n; i++) { // those that see something of the segment
            const int to = tl_min(end[i] - s * TL_SEGMENT, TL_SEGMENT), n = segment.n_columns;
            const int from = tl_max(first[i] - s * TL_SEGMENT, 0);
            if (to <= from) continue;
            segment.q[n] = r->base.q + q[i];
            segment.q8[n] = r->in.q + q[i];
            segment.groups[n] = r->in.groups + q[i] / TL_Q;
            segment.from[n] = from;
            segment.to[n] = to;
            segment.out[n] = r->part + ((size_t)thread * TL_COLUMNS + (size_t)n) * (size_t)r->v_stride;
            column[segment.n_columns++] = i;
        }
        find_pages(r, &at, s, segment.k, segment.v);
        if (s + 1 < at.last) // what this thread reads next, or most likely so
            find_pages(r, &at, s + 1, segment.next_k, segment.next_v);
        else if (after.first < after.last)
            find_pages(r, &after, after.first, segment.next_k, segment.next_v);
        tl_isa()->segment(&segment);
        for (int n = 0; n < segment.n_columns; n++)
            merge(r, running[column[n]], segment.out[n], segment.max[n], segment.sum[n]);
    }
}

// A token's heads: the splits merged, a sink last, then out = sum / weight (+ 0: underflow leaves no negative zeros).
static void attend_finish(void *data, int t, int thread) {
    tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const int first = tl_max(1, first_seen(r, t) / TL_SEGMENT);
    const int n_splits = r->n_splits > 1 ? last_seen(r, t) / TL_SEGMENT + 1 : 1;
    const float *sinks = r->base.model->layers[r->layer].sinks;
    float *none = r->part + (size_t)thread * TL_COLUMNS * (size_t)r->v_stride; // what a sink stands for: no value
    if (sinks) memset(none, 0, (size_t)r->v_stride * sizeof(float));
    for (int h = 0; h < c->n_heads; h++) {
        float *result = running_result(r, t, h, 0);
        float *out = r->base.attended + ((size_t)t * (size_t)c->n_heads + (size_t)h) * (size_t)c->head_dim;
        for (int s = first; s < n_splits; s++) {
            const float *part = running_result(r, t, h, s);
            merge(r, result, part, part[r->v_stride], part[r->v_stride + 1]);
        }
        if (sinks) merge(r, result, none, sinks[h], 1);
        for (int d = 0; d < c->head_dim; d++) out[d] = result[d] / result[r->v_stride + 1] + 0.0f;
    }
    const size_t row = (size_t)t * r->q_width;
    if (r->base.model->layers[r->layer].w_attention_gate.data)
        tl_isa()->sigmoid_mul(r->base.attended + row, r->gate + row, (int)r->q_width);
}

void tl_cpu_attend(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const int n = run->batch->n, threads = run->batch->threads;
    r->layer = layer;
    tl_parallel(threads, r->n_tiles * run->model->config.n_kv_heads * r->n_splits, attend_unit, r);
    tl_parallel(n < TL_FEW_TOKENS ? 1 : threads, n, attend_finish, r);
}
