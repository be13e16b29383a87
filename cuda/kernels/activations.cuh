// kernels/activations.cuh: what products read: rows of x, normed where there is a norm, as int8 groups of 32 for quantized
// weights and as floats for the others. Written into a block's shared memory when few tokens share the weights (every block
// makes its own, which is cheaper than a launch), into global memory when many do: the same function, so the same bits. And
// what is normed before it is added to x. Includes numeric.cuh. Read product.cuh next.
#ifndef TINYLLM_CUDA_ACTIVATIONS_CUH
#define TINYLLM_CUDA_ACTIVATIONS_CUH

#include "numeric.cuh"

#define BLOCK_THREADS 256 // of every kernel that sums a row: the order of additions depends on it
#define BLOCK_WARPS   8
#define TOKENS        8 // columns of a product's tile

// Strides in elements, padded so that neighbouring tokens lie in other banks; past k there are zeros.
struct activations {
    int8_t *q;           // [n, q_stride]: of each 64 k, t = 0..3: k 4t.., 16 + 4t.., 32 + 4t.., 48 + 4t.. (B fragments)
    float *scale;        // [n, group_stride]: x = scale * q
    float *scaled_sum;   // [n, group_stride]: scale * sum of q
    uint32_t *half_sums; // [n, group_stride]: int16 sums of q's first and last 16
    float *x;            // [n, x_stride]
    int q_stride, group_stride, x_stride;
};

// Places them behind base (or only counts, base NULL); returns the bytes, a multiple of 16.
BOTH size_t place_activations(activations *a, uint8_t *base, int n, int k, bool quantized, bool floats) {
    const int k_padded = (k + 255) / 256 * 256;
    size_t used = 0;
    a->q_stride = k_padded + 64;
    a->group_stride = k_padded / 32 + 4;
    a->x_stride = (k + 63) / 64 * 64 + 8;
    a->q = (int8_t *)(base + used);
    used += quantized ? (size_t)n * (size_t)a->q_stride : 0;
    a->scale = (float *)(void *)(base + used);
    used += quantized ? (size_t)n * (size_t)a->group_stride * 4 : 0;
    a->scaled_sum = (float *)(void *)(base + used);
    used += quantized ? (size_t)n * (size_t)a->group_stride * 4 : 0;
    a->half_sums = (uint32_t *)(void *)(base + used);
    used += quantized ? (size_t)n * (size_t)a->group_stride * 4 : 0;
    a->x = (float *)(void *)(base + used);
    used += floats ? (size_t)n * (size_t)a->x_stride * 4 : 0;
    return used;
}

DEVICE float warp_sum(float x) { // a fixed tree
    for (int i = 16; i >= 1; i /= 2) x += shuffle_xor(x, i);
    return x;
}

DEVICE float larger(float x, float y) { return x > y || x != x ? x : y; } // NaN, where one is: it has to show
DEVICE float warp_largest(float x) {
    for (int i = 16; i >= 1; i /= 2) x = larger(x, shuffle_xor(x, i));
    return x;
}

// ---- norms --------------------------------------------------------------------------------------------------------------

struct row_norm {
    const float *weight; // [k], or NULL: the row stays as it is
    const float *bias;   // [k], added; or NULL
    float eps;
    bool centred; // LayerNorm, arXiv 1607.06450; else RMSNorm, arXiv 1910.07467, which is that with a mean of 0
};

#define NORM_SUMS (2 * BLOCK_WARPS) // floats of shared memory a row: the warps' sums, then their sums of squares

// In one order whatever the row is read for: a thread's in order, the warp's tree, the warps in order.
template <class Add> DEVICE void sum_row(float *sums, int k, Add add) {
    float sum = 0;
    for (int i = thread_id(); i < k; i += BLOCK_THREADS) sum = add(sum, i);
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
}
DEVICE float sum_warps(const float *sums) {
    float sum = sums[0];
    for (int i = 1; i < BLOCK_WARPS; i++) sum += sums[i];
    return sum;
}

DEVICE float mean_of(const row_norm &norm, const float *sums, int k) {
    return norm.centred ? sum_warps(sums) / (float)k : 0.0f;
}
DEVICE float scale_of(const row_norm &norm, const float *sums, int k) {
    return norm_scale(sum_warps(sums + BLOCK_WARPS) / (float)k, norm.eps);
}

// Number i of a row, whose mean and scale are known.
DEVICE float normed(const row_norm &norm, float x, float mean, float scale, int i) {
    const float y = (x - mean) * scale * norm.weight[i];
    return norm.bias ? y + norm.bias[i] : y;
}

// Into sums, of n rows of k: what their means and scales are made of. Ends with a barrier.
template <class Row> DEVICE void sum_rows(const row_norm &norm, float *sums, int n, int k, Row row) {
    if (norm.centred) {
        for (int t = 0; t < n; t++) {
            const float *x = row(t);
            sum_row(sums + t * NORM_SUMS, k, [&](float sum, int i) { return sum + x[i]; });
        }
        block_barrier();
    }
    for (int t = 0; t < n; t++) {
        const float *x = row(t), mean = mean_of(norm, sums + t * NORM_SUMS, k);
        sum_row(sums + t * NORM_SUMS + BLOCK_WARPS, k,
                [&](float sum, int i) { return fmaf(x[i] - mean, x[i] - mean, sum); });
    }
    block_barrier();
}

// ---- activations --------------------------------------------------------------------------------------------------------

// A warp rounds one group: scale = largest / 127, q = x / scale half to even. A group too small for 127 / largest to be
// finite becomes zeros. So does one with a number that is NaN or infinite, and its scale says so to all that reads it.
DEVICE void quantize_group(const activations &a, int t, int group, float x) {
    const int lane = lane_id(), e = lane % 16;
    const float largest = warp_largest(fabsf(x));
    const bool usable = largest > 0x1p-100f && largest < INFINITY;
    const int q = usable ? round_to_int(x * (127.0f / largest)) : 0;
    int half = q;
    for (int i = 8; i >= 1; i /= 2) half += shuffle_xor(half, i);
    const int other = shuffle_xor(half, 16);
    a.q[(size_t)t * a.q_stride + group / 2 * 64 + e / 4 * 16 + group % 2 * 8 + lane / 16 * 4 + e % 4] = (int8_t)q;
    if (lane == 0) {
        const size_t at = (size_t)t * a.group_stride + group;
        const float scale = largest <= 0x1p-100f ? 0.0f : largest / 127.0f;
        a.scale[at] = scale;
        a.scaled_sum[at] = scale * (float)(half + other);
        a.half_sums[at] = ((uint32_t)half & 0xffff) | (uint32_t)other << 16;
    }
}

struct activation_source {
    const float *x;  // [.., k]
    const int *rows; // which of x, or NULL: as they come
    row_norm norm;
    int k;
    bool quantized, floats; // what to make
};

// A block makes tokens first..first + n - 1 (n <= 8) into 0.. of `to`. sums: NORM_SUMS floats a token. Ends with a barrier.
DEVICE void prepare_tokens(const activation_source &s, const activations &to, int first, int n, float *sums) {
    const int k_padded = s.floats && !s.quantized ? (s.k + 63) / 64 * 64 : (s.k + 255) / 256 * 256;
    const int x_padded = (s.k + 63) / 64 * 64;
    const bool norm = s.norm.weight != NULL;
    auto row = [&](int t) { return s.x + (size_t)(s.rows ? s.rows[first + t] : first + t) * s.k; };
    if (norm) sum_rows(s.norm, sums, n, s.k, row);
    for (int t = 0; t < n; t++) {
        const float *x = row(t);
        const float mean = norm ? mean_of(s.norm, sums + t * NORM_SUMS, s.k) : 0.0f;
        const float scale = norm ? scale_of(s.norm, sums + t * NORM_SUMS, s.k) : 1.0f;
        for (int i = thread_id(); i < k_padded; i += BLOCK_THREADS) {
            float value = i < s.k ? x[i] : 0.0f;
            if (norm && i < s.k) value = normed(s.norm, value, mean, scale, i);
            if (s.floats && i < x_padded) to.x[(size_t)t * to.x_stride + i] = value;
            if (s.quantized) quantize_group(to, t, i / 32, value);
        }
    }
    block_barrier();
}

struct prepare_arguments {
    activation_source source;
    activations to;
    const int *n; // tokens there are
    int first;    // of them, from here on, into 0.. of `to`
};

// Many tokens: a block each.
KERNEL(BLOCK_THREADS, 1) prepare(const prepare_arguments p) {
    float *sums = (float *)(void *)shared_memory();
    wait_for_previous();
    let_next_start();
    const int t = block_x();
    if (p.first + t >= *p.n) return;
    activations to = p.to;
    to.q += (size_t)t * to.q_stride;
    to.scale += (size_t)t * to.group_stride;
    to.scaled_sum += (size_t)t * to.group_stride;
    to.half_sums += (size_t)t * to.group_stride;
    to.x += (size_t)t * to.x_stride;
    prepare_tokens(p.source, to, p.first + t, 1, sums);
}

struct add_arguments {
    float *x;         // [n, k]
    const float *add; // [n, k]
    row_norm norm;    // of what is added
    float scale;
    int k;
    const int *n;
};

// x += scale * norm(add). block_x: the token.
KERNEL(BLOCK_THREADS, 1) add_normed(const add_arguments a) {
    float *sums = (float *)(void *)shared_memory();
    wait_for_previous();
    let_next_start();
    const int t = block_x();
    if (t >= *a.n) return;
    float *x = a.x + (size_t)t * a.k;
    const float *add = a.add + (size_t)t * a.k;
    sum_rows(a.norm, sums, 1, a.k, [&](int) { return add; });
    const float mean = mean_of(a.norm, sums, a.k), scale = scale_of(a.norm, sums, a.k);
    for (int i = thread_id(); i < a.k; i += BLOCK_THREADS)
        x[i] = fmaf(a.scale, normed(a.norm, add[i], mean, scale, i), x[i]);
}

#endif
