// kernels/low_rank.cuh: what an adapter adds to a product (LoRA, arXiv 2106.09685): out += scale * (x a.T) b.T in float32,
// for rows with different adapters at once. A block a row and matrix; the order of additions depends on the matrices' shape
// alone. And what products leave undone where pairs come in between. Includes product.cuh.
#ifndef TINYLLM_CUDA_LOW_RANK_CUH
#define TINYLLM_CUDA_LOW_RANK_CUH

#include "product.cuh"

// a [rank, k], of the embedding [vocabulary, rank]; b [rows, b_k], row after row in the file's format. a NULL: no pair.
struct low_rank_pair {
    const uint8_t *a, *b;
    int a_format, b_format, rank, k, rows, b_k;
    float scale;
};

struct low_rank_arguments {
    const low_rank_pair *pairs; // [n_targets, n_adapters]
    const int *adapters;        // [tokens, uses] a token's, -1 past its last
    const float *strengths;     // [tokens, uses]
    int n_adapters, uses, use;  // use: which of them this is
    const int *n, *rows;        // rows there are; their tokens, NULL: the same
    int first, most;            // of them, from here on into 0.. of x, low and out, so many at most
    const float *x;             // [most, x_stride]
    int x_stride;
    const int *ids; // in place of x, where rows of a are looked up
    float *low;     // [n_targets, most, low_stride]
    int low_stride;
    float *out[3]; // [most, rows of the pair]
    float scale;   // beside the pair's
};

DEVICE float float_at(const uint8_t *data, int format, size_t i) {
    if (format == 0) return ((const float *)(const void *)data)[i];
    const uint32_t half = ((const uint16_t *)(const void *)data)[i];
    return format == 1 ? half_to_float(half) : bf16_to_float(half);
}

// The pair of the block's row and matrix, NULL where it has none, and its scale.
DEVICE const low_rank_pair *find_pair(const low_rank_arguments &a, float *scale) {
    const int row = a.first + block_x();
    if (row >= *a.n) return NULL;
    const size_t at = (size_t)(a.rows ? a.rows[row] : row) * a.uses + a.use;
    const int adapter = a.adapters[at];
    if (adapter < 0) return NULL;
    const low_rank_pair *pair = a.pairs + (size_t)block_y() * a.n_adapters + adapter;
    *scale = a.scale * a.strengths[at] * pair->scale;
    return pair->a ? pair : NULL;
}
DEVICE float *low_of_block(const low_rank_arguments &a) {
    return a.low + ((size_t)block_y() * a.most + block_x()) * a.low_stride;
}

// low = scale * x a.T. block_x: the row, block_y: the matrix; a warp a sum.
KERNEL(BLOCK_THREADS, 1) low_rank_in(const low_rank_arguments a) {
    wait_for_previous();
    let_next_start();
    float scale;
    const low_rank_pair *pair = find_pair(a, &scale);
    if (!pair) return;
    const low_rank_pair p = *pair;
    float *low = low_of_block(a);
    const float *x = a.x + (size_t)block_x() * a.x_stride;
    for (int i = warp_id(); i < p.rank; i += BLOCK_WARPS) {
        float sum = 0;
        if (a.ids) {
            sum = float_at(p.a, p.a_format, (size_t)a.ids[a.first + block_x()] * p.rank + i);
        } else {
            for (int k = lane_id(); k < p.k; k += 32)
                sum = fmaf(float_at(p.a, p.a_format, (size_t)i * p.k + k), x[k], sum);
            sum = warp_sum(sum);
        }
        if (lane_id() == 0) low[i] = scale * sum;
    }
    if (thread_id() == 0 && p.b_k > p.rank) low[p.rank] = scale; // times the bias
}

// out += low b.T. block_z: which BLOCK_THREADS of the matrix's rows.
KERNEL(BLOCK_THREADS, 1) low_rank_out(const low_rank_arguments a) {
    wait_for_previous();
    let_next_start();
    float scale;
    const low_rank_pair *pair = find_pair(a, &scale);
    if (!pair) return;
    const low_rank_pair p = *pair;
    const float *low = low_of_block(a);
    const int row = block_z() * BLOCK_THREADS + thread_id();
    if (row >= p.rows) return;
    float sum = 0;
    for (int i = 0; i < p.b_k; i++) sum = fmaf(float_at(p.b, p.b_format, (size_t)row * p.b_k + i), low[i], sum);
    a.out[block_y()][(size_t)block_x() * p.rows + row] += sum;
}

struct finish_arguments {
    float *out;      // [most, k]
    const float *up; // NULL: scale and cap, or a unit without a gate
    gating activation;
    ungated unit; // where it is one, of out alone
    float scale, cap;
    int k, first;
    const int *n;
};

// out = gated(out, up), a unit without a gate, or scale * out, capped. block_x: the row.
KERNEL(BLOCK_THREADS, 1) finish(const finish_arguments a) {
    wait_for_previous();
    let_next_start();
    if (a.first + block_x() >= *a.n) return;
    const size_t row = (size_t)block_x() * a.k;
    for (int i = thread_id(); i < a.k; i += BLOCK_THREADS) {
        const float x = a.out[row + i];
        if (a.unit.is)
            a.out[row + i] = ungated_of(a.unit, x);
        else if (a.up)
            a.out[row + i] = gated(a.activation, x, a.up[row + i]);
        else
            a.out[row + i] = a.cap > 0 ? soft_cap(a.scale * x, a.cap) : a.scale * x;
    }
}

#endif
