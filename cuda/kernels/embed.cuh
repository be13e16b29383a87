// kernels/embed.cuh: a call's first kernel: rows of the embedding, and cos and sin of the tokens' positions.
// Includes pack.cuh and numeric.cuh.
#ifndef TINYLLM_CUDA_EMBED_CUH
#define TINYLLM_CUDA_EMBED_CUH

#include "numeric.cuh"
#include "pack.cuh"

struct embed_arguments {
    const uint8_t *data; // the embedding
    int format, n_chunks, dim, rope_dim;
    const int *tokens, *positions, *n; // tokens: NULL where x is there already
    const double *frequencies;         // [n_ropes, rope_dim / 2] radians a position
    int n_ropes;
    float factor;            // of the embedding's numbers
    float scale, rope_scale; // of the rows; of the first cos and sin
    float *x, *cos, *sin;    // [n, dim], [n_ropes, blocks, rope_dim / 2] x2
};

// block_x: the token.
KERNEL(256, 1) embed(const embed_arguments e) {
    wait_for_previous();
    let_next_start();
    const int t = block_x(), half = e.rope_dim / 2;
    if (t >= *e.n) return;
    for (int i = thread_id(); i < e.n_ropes * half; i += n_threads()) {
        const int rope = i / half;
        const size_t at = ((size_t)rope * n_blocks_x() + t) * half + i % half;
        const float scale = rope == 0 ? e.rope_scale : 1.0f;
        double sine, cosine;
        sine_cosine(e.positions[t] * e.frequencies[i], &sine, &cosine);
        e.cos[at] = (float)cosine * scale;
        e.sin[at] = (float)sine * scale;
    }
    if (!e.tokens) return;
    for (int i = thread_id(); i < e.dim; i += n_threads())
        e.x[(size_t)t * e.dim + i] = value_at(e.data, e.format, e.n_chunks, e.tokens[t], i) * e.factor * e.scale;
}

#endif
