// kernels/product_many.cuh: the products of product.cuh for many tokens, to the same bits: larger tiles, the same groups, and
// the sums of a split of k put together in the same order. A block takes four tiles of 16 rows (GLU: two of either matrix)
// times 128 tokens; a warp two of the tiles times 32 tokens, so that what is loaded and unpacked serves many products.
// Includes product.cuh.
#ifndef TINYLLM_CUDA_PRODUCT_MANY_CUH
#define TINYLLM_CUDA_PRODUCT_MANY_CUH

#include "product.cuh"

#define MANY_TOKENS  128 // of a block
#define MANY_TILES   4
#define WARP_TILES   2
#define WARP_COLUMNS 4 // of 8 tokens

// One step of k in shared memory: a chunk of each tile, the tokens' int8 (halves of 64 k change places in odd tokens, so
// that neighbours lie in other banks), their scales and sums [quad of groups][token] of four.
struct many_step {
    int q, scale, scaled_sum, n_bytes;
};
BOTH constexpr many_step many_layout(format_facts f) {
    const int k = 32 * f.groups, quads = f.groups / 4;
    const int q = MANY_TILES * chunk_bytes(f), scale = q + MANY_TOKENS * k, sums = scale + quads * MANY_TOKENS * 16;
    const bool has_sums = f.scale == F16_SCALE_MIN || f.scale == BYTE_SCALE_MIN;
    return many_step{q, scale, sums, sums + (has_sums ? quads * MANY_TOKENS * 16 : 0)};
}

// Which tile of which matrix fragment i of a unit is; past the matrix's end: its last tile, whose result nobody takes.
DEVICE int many_tile(const product_arguments &a, int unit, int i, int *tile) {
    int m = 0;
    if (a.epilogue == GLU) {
        m = i % 2;
        *tile = unit * 2 + i / 2;
    } else {
        for (; m + 1 < a.n_matrices && unit >= (a.w[m].rows + 63) / 64; m++) unit -= (a.w[m].rows + 63) / 64;
        *tile = unit * MANY_TILES + i;
    }
    return m;
}

template <class F>
DEVICE void many_copy(const product_arguments &a, const uint8_t *const tiles[MANY_TILES], uint8_t *slot, int chunk,
                      int first_token, int n_tokens) {
    constexpr format_facts f = F::facts;
    constexpr many_step at = many_layout(f);
    constexpr int bytes = chunk_bytes(f), k = 32 * f.groups;
    for (int i = thread_id(); i < MANY_TILES * (bytes / 16); i += BLOCK_THREADS) {
        const int tile = i / (bytes / 16), part = i % (bytes / 16);
        const uint8_t *from = tile < 2 ? (tile == 0 ? tiles[0] : tiles[1]) : (tile == 2 ? tiles[2] : tiles[3]);
        copy_async(slot + i * 16, from + (size_t)chunk * bytes + part * 16);
    }
    for (int i = thread_id(); i < MANY_TOKENS * (k / 16); i += BLOCK_THREADS) {
        const int token = i / (k / 16), part = i % (k / 16);
        const int row = first_token + (token < n_tokens ? token : n_tokens - 1);
        const uint8_t *from = (const uint8_t *)a.in.q + (size_t)row * a.in.q_stride + chunk * k + part * 16;
        copy_async(slot + at.q + token * k + (part / 4 ^ (token & 1)) * 64 + part % 4 * 16, from);
    }
    for (int i = thread_id(); i < MANY_TOKENS * (f.groups / 4); i += BLOCK_THREADS) {
        const int token = i % MANY_TOKENS, quad = i / MANY_TOKENS;
        const int row = first_token + (token < n_tokens ? token : n_tokens - 1);
        const size_t from = (size_t)row * a.in.group_stride + chunk * f.groups + quad * 4;
        copy_async(slot + at.scale + i * 16, (const uint8_t *)(const void *)(a.in.scale + from));
        if constexpr (has_min(f.scale))
            copy_async(slot + at.scaled_sum + i * 16, (const uint8_t *)(const void *)(a.in.scaled_sum + from));
    }
}

// acc += a step's products of this warp's tiles and tokens.
template <class F>
DEVICE void many_add(float acc[WARP_TILES][WARP_COLUMNS][4], const uint8_t *slot, int first_tile, int first_token) {
    constexpr format_facts f = F::facts;
    constexpr many_step at = many_layout(f);
    constexpr int k = 32 * f.groups;
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    bases base[WARP_TILES];
    UNROLL
    for (int r = 0; r < WARP_TILES; r++) load_bases<F>(base[r], slot + (first_tile + r) * chunk_bytes(f), g);
    UNROLL_BY(1)
    for (int i = 0; i < f.groups / 4; i++) {
        quad q[WARP_TILES];
        quad_scales s[WARP_TILES];
        UNROLL
        for (int r = 0; r < WARP_TILES; r++) {
            load_quad<F>(q[r], slot + (first_tile + r) * chunk_bytes(f), lane, i);
            load_scales<F>(s[r], slot + (first_tile + r) * chunk_bytes(f), g, i);
        }
        UNROLL
        for (int c = 0; c < WARP_COLUMNS; c++) {
            quad_activations x;
            const int token = first_token + c * 8 + g;
            UNROLL
            for (int h = 0; h < 2; h++) {
                const int half = (2 * i + h) ^ (token & 1);
                *(words4 *)(x.b + 4 * h) = *(const words4 *)(slot + at.q + token * k + half * 64 + t * 16);
                const int column = i * MANY_TOKENS + first_token + c * 8 + 2 * t + h;
                *(words4 *)(void *)x.scale[h] = *(const words4 *)(slot + at.scale + column * 16);
                if constexpr (has_min(f.scale))
                    *(words4 *)(void *)x.scaled_sum[h] = *(const words4 *)(slot + at.scaled_sum + column * 16);
            }
            UNROLL
            for (int r = 0; r < WARP_TILES; r++) {
                uint32_t w[4];
                fragment<F, 0>(w, q[r]);
                add_group<F, TOKENS, 0>(acc[r][c], w, s[r], base[r], x);
                fragment<F, 1>(w, q[r]);
                add_group<F, TOKENS, 1>(acc[r][c], w, s[r], base[r], x);
                fragment<F, 2>(w, q[r]);
                add_group<F, TOKENS, 2>(acc[r][c], w, s[r], base[r], x);
                fragment<F, 3>(w, q[r]);
                add_group<F, TOKENS, 3>(acc[r][c], w, s[r], base[r], x);
            }
        }
    }
}

DEVICE void many_wait(int n_slots) {
    if (n_slots == 2)
        copy_async_wait<0>();
    else
        copy_async_wait<1>();
    block_barrier();
}

// block_x: the unit, block_y: which 128 tokens, or which piece. All matrices are of format F; the activations are prepared.
template <class F> KERNEL(BLOCK_THREADS, 1) product_many(const GRID_CONSTANT product_arguments a) {
    constexpr many_step at = many_layout(F::facts);
    uint8_t *slots = shared_memory();
    wait_for_previous();
    let_next_start();
    const int n_tokens = rows_of_block(a, MANY_TOKENS);
    if (n_tokens <= 0) return;
    const int first_token = first_of_block(a, MANY_TOKENS);
    const uint8_t *tiles[MANY_TILES];
    int n_chunks = 0;
    UNROLL
    for (int i = 0; i < MANY_TILES; i++) {
        int tile;
        const int m = many_tile(a, block_x(), i, &tile), last = (a.w[m].rows + 15) / 16 - 1;
        n_chunks = a.w[m].n_chunks;
        tiles[i] = weights_of(a, m).data +
                   (size_t)(tile < last ? tile : last) * (size_t)n_chunks * (size_t)chunk_bytes(F::facts);
    }

    const int ahead = a.n_slots - 1, first_tile = warp_id() / 4 * WARP_TILES, warp_token = warp_id() % 4 * 32;
    float acc[WARP_TILES][WARP_COLUMNS][4], sum[WARP_TILES][WARP_COLUMNS][4];
    int chunk = 0, slot = 0;
    for (; chunk < ahead; chunk++) {
        if (chunk < n_chunks) many_copy<F>(a, tiles, slots + chunk * at.n_bytes, chunk, first_token, n_tokens);
        copy_async_commit();
    }
    chunk = 0;
    UNROLL_BY(1)
    for (int split = 0; split < SPLITS; split++) {
        UNROLL
        for (int r = 0; r < WARP_TILES; r++) UNROLL
        for (int c = 0; c < WARP_COLUMNS; c++) UNROLL
        for (int e = 0; e < 4; e++) acc[r][c][e] = 0;
        UNROLL_BY(1)
        for (const int last = split_first(n_chunks, split + 1); chunk < last; chunk++) {
            many_wait(a.n_slots); // the step is there, and everybody has left the slot of the step before
            int next = slot + ahead;
            if (next >= a.n_slots) next -= a.n_slots;
            if (chunk + ahead < n_chunks)
                many_copy<F>(a, tiles, slots + next * at.n_bytes, chunk + ahead, first_token, n_tokens);
            copy_async_commit();
            many_add<F>(acc, slots + slot * at.n_bytes, first_tile, warp_token);
            if (++slot == a.n_slots) slot = 0;
        }
        UNROLL
        for (int r = 0; r < WARP_TILES; r++) UNROLL
        for (int c = 0; c < WARP_COLUMNS; c++) UNROLL
        for (int e = 0; e < 4; e++) sum[r][c][e] = split == 0 ? acc[r][c][e] : sum[r][c][e] + acc[r][c][e];
    }

    const int g = lane_id() / 4, t = lane_id() % 4;
    UNROLL
    for (int c = 0; c < WARP_COLUMNS; c++) UNROLL
    for (int e = 0; e < 4; e++) {
        const int token = warp_token + c * 8 + 2 * t + e % 2;
        float gate = 0;
        UNROLL
        for (int r = 0; r < WARP_TILES; r++) {
            int tile;
            const int m = many_tile(a, block_x(), first_tile + r, &tile), row = tile * 16 + g + e / 2 * 8;
            if (token >= n_tokens || row >= a.w[m].rows) continue;
            const expert_weights of_matrix = weights_of(a, m);
            const float scaled = sum[r][c][e] * of_matrix.factor;
            put_sum(a, a.w[m].out + (size_t)(first_token + token) * (size_t)a.w[m].rows + row,
                    of_matrix.bias ? scaled + of_matrix.bias[row] : scaled, r, gate);
        }
    }
}

#endif
