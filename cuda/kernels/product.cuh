// kernels/product.cuh: activations times packed matrices for few tokens, at memory speed. A block takes a tile of 16 rows
// at a time; its 8 warps take an eighth of k each (their chunks follow each other in memory), every warp with its own ring
// of chunks on their way from memory, filled before the kernel before this one has ended. Tokens are the columns of the
// tensor cores' tile, 8 at most. The eight sums of an output are added in order. So the order of additions depends on
// the matrix's shape alone. Experts of a mixture are the same, each with rows of its own.
// Includes activations.cuh, formats.cuh, numeric.cuh.
#ifndef TINYLLM_CUDA_PRODUCT_CUH
#define TINYLLM_CUDA_PRODUCT_CUH

#include "activations.cuh"
#include "formats.cuh"
#include "numeric.cuh"

#define SPLITS BLOCK_WARPS // of k

struct product_matrix {
    const uint8_t *data;
    const float *bias;                       // [rows] or NULL
    float *out;                              // [n, rows]
    int format, rows, n_chunks, chunk_bytes; // format: tiles_id's
    float factor;                            // of all numbers
};

// out = scale w x, capped; out += scale w x; out = gated(w[0] x, w[1] x); out = gated(out, w x)
enum epilogue { STORE, ADD, GLU, GATED };

// Rows of activations that a block multiplies, and whose weights they meet where there are experts.
struct piece {
    int first, n, expert;
};
struct expert_weights { // what a layer's experts do not have in common
    const uint8_t *data;
    const float *bias;
    float factor;
};
#define EXPERT_MATRICES 3 // gate, up, down

struct product_arguments {
    product_matrix w[3];
    int n_matrices, n_units, epilogue; // units: tiles of all matrices; GLU: tiles of either
    float scale, cap;                  // STORE's cap: 0 is none
    gating activation;
    ungated unit; // of STORE: what is stored is the unit of the sum
    activation_source source;
    activations in; // in global memory, where `prepared`
    bool prepared;
    const int *n;            // tokens there are
    int first, most;         // of them, from here on, and no more than so many, into 0.. of out and from 0.. of in
    int n_slots, slot_bytes; // of a warp's ring
    const expert_weights *experts; // [experts, EXPERT_MATRICES] from the first of w on; NULL: w's own
    const piece *pieces;           // of experts; tokens are visits to them (experts.cuh)
    const int *n_pieces;
};

// A block's rows, `size` at most: how many there are, and the first. Known once the kernel in front has ended. These and the
// weights are looked up where they are needed: registers are dearer.
DEVICE int rows_of_block(const product_arguments &a, int size) {
    if (a.experts) return block_y() < *a.n_pieces ? a.pieces[block_y()].n : 0;
    const int there = *a.n - a.first, left = (there < a.most ? there : a.most) - block_y() * size;
    return left < size ? left : size;
}
DEVICE int first_of_block(const product_arguments &a, int size) {
    return a.experts ? a.pieces[block_y()].first : block_y() * size;
}
DEVICE expert_weights weights_of(const product_arguments &a, int m) {
    return a.experts ? a.experts[a.pieces[block_y()].expert * EXPERT_MATRICES + m]
                     : expert_weights{a.w[m].data, a.w[m].bias, a.w[m].factor};
}

// A sum on its way out. gate: what GLU's first matrix (part 0) leaves for its second.
DEVICE void put_sum(const product_arguments &a, float *out, float sum, int part, float &gate) {
    if (a.epilogue == STORE && a.unit.is)
        *out = ungated_of(a.unit, sum);
    else if (a.epilogue == STORE)
        *out = a.cap > 0 ? soft_cap(a.scale * sum, a.cap) : a.scale * sum;
    else if (a.epilogue == ADD)
        *out = fmaf(a.scale, sum, *out);
    else if (a.epilogue == GLU && part == 0)
        gate = sum;
    else
        *out = gated(a.activation, a.epilogue == GLU ? gate : *out, sum);
}

// Chunks [first, last) of a tile belong to split s.
BOTH int split_first(int n_chunks, int s) { return s * n_chunks / SPLITS; }

// ---- one group: 16 rows x 32 k x 8 tokens -------------------------------------------------------------------------------

// A lane's part of what goes with four groups of activations: column g's B fragments, the facts of columns 2t and 2t + 1.
struct quad_activations {
    alignas(16) uint32_t b[8];
    alignas(16) float scale[2][4];
    alignas(16) float scaled_sum[2][4];
    alignas(16) uint32_t half_sums[2][4];
};

DEVICE constexpr bool has_min(scale_kind kind) { return kind == F16_SCALE_MIN || kind == BYTE_SCALE_MIN; }

// token: column g's; columns: those of 2t and 2t + 1. Only as many columns as COLUMNS says (1: tokens 0 alone) are needed.
template <class F, int COLUMNS>
DEVICE void load_activations(quad_activations &q, const activations &a, int group, int t, int token,
                             const int columns[2]) {
    const int8_t *b = a.q + (size_t)token * a.q_stride + group * 32 + t * 16;
    *(words4 *)q.b = *(const words4 *)(const void *)b;
    *(words4 *)(q.b + 4) = *(const words4 *)(const void *)(b + 64);
    for (int i = 0; i < (COLUMNS == 1 ? 1 : 2); i++) {
        const size_t at = (size_t)columns[i] * a.group_stride + group;
        *(words4 *)(void *)q.scale[i] = *(const words4 *)(const void *)(a.scale + at);
        if constexpr (has_min(F::facts.scale))
            *(words4 *)(void *)q.scaled_sum[i] = *(const words4 *)(const void *)(a.scaled_sum + at);
        if constexpr (F::facts.scale == HALF_SCALES_MIN)
            *(words4 *)(void *)q.half_sums[i] = *(const words4 *)(const void *)(a.half_sums + at);
    }
}

// acc (a result fragment) += the group's dot products, scaled. The integer sums start from the bits of 1.5 * 2^23 over the
// codes' power of two: read as a float they are that number plus the sum, exactly.
template <class F, int COLUMNS, int J>
DEVICE void add_group(float acc[4], const uint32_t a[4], const quad_scales &s, const bases &base,
                      const quad_activations &q) {
    constexpr format_facts f = F::facts;
    constexpr int32_t start_bits = 0x4b400000 - (code_shift(f) << 23);
    constexpr float start = 12582912.0f / (float)(1 << code_shift(f));
    const uint32_t b0 = q.b[2 * J], b1 = q.b[2 * J + 1], w = s.s[J];
    int32_t c[4] = {start_bits, start_bits, start_bits, start_bits},
            d[4] = {start_bits, start_bits, start_bits, start_bits};
    if constexpr (f.scale == HALF_SCALES || f.scale == HALF_SCALES_MIN || f.scale == E4M3_HALVES) {
        mma_s8_k16(c, a[0], a[1], b0);
        mma_s8_k16(d, a[2], a[3], b1);
    } else {
        mma_s8(c, a, b0, b1);
    }
    for (int h = 0; h < 2; h++) { // rows g, g + 8
        float scale = base.d[h], min = 0;
        if constexpr (f.scale == F16_SCALE || f.scale == F16_SCALE_MIN) scale = half_to_float(w >> 16 * h & 0xffff);
        if constexpr (f.scale == E4M3_HALVES) scale = e4m3_half(w >> 8 * h);
        if constexpr (f.scale == BF16_SCALE) scale = bf16_to_float(w >> 16 * h & 0xffff);
        if constexpr (f.scale == F16_SCALE_MIN) min = half_to_float(s.s[4 + J] >> 16 * h & 0xffff);
        if constexpr (f.scale == BYTE_SCALE) scale = scale * signed_byte(s.s[J / 2] >> J % 2 * 16, h);
        if constexpr (f.scale == BYTE_SCALE_MIN) {
            scale = scale * unsigned_byte(w, h);
            min = base.min[h] * unsigned_byte(w, 2 + h);
        }
        for (int i = 0; i < (COLUMNS == 1 ? 1 : 2); i++) {
            const int e = 2 * h + i;
            float dot = as_float((uint32_t)c[e]) - start;
            if constexpr (f.scale == HALF_SCALES) // integers below 2^24: exact
                dot = fmaf(as_float((uint32_t)d[e]) - start, signed_byte(w, 2 + h), dot * signed_byte(w, h));
            if constexpr (f.scale == HALF_SCALES_MIN)
                dot = fmaf(as_float((uint32_t)d[e]) - start, (float)(w >> 8 * (2 + h) & 15),
                           dot * (float)(w >> 8 * h & 15));
            acc[e] = fmaf(dot, scale * q.scale[i][J], acc[e]);
            if constexpr (f.scale == E4M3_HALVES)
                acc[e] = fmaf(as_float((uint32_t)d[e]) - start, e4m3_half(w >> 8 * (2 + h)) * q.scale[i][J], acc[e]);
            if constexpr (has_min(f.scale)) acc[e] = fmaf(min, q.scaled_sum[i][J], acc[e]);
            if constexpr (f.scale == HALF_SCALES_MIN) {
                const uint32_t sums = q.half_sums[i][J];
                const float both = fmaf((float)(int16_t)(sums >> 16), (float)(w >> (8 * (2 + h) + 4) & 15),
                                        (float)(int16_t)(sums & 0xffff) * (float)(w >> (8 * h + 4) & 15));
                acc[e] = fmaf(both, base.min[h] * q.scale[i][J], acc[e]);
            }
        }
    }
}

// acc += a chunk, whose bytes are at `chunk`.
template <class F, int COLUMNS>
DEVICE void add_chunk(float acc[4], const uint8_t *chunk, const activations &in, int first_group, int token,
                      const int columns[2]) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    bases base;
    load_bases<F>(base, chunk, g);
    UNROLL
    for (int i = 0; i < F::facts.groups / 4; i++) {
        quad q;
        quad_scales s;
        quad_activations x;
        load_quad<F>(q, chunk, lane, i);
        load_scales<F>(s, chunk, g, i);
        load_activations<F, COLUMNS>(x, in, first_group + 4 * i, t, token, columns);
        uint32_t a[4];
        fragment<F, 0>(a, q);
        add_group<F, COLUMNS, 0>(acc, a, s, base, x);
        fragment<F, 1>(a, q);
        add_group<F, COLUMNS, 1>(acc, a, s, base, x);
        fragment<F, 2>(a, q);
        add_group<F, COLUMNS, 2>(acc, a, s, base, x);
        fragment<F, 3>(a, q);
        add_group<F, COLUMNS, 3>(acc, a, s, base, x);
    }
}

// ---- the ring -----------------------------------------------------------------------------------------------------------

// Walks a warp through the chunks of its split: of every tile of the block's units, in order.
struct walk {
    int unit, part, chunk, last;
    const uint8_t *from; // of the chunk
    int bytes;
};

// A unit's part: which matrix, which of its tiles.
DEVICE int find_tile(const product_arguments &a, int unit, int part, int *tile) {
    if (a.epilogue == GLU) {
        *tile = unit;
        return part;
    }
    int m = 0;
    for (; m + 1 < a.n_matrices && unit >= (a.w[m].rows + 15) / 16; m++) unit -= (a.w[m].rows + 15) / 16;
    *tile = unit;
    return m;
}

// Goes to the part's first chunk, or on to later parts where the split has none of it; unit >= n_units: the end.
DEVICE void walk_settle(walk &k, const product_arguments &a) {
    while (k.unit < a.n_units) {
        int tile;
        const int m = find_tile(a, k.unit, k.part, &tile);
        const product_matrix &w = a.w[m];
        k.chunk = split_first(w.n_chunks, warp_id());
        k.last = split_first(w.n_chunks, warp_id() + 1);
        k.bytes = w.chunk_bytes;
        k.from = weights_of(a, m).data + ((size_t)tile * (size_t)w.n_chunks + (size_t)k.chunk) * (size_t)k.bytes;
        if (k.chunk < k.last) return;
        if (a.epilogue == GLU && k.part == 0)
            k.part = 1;
        else
            k.part = 0, k.unit += n_blocks_x();
    }
}

// Starts the copy of the next chunk, if there is one, into a slot; a group either way, so that they can be counted.
DEVICE void walk_copy(walk &k, const product_arguments &a, uint8_t *slot) {
    if (k.unit < a.n_units) {
        for (int i = lane_id() * 16; i < k.bytes; i += 512) copy_async(slot + i, k.from + i);
        k.from += k.bytes;
        if (++k.chunk == k.last) {
            if (a.epilogue == GLU && k.part == 0)
                k.part = 1;
            else
                k.part = 0, k.unit += n_blocks_x();
            walk_settle(k, a);
        }
    }
    copy_async_commit();
}

struct ring {
    uint8_t *slots;
    int n, bytes, at;
};

// Waits for the oldest chunk.
DEVICE const uint8_t *ring_front(const ring &r) {
    switch (r.n) { // the count must be known when this is compiled
    case 2: copy_async_wait<1>(); break;
    case 3: copy_async_wait<2>(); break;
    case 4: copy_async_wait<3>(); break;
    default: copy_async_wait<5>();
    }
    warp_barrier();
    return r.slots + r.at * r.bytes;
}

// The front's place is free: it takes the next chunk.
DEVICE void ring_next(ring &r, walk &k, const product_arguments &a) {
    warp_barrier();
    walk_copy(k, a, r.slots + r.at * r.bytes);
    if (++r.at == r.n) r.at = 0;
}

// ---- a warp's share of a tile -------------------------------------------------------------------------------------------

// Into partial [8 columns][16 rows].
template <class F, int COLUMNS>
DEVICE void add_split(float *partial, ring &r, walk &k, const product_arguments &a, const activations &in,
                      const product_matrix &w, int n_tokens) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const int token = COLUMNS == 1 || g < n_tokens ? (COLUMNS == 1 ? 0 : g) : 0; // columns without a token are not read
    const int columns[2] = {2 * t < n_tokens ? 2 * t : 0, 2 * t + 1 < n_tokens ? 2 * t + 1 : 0};
    float acc[4] = {0, 0, 0, 0};
    const int last = split_first(w.n_chunks, warp_id() + 1);
    for (int c = split_first(w.n_chunks, warp_id()); c < last; c++) {
        add_chunk<F, COLUMNS>(acc, ring_front(r), in, c * F::facts.groups, token, columns);
        ring_next(r, k, a);
    }
    if (COLUMNS == 1 && t > 0) return;
    for (int i = 0; i < 4; i++)
        if (COLUMNS > 1 || i % 2 == 0) partial[(2 * t + i % 2) * 16 + g + i / 2 * 8] = acc[i];
}

// The 8 numbers of a lane's row in run 0 or 1 (F32: there is one) of a chunk.
DEVICE void load_floats(float out[8], const uint8_t *from, int format, int run) {
    if (format == 0) {
        const words4 low = *(const words4 *)(const void *)from, high = *(const words4 *)(const void *)(from + 1024);
        UNROLL
        for (int i = 0; i < 4; i++) {
            out[i] = as_float(low.v[i]);
            out[4 + i] = as_float(high.v[i]);
        }
        return;
    }
    const words4 load = *(const words4 *)(const void *)(from + run * 1024);
    UNROLL
    for (int i = 0; i < 8; i++) {
        const uint32_t half = load.v[i / 2] >> i % 2 * 16 & 0xffff;
        out[i] = format == 1 ? half_to_float(half) : bf16_to_float(half);
    }
}

// Float weights meet float activations: lane 4g + t adds up k 8t..8t+7 of every 32, the four lanes of a row by a tree.
template <int COLUMNS>
DEVICE void add_split_floats(float *partial, ring &r, walk &k, const product_arguments &a, const activations &in,
                             const product_matrix &w, int n_tokens) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    float acc[2][COLUMNS];
    UNROLL
    for (int i = 0; i < COLUMNS; i++) acc[0][i] = acc[1][i] = 0;
    const int last = split_first(w.n_chunks, warp_id() + 1);
    for (int c = split_first(w.n_chunks, warp_id()); c < last; c++) {
        const uint8_t *chunk = ring_front(r);
        UNROLL_BY(1)
        for (int run = 0; run < (w.format == 0 ? 1 : 2); run++) {
            float weights[2][8]; // of rows g, g + 8
            UNROLL
            for (int h = 0; h < 2; h++) load_floats(weights[h], chunk + h * 512 + lane * 16, w.format, run);
            const float *x = in.x + c * (w.format == 0 ? 32 : 64) + run * 32 + t * 8;
            UNROLL
            for (int token = 0; token < COLUMNS; token++) {
                const float *at = x + (size_t)(token < n_tokens ? token : 0) * in.x_stride;
                const words4 low = *(const words4 *)(const void *)at, high = *(const words4 *)(const void *)(at + 4);
                UNROLL
                for (int h = 0; h < 2; h++) UNROLL
                for (int i = 0; i < 8; i++)
                    acc[h][token] = fmaf(weights[h][i], as_float(i < 4 ? low.v[i] : high.v[i - 4]), acc[h][token]);
            }
        }
        ring_next(r, k, a);
    }
    UNROLL
    for (int token = 0; token < COLUMNS; token++) UNROLL
    for (int h = 0; h < 2; h++) {
        float sum = acc[h][token];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (t == 0) partial[token * 16 + g + 8 * h] = sum;
    }
}

// ---- the kernel ---------------------------------------------------------------------------------------------------------

#define PARTIAL_FLOATS (TOKENS * 16)

// Shared memory: the warps' rings, partial sums (two buffers, so that one barrier a tile is enough; norms' sums before), and
// the activations unless they are prepared.
BOTH size_t product_shared_bytes(const product_arguments &a, int n_tokens) {
    activations in;
    const size_t rings = (size_t)BLOCK_WARPS * (size_t)a.n_slots * (size_t)a.slot_bytes;
    return rings + 2 * SPLITS * PARTIAL_FLOATS * sizeof(float) +
           (a.prepared ? 0 : place_activations(&in, NULL, n_tokens, a.source.k, a.source.quantized, a.source.floats));
}

// block_y: which 8 tokens, or which piece. COLUMNS 1: there is one, or one a piece. FLOATS: the matrices are not quantized.
template <int COLUMNS, bool FLOATS>
KERNEL(BLOCK_THREADS, (FLOATS && COLUMNS > 1 ? 1 : 2))
product(const GRID_CONSTANT product_arguments a) {
    uint8_t *shared = shared_memory();
    ring r = {shared + (size_t)warp_id() * (size_t)(a.n_slots * a.slot_bytes), a.n_slots, a.slot_bytes, 0};
    float *partials = (float *)(void *)(shared + (size_t)BLOCK_WARPS * (size_t)(a.n_slots * a.slot_bytes));

    if (a.experts) { // only then it is known whose weights are to be fetched
        wait_for_previous();
        if (rows_of_block(a, TOKENS) <= 0) return;
    }
    walk ahead = {block_x(), 0, 0, 0, NULL, 0};
    walk_settle(ahead, a);
    for (int i = 0; i < r.n; i++) walk_copy(ahead, a, r.slots + i * r.bytes);
    wait_for_previous();
    let_next_start();

    const int n_rows = rows_of_block(a, TOKENS), first_token = first_of_block(a, TOKENS);
    if (n_rows <= 0) { // shapes are rounded up
        copy_async_wait<0>();
        return;
    }
    const int n_tokens = COLUMNS == 1 ? 1 : n_rows;
    activations in = a.in;
    if (!a.prepared) {
        place_activations(&in, (uint8_t *)(void *)(partials + 2 * SPLITS * PARTIAL_FLOATS), n_tokens, a.source.k,
                          a.source.quantized, a.source.floats);
        prepare_tokens(a.source, in, a.first + first_token, n_tokens, partials);
    } else {
        in.q += (size_t)first_token * in.q_stride;
        in.scale += (size_t)first_token * in.group_stride;
        in.scaled_sum += (size_t)first_token * in.group_stride;
        in.half_sums += (size_t)first_token * in.group_stride;
        in.x += (size_t)first_token * in.x_stride;
    }

    const int n_parts = a.epilogue == GLU ? 2 : 1, row16 = thread_id() % 16, column = thread_id() / 16;
    int buffer = 0;
    for (int unit = block_x(); unit < a.n_units; unit += n_blocks_x()) {
        float gate = 0;
        for (int part = 0; part < n_parts; part++, buffer ^= 1) {
            int tile;
            const product_matrix &of = a.w[find_tile(a, unit, part, &tile)];
            float *partial = partials + (buffer * SPLITS + warp_id()) * PARTIAL_FLOATS;
            if constexpr (FLOATS) {
                add_split_floats<COLUMNS>(partial, r, ahead, a, in, of, n_tokens);
            } else {
                switch (of.format) {
#define X(name, id, ...)                                                                                               \
    case id: add_split<format_##name, COLUMNS>(partial, r, ahead, a, in, of, n_tokens); break;
                    QUANTIZED_FORMATS(X)
#undef X
                }
            }
            block_barrier();
            const int m = find_tile(a, unit, part, &tile); // again, which is cheaper than to keep it
            const product_matrix &w = a.w[m];
            const int row = tile * 16 + row16;
            if (column >= n_tokens || row >= w.rows) continue;
            const float *from = partials + buffer * SPLITS * PARTIAL_FLOATS + column * 16 + row16;
            float sum = from[0];
            for (int i = 1; i < SPLITS; i++) sum += from[i * PARTIAL_FLOATS];
            const expert_weights of_matrix = weights_of(a, m);
            sum *= of_matrix.factor;
            if (of_matrix.bias) sum += of_matrix.bias[row];
            const size_t token = (size_t)(first_of_block(a, TOKENS) + column);
            put_sum(a, w.out + token * (size_t)w.rows + row, sum, part, gate);
        }
    }
}

#endif
