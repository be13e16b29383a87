// kernels/attention.cuh: norms of heads, RoPE, keys and values into their pages, and attention over the pages. A block takes
// a tile of up to 8 columns (tokens x heads that share a kv head) against segments of 256 positions: either one segment, and
// the last block of a tile merges them all, or every segment one after another, but for those wholly behind the layer's
// window. Within a segment: scores, one maximum, exp, a sum in fixed order, values in order of position; segments merge in
// ascending order. So who computes what never matters.
//
// F16 pages of heads of a multiple of 16 are kept as A fragments of mma.m16n8k16, and queries and weights are cut into two
// f16 numbers each, whose products together keep about 22 bits. Other pages are plain numbers and meet float32 arithmetic.
// Includes activations.cuh, numeric.cuh.
#ifndef TINYLLM_CUDA_ATTENTION_CUH
#define TINYLLM_CUDA_ATTENTION_CUH

#include "activations.cuh"
#include "numeric.cuh"

#define PAGE_TOKENS    64
#define SEGMENT        256
#define SEGMENT_PAGES  (SEGMENT / PAGE_TOKENS)
#define ATTEND_THREADS 128
#define ATTEND_WARPS   4

// How pages keep keys and values. A page's head is [4][16 tokens] of keys, then of values, in any of them.
enum page_kind {
    F16_FRAGMENTS, // keys [4][head_dim / 16] A fragments of 16 tokens x 16; values [4][v_stride / 16] of 16 x 16 tokens
    PLAIN_F32,     // keys [64][head_dim], values [64][v_stride]
    PLAIN_F16,
    PLAIN_Q8_0 // the file format's blocks of 32: f16 scale, 32 int8
};

BOTH page_kind page_kind_of(int type, int head_dim) {
    return type == 8 ? PLAIN_Q8_0 : type == 0 ? PLAIN_F32 : head_dim % 16 ? PLAIN_F16 : F16_FRAGMENTS;
}

// How heads are normed before RoPE, or after it.
struct head_norm {
    row_norm norm;     // of the first head
    int weight_stride; // from a head's weights to the next one's
    int n_together;    // heads that are one row: 1 or all
    bool late;         // after RoPE
    float limit;       // numbers are kept within it first; 0: as they are
};

// Queries of one sequence and kv head: columns [first, first + n) of (tokens, from `token` on) x (heads of the group).
// last: the sequence's last position in the call.
struct attend_tile {
    int token, first, n, last, sequence;
};

struct attend_arguments {
    const float *q, *k, *v;    // [n, heads or kv heads, head_dim] as the products left them
    float *out;                // [n, heads, head_dim]
    const float *cos, *sin;    // [n, rope_dim / 2]
    const float *query_scales; // [n] what queries are multiplied by
    const float *sinks;        // [heads] a score more in each head's softmax, with no value; or NULL
    head_norm q_norm, k_norm;
    const int *positions, *sequences, *n;
    const attend_tile *tiles;
    const int *n_tiles;
    const uint64_t *pages; // addresses of the layer's pages, a sequence's page_stride after the one before it
    int page_stride;
    size_t head_at, k_bytes, v_bytes; // the layer's first head in a page; a head's keys, values
    int n_kv_heads, group, head_dim, v_stride, rope_dim;
    page_kind kind;
    int window;         // positions a token attends to, itself among them; 0: all
    float cap;          // scores become cap * tanh(score / cap); 0: as they are
    bool bidirectional; // tokens attend to those behind them, too
    bool stores;        // every sequence has one token here: its block stores the key and value as well
    bool staged;        // F16_FRAGMENTS and one segment a block: all its keys and values are fetched at once
    int n_splits;       // blocks a tile at most; 1: a block goes through all segments
    float *partial;     // [tiles, kv heads, splits] of PARTIAL_SIZE floats
    int *arrived;       // [tiles, kv heads], zeros between kernels
};

BOTH size_t partial_size(int v_stride) { return (size_t)TOKENS * ((size_t)v_stride + 2); }

// ---- norm, RoPE, and into the pages -------------------------------------------------------------------------------------

// A number within the limit, a NaN as it is.
DEVICE float limited(float x, float limit) { return limit == 0 ? x : x > limit ? limit : x < -limit ? -limit : x; }

// A head's numbers as the products left them, with what its norm makes of them.
struct head_numbers {
    const float *x, *weight;
    float mean, scale, limit;
    bool late;
};
DEVICE float number_of(const head_numbers &h, int d) {
    const float x = limited(h.x[d], h.limit);
    return h.weight && !h.late ? (x - h.mean) * h.scale * h.weight[d] : x;
}

// A warp finds a head's, row being all of the token's heads. Sums: a lane's in order, then a fixed tree.
DEVICE head_numbers head_of(const float *row, int head, int head_dim, const head_norm &how) {
    const row_norm &norm = how.norm;
    head_numbers h = {row + (size_t)head * head_dim, NULL, 0, 1, how.limit, how.late};
    if (!norm.weight) return h;
    const float *x = how.n_together == 1 ? h.x : row;
    const int n = how.n_together * head_dim;
    if (norm.centred) {
        float sum = 0;
        for (int i = lane_id(); i < n; i += 32) sum += limited(x[i], h.limit);
        h.mean = warp_sum(sum) / (float)n;
    }
    float squares = 0;
    for (int i = lane_id(); i < n; i += 32) {
        const float centred = limited(x[i], h.limit) - h.mean;
        squares = fmaf(centred, centred, squares);
    }
    h.scale = norm_scale(warp_sum(squares) / (float)n, norm.eps);
    h.weight = norm.weight + (size_t)head * how.weight_stride;
    return h;
}

// Dimension d of a head, rotated: pairs (d, d + rope_dim / 2), arXiv 2104.09864. A late RMSNorm's scale is that of the
// head as it was: a rotation does not change its length.
DEVICE float rotated(const head_numbers &h, const float *cos, const float *sin, int d, int rope_dim) {
    const int half = rope_dim / 2;
    float x = number_of(h, d);
    if (d < half)
        x = fmaf(x, cos[d], -(number_of(h, d + half) * sin[d]));
    else if (d < rope_dim)
        x = fmaf(x, cos[d - half], number_of(h, d - half) * sin[d - half]);
    return h.late && h.weight ? x * h.scale * h.weight[d] : x;
}

// Byte of element (row r, k) of a 16 x 16 f16 A fragment.
DEVICE int f16_fragment_at(int r, int k) { return (r % 8 * 4 + k % 8 / 2) * 16 + (r / 8 + k / 8 * 2) * 4 + k % 2 * 2; }

DEVICE void store_number(page_kind kind, uint8_t *head, size_t quarter, int slot, int d, int width, bool value,
                         float x) {
    uint8_t *to = head + (size_t)(slot / 16) * quarter; // 16 tokens
    if (kind == F16_FRAGMENTS) {
        to += d / 16 * 512 + (value ? f16_fragment_at(d % 16, slot % 16) : f16_fragment_at(slot % 16, d % 16));
        *(uint16_t *)(void *)to = (uint16_t)float_to_half(x);
    } else if (kind == PLAIN_F16) {
        ((uint16_t *)(void *)to)[slot % 16 * width + d] = (uint16_t)float_to_half(x);
    } else {
        ((float *)(void *)to)[slot % 16 * width + d] = x;
    }
}

// A warp stores a token's key (normed, rotated) or value of one head.
DEVICE void store_head(const attend_arguments &a, int token, int kv_head, bool value) {
    const int position = a.positions[token], slot = position % PAGE_TOKENS, half = a.rope_dim / 2;
    uint8_t *head = (uint8_t *)(uintptr_t)a.pages[(size_t)a.sequences[token] * a.page_stride + position / PAGE_TOKENS];
    head += a.head_at + (size_t)kv_head * (a.k_bytes + a.v_bytes) + (value ? a.k_bytes : 0);
    const float *row = (value ? a.v : a.k) + (size_t)token * a.n_kv_heads * a.head_dim;
    head_norm none = {};
    none.limit = a.k_norm.limit;
    const head_numbers x = head_of(row, kv_head, a.head_dim, value ? none : a.k_norm);
    const float *cos = a.cos + (size_t)token * half, *sin = a.sin + (size_t)token * half;
    for (int d = lane_id(); d < a.head_dim; d += 32) {
        const float number = value ? number_of(x, d) : rotated(x, cos, sin, d, a.rope_dim);
        if (a.kind != PLAIN_Q8_0) {
            store_number(a.kind, head, (value ? a.v_bytes : a.k_bytes) / 4, slot, d, value ? a.v_stride : a.head_dim,
                         value, number);
            continue;
        }
        const float scale = warp_largest(fabsf(number)) / 127.0f; // heads are whole groups of 32 here
        uint8_t *block = head + ((size_t)slot * (a.head_dim / 32) + d / 32) * 34;
        const bool usable = scale > 0x1p-100f && scale < INFINITY;
        block[2 + d % 32] = (uint8_t)(usable ? round_to_int(number * (1.0f / scale)) : 0);
        if (lane_id() == 0) *(uint16_t *)(void *)block = (uint16_t)float_to_half(scale);
    }
}

// Keys and values of all tokens: block_x the token, block_y times the block's warps the head and which of both.
KERNEL(ATTEND_THREADS, 1) store_kv(const attend_arguments a) {
    wait_for_previous();
    let_next_start();
    const int unit = block_y() * ATTEND_WARPS + warp_id();
    if (block_x() < *a.n && unit < 2 * a.n_kv_heads) store_head(a, block_x(), unit / 2, unit % 2);
}

// ---- one segment --------------------------------------------------------------------------------------------------------

// A block's shared memory. q: [8][head_dim] floats; scores, then weights: [8][SEGMENT] floats; fragments of q and of the
// weights; the running result.
struct attend_shared {
    float *q, *p, *out;                                               // out [8][v_stride]
    float *max, *sum, *part_max, *part_sum, *old_factor, *new_factor; // [8]
    uint8_t *pages;                                                   // the segment's, where they are staged
    uint8_t *q_fragments, *p_fragments; // [k / 16][32 lanes] of two words of the upper part, two of the rest
};
BOTH size_t place_attend(attend_shared *s, uint8_t *base, page_kind kind, int head_dim, int v_stride) {
    size_t used = 0;
    const int k16 = (head_dim + 15) / 16;
    s->q_fragments = base + used;
    used += kind == F16_FRAGMENTS ? (size_t)k16 * 512 : 0;
    s->p_fragments = base + used;
    used += kind == F16_FRAGMENTS ? SEGMENT / 16 * 512 : 0;
    s->q = (float *)(void *)(base + used);
    used += (size_t)TOKENS * (size_t)(k16 * 16) * 4;
    s->p = (float *)(void *)(base + used);
    used += (size_t)TOKENS * (SEGMENT + 4) * 4;
    s->out = (float *)(void *)(base + used);
    used += (size_t)TOKENS * (size_t)v_stride * 4;
    s->max = (float *)(void *)(base + used);
    s->sum = s->max + TOKENS;
    s->part_max = s->sum + TOKENS;
    s->part_sum = s->part_max + TOKENS;
    s->old_factor = s->part_sum + TOKENS;
    s->new_factor = s->old_factor + TOKENS;
    used += 6 * TOKENS * 4;
    s->pages = base + used;
    return used;
}
#define P_STRIDE (SEGMENT + 4)

// x in two f16 numbers: what it is rounded to, and what is left.
DEVICE void put_halves(uint8_t *fragments, int k, int column, float x) {
    uint8_t *to = fragments + k / 16 * 512 + (column * 4 + k % 8 / 2) * 16 + k % 16 / 8 * 4 + k % 2 * 2;
    const uint32_t upper = float_to_half(x);
    *(uint16_t *)(void *)to = (uint16_t)upper;
    *(uint16_t *)(void *)(to + 8) = (uint16_t)float_to_half(x - half_to_float(upper));
}

// One of a page's plain numbers: token slot, dimension d of `width`.
DEVICE float plain_number(page_kind kind, const uint8_t *head, int slot, int d, int width) {
    if (kind == PLAIN_F32) return ((const float *)(const void *)head)[slot * width + d];
    if (kind == PLAIN_F16) return half_to_float(((const uint16_t *)(const void *)head)[slot * width + d]);
    const uint8_t *block = head + (slot * (width / 32) + d / 32) * 34;
    return (float)(int8_t)block[2 + d % 32] * half_to_float(*(const uint16_t *)(const void *)block);
}

// The segment's keys or values of a page, here or in the pool.
DEVICE const uint8_t *page_head(const attend_arguments &a, const attend_shared &s, int sequence, int page, int kv_head,
                                bool value) {
    if (a.staged) return s.pages + (size_t)(page % SEGMENT_PAGES) * (a.k_bytes + a.v_bytes) + (value ? a.k_bytes : 0);
    const uint8_t *at = (const uint8_t *)(uintptr_t)a.pages[(size_t)sequence * a.page_stride + page];
    return at + a.head_at + (size_t)kv_head * (a.k_bytes + a.v_bytes) + (value ? a.k_bytes : 0);
}

// Starts copying 16-token blocks [first, last) of a segment's keys and values to where page_head will look for them.
DEVICE void stage_blocks(const attend_arguments &a, const attend_shared &s, int sequence, int segment, int kv_head,
                         int first, int last) {
    const int k_pieces = (int)(a.k_bytes / 64), pieces = k_pieces + (int)(a.v_bytes / 64); // of 16 bytes, of a block
    for (int i = thread_id(); i < (last - first) * pieces; i += ATTEND_THREADS) {
        const int block = first + i / pieces, part = i % pieces;
        const int page = segment * SEGMENT_PAGES + block / 4;
        const size_t at = part < k_pieces
                              ? (size_t)(block % 4) * (a.k_bytes / 4) + (size_t)part * 16
                              : a.k_bytes + (size_t)(block % 4) * (a.v_bytes / 4) + (size_t)(part - k_pieces) * 16;
        const uint8_t *from = (const uint8_t *)(uintptr_t)a.pages[(size_t)sequence * a.page_stride + page] + a.head_at +
                              (size_t)kv_head * (a.k_bytes + a.v_bytes);
        copy_async(s.pages + (size_t)(block / 4) * (a.k_bytes + a.v_bytes) + at, from + at);
    }
    copy_async_commit();
}

// Scores of all columns with positions [from, to) of a segment, from being a multiple of 16, into p.
DEVICE void scores(const attend_arguments &a, const attend_shared &s, int sequence, int segment, int kv_head, int from,
                   int to) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    if (a.kind == F16_FRAGMENTS) {
        if (warp_id() * PAGE_TOKENS >= to) return; // a page a warp
        const uint8_t *keys = page_head(a, s, sequence, segment * SEGMENT_PAGES + warp_id(), kv_head, false);
        for (int i = 0; i < 4 && warp_id() * PAGE_TOKENS + i * 16 < to; i++) {
            if (warp_id() * PAGE_TOKENS + i * 16 < from) continue;
            const uint8_t *block = keys + (size_t)i * (a.k_bytes / 4) + lane * 16;
            float c[4] = {0, 0, 0, 0};
            UNROLL_BY(4)
            for (int d = 0; d < a.head_dim / 16; d++) {
                const words4 k = *(const words4 *)(const void *)(block + d * 512);
                const words4 q = *(const words4 *)(const void *)(s.q_fragments + d * 512 + lane * 16);
                mma_f16(c, k.v, q.v[0], q.v[1]);
                mma_f16(c, k.v, q.v[2], q.v[3]);
            }
            for (int e = 0; e < 4; e++)
                s.p[(2 * t + e % 2) * P_STRIDE + warp_id() * PAGE_TOKENS + i * 16 + g + e / 2 * 8] = c[e];
        }
        return;
    }
    for (int i = from + thread_id(); i < to; i += ATTEND_THREADS) {
        const uint8_t *keys = page_head(a, s, sequence, segment * SEGMENT_PAGES + i / PAGE_TOKENS, kv_head, false);
        float sum[TOKENS] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int d = 0; d < a.head_dim; d++) {
            const float key = plain_number(a.kind, keys, i % PAGE_TOKENS, d, a.head_dim);
            UNROLL
            for (int c = 0; c < TOKENS; c++) sum[c] = fmaf(key, s.q[c * a.head_dim + d], sum[c]);
        }
        UNROLL
        for (int c = 0; c < TOKENS; c++) s.p[c * P_STRIDE + i] = sum[c];
    }
}

// A warp makes a column's scores into weights e^(score - maximum), +0 outside of [from, to); their maximum and sum.
DEVICE void softmax(const attend_arguments &a, const attend_shared &s, int column, int from, int to) {
    const int lane = lane_id();
    float x[SEGMENT / 32], largest = -INFINITY, sum = 0;
    UNROLL
    for (int j = 0; j < SEGMENT / 32; j++) {
        const int i = lane + 32 * j;
        x[j] = -INFINITY;
        if (i >= from && i < to) {
            x[j] = s.p[column * P_STRIDE + i];
            if (a.cap > 0) x[j] = soft_cap(x[j], a.cap);
        }
        largest = larger(largest, x[j]);
    }
    largest = warp_largest(largest);
    UNROLL
    for (int j = 0; j < SEGMENT / 32; j++) {
        const int i = lane + 32 * j;
        const float p = i >= from && i < to ? exponential(x[j] - largest) : 0.0f;
        sum += p;
        if (a.kind == F16_FRAGMENTS)
            put_halves(s.p_fragments, i, column, p);
        else
            s.p[column * P_STRIDE + i] = p;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        s.part_max[column] = largest;
        s.part_sum[column] = sum;
    }
}

// Weights times values of positions [from, to). Each number goes to put(column, dimension, number).
template <class Put>
DEVICE void values(const attend_arguments &a, const attend_shared &s, int sequence, int segment, int kv_head, int from,
                   int to, Put put) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    if (a.kind == F16_FRAGMENTS) {
        for (int d = warp_id(); d < a.v_stride / 16; d += ATTEND_WARPS) {
            float c[4] = {0, 0, 0, 0};
            UNROLL_BY(4)
            for (int i = from / 16; i < (to + 15) / 16; i++) {
                const uint8_t *head = page_head(a, s, sequence, segment * SEGMENT_PAGES + i / 4, kv_head, true);
                const uint8_t *at = head + (size_t)(i % 4) * (a.v_bytes / 4) + d * 512 + lane * 16;
                const words4 v = *(const words4 *)(const void *)at;
                const words4 p = *(const words4 *)(const void *)(s.p_fragments + i * 512 + lane * 16);
                mma_f16(c, v.v, p.v[0], p.v[1]);
                mma_f16(c, v.v, p.v[2], p.v[3]);
            }
            for (int e = 0; e < 4; e++) put(2 * t + e % 2, d * 16 + g + e / 2 * 8, c[e]);
        }
        return;
    }
    for (int i = thread_id(); i < a.head_dim * TOKENS; i += ATTEND_THREADS) {
        const int d = i % a.head_dim, column = i / a.head_dim;
        float sum = 0;
        for (int j = from; j < to; j++) {
            const uint8_t *head = page_head(a, s, sequence, segment * SEGMENT_PAGES + j / PAGE_TOKENS, kv_head, true);
            const int width = a.kind == PLAIN_Q8_0 ? a.head_dim : a.v_stride;
            sum = fmaf(s.p[column * P_STRIDE + j], plain_number(a.kind, head, j % PAGE_TOKENS, d, width), sum);
        }
        put(column, d, sum);
    }
}

// ---- segments together --------------------------------------------------------------------------------------------------

// The rescaling of "Online normalizer calculation for softmax", arXiv 1805.02867: what a running result of (max, sum) and a
// part are multiplied by, and the new (max, sum).
DEVICE void merge_factors(float &max, float &sum, float part_max, float part_sum, float &old_factor,
                          float &new_factor) {
    const float top = larger(max, part_max);
    old_factor = max == -INFINITY ? 0.0f : exponential(max - top);
    new_factor = exponential(part_max - top);
    sum = fmaf(sum, old_factor, part_sum * new_factor);
    max = top;
}

// The first position that a token attends to, and the last, that of its sequence being `last`.
DEVICE int first_seen(const attend_arguments &a, int position) {
    return a.window > 0 && position >= a.window ? position + 1 - a.window : 0;
}
DEVICE int last_seen(const attend_arguments &a, int position, int last) {
    if (!a.bidirectional) return position;
    return a.window > 0 && last - position >= a.window ? position + a.window - 1 : last;
}
DEVICE bool sees(const attend_arguments &a, int position, int last, int segment) {
    return segment <= last_seen(a, position, last) / SEGMENT && segment >= first_seen(a, position) / SEGMENT;
}

// The tile's last block: every column's parts from `begin` on in ascending order. A chunk of parts at a time, factors
// first, so that the loads of the sums do not wait for each other.
#define MERGE_PARTS 16
DEVICE void merge_parts(const attend_arguments &a, const attend_shared &s, const attend_tile &tile, int begin, int end,
                        const float *partial) {
    const size_t size = partial_size(a.v_stride);
    float *factors = s.p; // [MERGE_PARTS][2][8]
    const int column_of = thread_id();
    float max = 0, sum = 0;
    if (column_of < tile.n) {
        max = s.max[column_of];
        sum = s.sum[column_of];
    }
    for (int first = begin; first < end; first += MERGE_PARTS) {
        const int n = end - first < MERGE_PARTS ? end - first : MERGE_PARTS;
        block_barrier();
        if (column_of < tile.n) {
            const int position = a.positions[tile.token + (tile.first + column_of) / a.group];
            for (int i = 0; i < n; i++) {
                const float *part = partial + (size_t)(first + i) * size;
                float old_factor = 1, new_factor = 0;
                if (sees(a, position, tile.last, first + i))
                    merge_factors(max, sum, load_fresh(part + column_of), load_fresh(part + TOKENS + column_of),
                                  old_factor, new_factor);
                factors[(2 * i) * TOKENS + column_of] = old_factor;
                factors[(2 * i + 1) * TOKENS + column_of] = new_factor;
            }
            s.sum[column_of] = sum;
        }
        block_barrier();
        for (int i = thread_id(); i < tile.n * a.v_stride; i += ATTEND_THREADS) {
            const int column = i / a.v_stride;
            const int position = a.positions[tile.token + (tile.first + column) / a.group];
            float out = s.out[i];
            UNROLL_BY(8)
            for (int j = 0; j < n; j++)
                if (sees(a, position, tile.last, first + j))
                    out = fmaf(out, factors[2 * j * TOKENS + column],
                               load_fresh(partial + (size_t)(first + j) * size + 2 * TOKENS + i) *
                                   factors[(2 * j + 1) * TOKENS + column]);
            s.out[i] = out;
        }
    }
    block_barrier();
}

// block_x: the tile, block_y: the kv head, block_z: the split.
KERNEL(ATTEND_THREADS, 4) attend(const GRID_CONSTANT attend_arguments a) {
    wait_for_previous();
    let_next_start();
    if (block_x() >= *a.n_tiles) return;
    const attend_tile tile = a.tiles[block_x()];
    const int kv_head = block_y(), split = block_z();
    const int oldest = first_seen(a, a.positions[tile.token]); // the farthest back that a column looks
    const int last_position =                                  // the farthest ahead
        last_seen(a, a.positions[tile.token + (tile.first + tile.n - 1) / a.group], tile.last);
    const int begin = oldest / SEGMENT, end = last_position / SEGMENT + 1; // segments that nobody sees are nobody's
    if (a.n_splits > 1 && (split < begin || split >= end)) return;
    attend_shared s;
    place_attend(&s, shared_memory(), a.kind, a.head_dim, a.v_stride);

    const int first = a.n_splits > 1 ? split : begin, last = a.n_splits > 1 ? split + 1 : end;
    const bool stores = a.stores && last == end;
    int n_blocks = (last_position - first * SEGMENT) / 16 + 1; // of the segment, where it is staged
    if (n_blocks > SEGMENT / 16) n_blocks = SEGMENT / 16;
    const int first_block = first > begin ? 0 : oldest % SEGMENT / 16;
    if (a.staged) stage_blocks(a, s, tile.sequence, first, kv_head, first_block, stores ? n_blocks - 1 : n_blocks);
    if (stores && warp_id() < 2) store_head(a, tile.token, kv_head, warp_id() == 1);

    for (int column = warp_id(); column < TOKENS; column += ATTEND_WARPS) {
        const bool there = column < tile.n; // else past the tile's: zeros
        const int token = tile.token + (tile.first + column) / a.group, half = a.rope_dim / 2;
        const int head = kv_head * a.group + (tile.first + column) % a.group;
        head_numbers x = {};
        float scale = 0;
        if (there) {
            x = head_of(a.q + (size_t)token * a.n_kv_heads * a.group * a.head_dim, head, a.head_dim, a.q_norm);
            scale = a.query_scales[token];
        }
        for (int d = lane_id(); d < a.head_dim; d += 32) {
            const float *cos = a.cos + (size_t)token * half, *sin = a.sin + (size_t)token * half;
            const float q = there ? rotated(x, cos, sin, d, a.rope_dim) * scale : 0.0f;
            if (a.kind == F16_FRAGMENTS)
                put_halves(s.q_fragments, d, column, q);
            else
                s.q[column * a.head_dim + d] = q;
        }
        if (lane_id() == 0) { // a sink is merged first, with the value 0
            s.max[column] = there && a.sinks ? a.sinks[head] : -INFINITY;
            s.sum[column] = there && a.sinks ? 1.0f : 0.0f;
        }
    }
    for (int i = thread_id(); i < TOKENS * a.v_stride; i += ATTEND_THREADS) s.out[i] = 0;
    memory_fence(); // the key and value just stored are read below
    block_barrier();
    if (a.staged) {
        if (stores)
            stage_blocks(a, s, tile.sequence, first, kv_head, n_blocks - 1, n_blocks); // with the new key and value
        copy_async_wait<0>();
        block_barrier();
    }

    float *partial = a.partial + (((size_t)block_x() * a.n_kv_heads + kv_head) * a.n_splits) * partial_size(a.v_stride);
    for (int segment = first; segment < last; segment++) {
        const int left = last_position + 1 - segment * SEGMENT, to = left < SEGMENT ? left : SEGMENT;
        const int from = segment > begin ? 0 : oldest % SEGMENT / 16 * 16;
        scores(a, s, tile.sequence, segment, kv_head, from, to);
        block_barrier();
        for (int column = warp_id(); column < TOKENS; column += ATTEND_WARPS) {
            int seen_from = 0, seen_to = 0; // in the segment
            if (column < tile.n) {
                const int position = a.positions[tile.token + (tile.first + column) / a.group];
                seen_from = first_seen(a, position) - segment * SEGMENT;
                seen_to = last_seen(a, position, tile.last) + 1 - segment * SEGMENT;
            }
            softmax(a, s, column, seen_from, seen_to < to ? seen_to : to);
        }
        block_barrier();
        if (a.n_splits > 1) {
            float *part = partial + (size_t)split * partial_size(a.v_stride);
            if (thread_id() < TOKENS) {
                part[thread_id()] = s.part_max[thread_id()];
                part[TOKENS + thread_id()] = s.part_sum[thread_id()];
            }
            values(a, s, tile.sequence, segment, kv_head, from, to,
                   [&](int column, int d, float x) { part[2 * TOKENS + column * a.v_stride + d] = x; });
            break;
        }
        if (thread_id() < TOKENS) {
            const int c = thread_id();
            s.old_factor[c] = 1;
            s.new_factor[c] = 0;
            if (s.part_max[c] != -INFINITY || s.part_sum[c] != 0) // the column sees something of the segment
                merge_factors(s.max[c], s.sum[c], s.part_max[c], s.part_sum[c], s.old_factor[c], s.new_factor[c]);
        }
        block_barrier();
        values(a, s, tile.sequence, segment, kv_head, from, to, [&](int column, int d, float x) {
            if (s.part_max[column] == -INFINITY && s.part_sum[column] == 0) return;
            float *out = s.out + column * a.v_stride + d;
            *out = fmaf(*out, s.old_factor[column], x * s.new_factor[column]);
        });
        block_barrier();
    }

    if (a.n_splits > 1) {
        int *arrived = a.arrived + block_x() * a.n_kv_heads + kv_head;
        float *all = s.old_factor; // thread 0 tells the others who came last
        memory_fence();
        block_barrier();
        if (thread_id() == 0) {
            const bool is_last = atomic_add(arrived, 1) == end - begin - 1;
            if (is_last) *arrived = 0;
            all[0] = is_last ? 1.0f : 0.0f;
        }
        block_barrier();
        if (all[0] == 0.0f) return;
        memory_fence();
        merge_parts(a, s, tile, begin, end, partial);
    }
    for (int i = thread_id(); i < tile.n * a.head_dim; i += ATTEND_THREADS) {
        const int column = i / a.head_dim, d = i % a.head_dim;
        const int token = tile.token + (tile.first + column) / a.group;
        const int head = kv_head * a.group + (tile.first + column) % a.group;
        a.out[((size_t)token * a.n_kv_heads * a.group + head) * a.head_dim + d] =
            s.out[column * a.v_stride + d] / s.sum[column] + 0.0f;
    }
}

#endif
