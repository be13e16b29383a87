// kernels/experts.cuh: where a mixture of experts sends its tokens, and how what they bring back is added. A visit is one
// token at one expert; visits of one expert are rows that follow each other, cut into pieces for the products (product.cuh),
// which read an expert's weights once a piece. Which row is a visit's is left to chance: it changes no bit of its result.
// Includes product.cuh.
#ifndef TINYLLM_CUDA_EXPERTS_CUH
#define TINYLLM_CUDA_EXPERTS_CUH

#include "product_many.cuh"

enum { N_VISITS, N_PIECES, N_MANY_PIECES, N_ROUTED };

struct routing {
    int *experts;       // [n, n_used] a token's, ascending
    float *weights;     // [n, n_used] of what they give
    int *rows;          // [n, n_used] the visits'
    int *tokens;        // [n * n_used] the rows'
    piece *pieces;      // of TOKENS rows at most
    piece *many_pieces; // of MANY_TOKENS
    int *counts;        // [N_ROUTED]
    int *visits;        // [n_experts], and of blocks that are done: zeros between kernels
};

struct route_arguments {
    const float *scores; // [n, n_experts]
    const int *n;
    int n_experts, n_used;
    bool norm_topk; // weights are divided by the sum of the chosen ones'
    routing to;
};

BOTH size_t route_shared_bytes(int n_experts) { return (BLOCK_WARPS + 3 * (size_t)n_experts + 1) * 4; }

// The experts of block_x's token, those with the highest scores (of equal ones the lower), and their weights, a softmax. The
// last block to get there finds a row for every visit.
KERNEL(BLOCK_THREADS, 1) route(const route_arguments a) {
    const int n_experts = a.n_experts, n_used = a.n_used, t = block_x();
    float *sums = (float *)(void *)shared_memory(), *scores = sums + BLOCK_WARPS, *powers = scores + n_experts;
    int *chosen = (int *)(void *)(powers + n_experts), *last = chosen + n_experts;
    wait_for_previous();
    let_next_start();
    const int n = *a.n;
    if (t >= n) return;
    for (int e = thread_id(); e < n_experts; e += BLOCK_THREADS) scores[e] = a.scores[(size_t)t * n_experts + e];
    block_barrier();
    for (int e = thread_id(); e < n_experts; e += BLOCK_THREADS) {
        int better = 0;
        float largest = scores[0];
        for (int i = 0; i < n_experts; i++) {
            better += scores[i] > scores[e] || (scores[i] == scores[e] && i < e);
            largest = scores[i] > largest ? scores[i] : largest;
        }
        chosen[e] = better < n_used;
        powers[e] = exponential(scores[e] - largest);
    }
    block_barrier();
    sum_row(sums, n_experts, [&](float sum, int e) { // a score that is NaN or infinite makes all weights NaN
        return sum + (a.norm_topk && !chosen[e] ? scores[e] - scores[e] : powers[e] + (scores[e] - scores[e]));
    });
    block_barrier();
    for (int e = thread_id(); e < n_experts; e += BLOCK_THREADS) {
        int place = 0;
        for (int i = 0; i < e; i++) place += chosen[i];
        if (!chosen[e] || place >= n_used) continue; // more are chosen where scores are no numbers
        const int visit = t * n_used + place;
        a.to.experts[visit] = e;
        a.to.weights[visit] = powers[e] / sum_warps(sums);
        a.to.rows[visit] = atomic_add(a.to.visits + e, 1);
    }

    memory_fence();
    block_barrier();
    int *arrived = a.to.visits + n_experts;
    if (thread_id() == 0) *last = atomic_add(arrived, 1) == n - 1;
    block_barrier();
    if (!*last) return;
    memory_fence();
    int *count = (int *)(void *)scores, *first = chosen;
    for (int e = thread_id(); e <= n_experts; e += BLOCK_THREADS) {
        if (e < n_experts) count[e] = load_fresh(a.to.visits + e);
        a.to.visits[e] = 0;
    }
    block_barrier();
    for (int e = thread_id(); e < n_experts; e += BLOCK_THREADS) {
        int row = 0, few = 0, many = 0;
        for (int i = 0; i < e; i++) {
            row += count[i];
            few += (count[i] + TOKENS - 1) / TOKENS;
            many += (count[i] + MANY_TOKENS - 1) / MANY_TOKENS;
        }
        first[e] = row;
        for (int i = 0; i < count[e]; i += TOKENS)
            a.to.pieces[few++] = {row + i, count[e] - i < TOKENS ? count[e] - i : TOKENS, e};
        for (int i = 0; i < count[e]; i += MANY_TOKENS)
            a.to.many_pieces[many++] = {row + i, count[e] - i < MANY_TOKENS ? count[e] - i : MANY_TOKENS, e};
        if (e + 1 < n_experts) continue;
        a.to.counts[N_VISITS] = n * n_used;
        a.to.counts[N_PIECES] = few;
        a.to.counts[N_MANY_PIECES] = many;
    }
    block_barrier();
    for (int visit = thread_id(); visit < n * n_used; visit += BLOCK_THREADS) {
        const int row = first[load_fresh(a.to.experts + visit)] + load_fresh(a.to.rows + visit);
        a.to.rows[visit] = row;
        a.to.tokens[row] = visit / n_used;
    }
}

struct add_visits_arguments {
    float *x;         // [n, k]
    const float *add; // [n * n_used, k]
    routing from;
    int k, n_used;
    const int *n;
};

// x += weight * what the expert gave, in ascending order of experts. block_x: the token.
KERNEL(BLOCK_THREADS, 1) add_visits(const add_visits_arguments a) {
    wait_for_previous();
    let_next_start();
    const int t = block_x();
    if (t >= *a.n) return;
    for (int d = thread_id(); d < a.k; d += BLOCK_THREADS) {
        float sum = a.x[(size_t)t * a.k + d];
        for (int visit = t * a.n_used; visit < (t + 1) * a.n_used; visit++)
            sum += a.from.weights[visit] * a.add[(size_t)a.from.rows[visit] * a.k + d];
        a.x[(size_t)t * a.k + d] = sum;
    }
}

#endif
