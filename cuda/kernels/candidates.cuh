// kernels/candidates.cuh: of each row of logits the k largest that may come, and what a probability needs of the others, so
// that a vocabulary need not cross the bus: pieces of a row are sorted, their best merged, and the sum of exponentials, over
// all logits, is added up in the order of csrc/sample.c's exp_sum, to the same bits. Includes activations.cuh.
#ifndef TINYLLM_CUDA_CANDIDATES_CUH
#define TINYLLM_CUDA_CANDIDATES_CUH

#include "activations.cuh"

#define MOST_CANDIDATES 64
#define SORT_PIECE      4096                // logits that a block sorts
#define MOST_MERGED     8192                // candidates that a block merges
#define SUM_PIECE       1024                // sample.c's PIECE
#define SUM_LANES       16                  // and LANES
#define NO_CANDIDATE    0xff800000ffffffffu // token -1 with the logit -inf: behind all others

struct candidate_arguments {
    const float *logits; // [rows, n]
    const int *n_rows;
    int n, k;                // logits of a row; candidates wanted, k <= n
    const uint32_t *allowed; // [rows, mask_words(n)] a bit a token, lowest first: what may be a candidate; NULL: all
    uint64_t *best;          // [rows, pieces, k] of each piece, in order
    float *largest;          // [rows, pieces] of all logits of each piece
    uint64_t *result;        // [rows, 2 + k]: the sum, a float64; the largest of all; then candidates in order
    float *parts;            // [rows, sum pieces, SUM_LANES]
    int *arrived;            // [rows], zeros between kernels
};

BOTH int n_sorted(int n) { return (n + SORT_PIECE - 1) / SORT_PIECE; }
BOTH int n_summed(int n) { return (n + SUM_PIECE - 1) / SUM_PIECE; }
BOTH int mask_words(int n) { return (n + 31) / 32; }
BOTH int power_from(int n) {
    int power = 2;
    while (power < n) power *= 2;
    return power;
}

// Candidates ascend as logits descend, and, where these are equal (-0 is 0), as ids ascend.
DEVICE uint64_t candidate_of(float logit, int id) {
    const uint32_t bits = as_bits(logit + 0.0f);
    return (uint64_t)(bits & 0x80000000u ? bits : ~(bits | 0x80000000u)) << 32 | (uint32_t)id;
}
BOTH uint32_t candidate_bits(uint64_t candidate) { // of its logit
    const uint32_t key = (uint32_t)(candidate >> 32);
    return key & 0x80000000u ? key : ~key & 0x7fffffffu;
}

// Batcher's bitonic sort of n numbers, a power of two, in shared memory, by the whole block.
DEVICE void sort_shared(uint64_t *x, int n) {
    for (int size = 2; size <= n; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            block_barrier();
            for (int i = thread_id(); i < n / 2; i += n_threads()) {
                const int low = i / stride * 2 * stride + i % stride, high = low + stride;
                const uint64_t a = x[low], b = x[high];
                if ((a > b) == ((low & size) == 0)) {
                    x[low] = b;
                    x[high] = a;
                }
            }
        }
    block_barrier();
}

// block_x: the piece, block_y: the row.
KERNEL(BLOCK_THREADS, 1) sort_pieces(const candidate_arguments c) {
    float *of_warps = (float *)(void *)shared_memory(); // [BLOCK_WARPS] the largest of all logits that a warp read
    uint64_t *x = (uint64_t *)(void *)(of_warps + BLOCK_WARPS);
    wait_for_previous();
    let_next_start();
    const int row = block_y(), first = block_x() * SORT_PIECE, left = c.n - first;
    if (row >= *c.n_rows) return;
    const int n = left < SORT_PIECE ? left : SORT_PIECE, padded = power_from(n < c.k ? c.k : n);
    const float *logits = c.logits + (size_t)row * c.n;
    const uint32_t *allowed = c.allowed ? c.allowed + (size_t)row * mask_words(c.n) : NULL;
    float largest = -INFINITY;
    for (int i = thread_id(); i < padded; i += n_threads()) {
        const int id = first + i;
        const bool is_allowed = i < n && (!allowed || (allowed[id / 32] >> id % 32 & 1));
        if (i < n) largest = larger(largest, logits[id]);
        x[i] = is_allowed ? candidate_of(logits[id], id) : NO_CANDIDATE;
    }
    largest = warp_largest(largest);
    if (lane_id() == 0) of_warps[warp_id()] = largest;
    sort_shared(x, padded);
    const size_t piece = (size_t)row * n_sorted(c.n) + block_x();
    for (int i = thread_id(); i < c.k; i += n_threads()) c.best[piece * c.k + i] = x[i];
    if (thread_id() > 0) return;
    for (int i = 1; i < BLOCK_WARPS; i++) largest = larger(largest, of_warps[i]);
    c.largest[piece] = largest;
}

// block_x: the row.
KERNEL(BLOCK_THREADS, 1) merge_pieces(const candidate_arguments c) {
    uint64_t *x = (uint64_t *)(void *)shared_memory();
    wait_for_previous();
    let_next_start();
    const int row = block_x(), pieces = n_sorted(c.n), n = pieces * c.k, padded = power_from(n);
    if (row >= *c.n_rows) return;
    for (int i = thread_id(); i < padded; i += n_threads()) x[i] = i < n ? c.best[(size_t)row * n + i] : NO_CANDIDATE;
    sort_shared(x, padded);
    uint64_t *result = c.result + (size_t)row * (2 + c.k);
    for (int i = thread_id(); i < c.k; i += n_threads()) result[2 + i] = x[i];
    if (thread_id() > 0) return;
    float largest = c.largest[(size_t)row * pieces];
    for (int i = 1; i < pieces; i++) largest = larger(largest, c.largest[(size_t)row * pieces + i]);
    result[1] = as_bits(largest);
}

// e^x for x <= 0, as sample.c's exponent and exp_of have it.
DEVICE float sample_exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 0x1.715476p0f + 0x1.8p23f, k = shifted - 0x1.8p23f;
    const float r = (x - k * 0x1.63p-1f) + k * 0x1.bd0106p-13f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * as_float((as_bits(shifted) << 23) + 0x3f800000u);
}

// block_x: the piece, block_y: the row. The row's last block adds the pieces up.
KERNEL(BLOCK_THREADS, 1) sum_exponentials(const candidate_arguments c) {
    float *e = (float *)(void *)shared_memory(); // [SUM_PIECE], and whether this block is the last
    int *last = (int *)(void *)(e + SUM_PIECE);
    wait_for_previous();
    let_next_start();
    const int row = block_y(), first = block_x() * SUM_PIECE, left = c.n - first, n_parts = n_summed(c.n);
    if (row >= *c.n_rows) return;
    uint64_t *result = c.result + (size_t)row * (2 + c.k);
    const float largest = as_float((uint32_t)result[1]), *x = c.logits + (size_t)row * c.n + first;
    for (int i = thread_id(); i < SUM_PIECE; i += n_threads())
        e[i] = i < left ? sample_exponential(x[i] - largest) : 0.0f;
    block_barrier();
    float *parts = c.parts + (size_t)row * n_parts * SUM_LANES;
    if (thread_id() < SUM_LANES) {
        float sum = 0;
        for (int i = thread_id(); i < SUM_PIECE; i += SUM_LANES) sum += e[i];
        parts[block_x() * SUM_LANES + thread_id()] = sum;
    }
    memory_fence();
    block_barrier();
    if (thread_id() == 0) {
        *last = atomic_add(c.arrived + row, 1) == n_parts - 1;
        if (*last) c.arrived[row] = 0;
    }
    block_barrier();
    if (!*last) return;
    memory_fence();
    double *totals = (double *)(void *)e;
    if (thread_id() < SUM_LANES) {
        double total = 0;
        for (int i = 0; i < n_parts; i++) total += (double)load_fresh(parts + i * SUM_LANES + thread_id());
        totals[thread_id()] = total;
    }
    block_barrier();
    if (thread_id() > 0) return;
    for (int half = SUM_LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) totals[j] += totals[j + half];
    memcpy(result, totals, sizeof *totals);
}

#endif
