// isa/isa.h: what an instruction set provides to the CPU backend: one table of kernels. Each target's .c defines
// one, from its primitives (scalar.h, avx2.h, ...) and the code written once in kernels/ and in formats/'s fragments.
#ifndef TINYLLM_ISA_H
#define TINYLLM_ISA_H

#include "formats/formats.h"
#include "tinyllm.h"

// What goes with 32 activations rounded to int8: x = scale * q; sum and half are q's sums (whole, first 16, last 16).
typedef struct tl_q_group {
    float scale, scaled_sum; // scaled_sum = scale * sum
    int32_t sum, half[2];
} tl_q_group;

// Activations of n tokens: as floats x [n, k] and, for quantized weights, as int8 q [n, k] with groups [n, k / 32]. Where
// there is a matrix unit the latter stand in its order, too, or tiles is NULL: isa/tiles.inc's arrange has it.
typedef struct tl_activations {
    const float *x;
    int8_t *q;
    tl_q_group *groups;
    int k, n_rows; // n_rows: of tiles and scales
    int8_t *tiles; // TL_TILES_BYTES(n_rows, k)
    float *scales; // TL_TILES_SCALES(n_rows, k)
} tl_activations;

// What tiles and scales hold: a register reads 16 tokens, up to 15 of them past the last, and two more are read that nobody
// needs.
#define TL_TILES_BYTES(n_rows, k)  (((size_t)(n_rows) + 48) * (size_t)(k))
#define TL_TILES_SCALES(n_rows, k) (((size_t)(n_rows) + 16) * (size_t)(k) / TL_Q * 4)

// The first block of a panel, and how far apart its blocks are: the panels of a group store theirs side by side.
static inline uint8_t *tl_panel(const tl_matrix *w, int panel, size_t *side) {
    const int n_panels = (w->rows + TL_ROWS - 1) / TL_ROWS, lead = panel / TL_GROUP * TL_GROUP;
    const size_t bytes = (size_t)w->format->panel_bytes, n_blocks = (size_t)(w->k / w->format->block);
    *side = (size_t)(n_panels - lead < TL_GROUP ? n_panels - lead : TL_GROUP) * bytes;
    return (uint8_t *)w->data + (size_t)lead * n_blocks * bytes + (size_t)(panel - lead) * bytes;
}

// Before a loop over registers. Compilers that optimize nothing, as for tests under sanitizers, would warn that they do not.
#if !defined V_UNROLL && defined __NO_INLINE__
#define V_UNROLL
#elif !defined V_UNROLL
#define V_UNROLL _Pragma("GCC unroll 16")
#endif

// For bytes that will soon be read: fetches them into L2.
static inline __attribute__((always_inline)) void ask(const uint8_t *p, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// out[t * stride + row] = (add ? out : 0) + (in @ w.T)[t, row] (+ bias).
typedef struct tl_product {
    const tl_matrix *w;
    const tl_activations *in;
    float *out;
    size_t stride;
    int add;
    struct tl_product *up; // NULL, or the product that out goes with: out = activation(out) * up's, once both are there
    tl_activation activation;
    const float *xielu; // without `up`: out = activation(out), xIELU by these numbers; NULL: out as it is
} tl_product;

// Queries that share a kv head and a sequence, against one segment of at most 256 positions. Column c sees
// positions [from[c], to[c]) of the segment (to > from); its result is unnormalized: out = sum p v, max and
// sum of the scores.
#define TL_COLUMNS 8
typedef struct tl_segment {
    int n_columns, head_dim, v_stride, type;
    const float *q[TL_COLUMNS];           // [head_dim], scaled
    const int8_t *q8[TL_COLUMNS];         // the same in groups of 32, for a Q8_0 cache: [head_dim]
    const tl_q_group *groups[TL_COLUMNS]; // [head_dim / 32]
    float cap;                            // of the scores, or 0
    int from[TL_COLUMNS], to[TL_COLUMNS];
    const uint8_t *k[TL_SEGMENT / TL_PAGE],
        *v[TL_SEGMENT / TL_PAGE]; // one head's keys and values, a page each
    // What the thread reads after this segment, or NULL: pages are small pieces all over memory, each begun anew before a
    // processor sees where it leads, so they are asked for a segment ahead.
    const uint8_t *next_k[TL_SEGMENT / TL_PAGE], *next_v[TL_SEGMENT / TL_PAGE];
    float *out[TL_COLUMNS]; // [v_stride]
    float max[TL_COLUMNS], sum[TL_COLUMNS];
} tl_segment;

// Tokens of a sequence, a head, and 16 columns of its state (kernels/delta.inc).
typedef struct tl_delta_rule {
    float *state;              // [k_dim][16]
    const float *q, *k, *v;    // of the first token, the others' each `stride` numbers further
    float *out;                // [16]; likewise
    const float *decay, *beta; // likewise, gate_stride
    size_t stride, gate_stride;
    int n, k_dim;
} tl_delta_rule;

typedef struct tl_kernels {
    const char *name;
    int (*usable)(void);
    // Panels [first, last) of the matrix, tokens [from, to).
    void (*matmul[TL_N_FORMATS])(const tl_product *p, int first, int last, int from, int to);
    void (*segment)(tl_segment *s);
    // Adds a segment's result to a running one (both: out [v_stride], max, sum). Start from max = -inf, sum =
    // 0, out = 0.
    void (*merge)(float *out, float *max, float *sum, const float *part, float part_max, float part_sum, int n);
    void (*rmsnorm)(float *out, const float *x, const float *weight, float eps, int n);
    void (*quantize)(int8_t *q, tl_q_group *groups, const float *x, int n); // n a multiple of 32
    // By tl_activation: gate = activation(gate) * up; of those without a gate up = activation(up), xIELU's numbers beside it.
    void (*glu[5])(float *gate, const float *up, int n);
    // Rotates n_heads heads in place (half-split pairs), then multiplies by scale.
    void (*rope)(float *x, const float *cos, const float *sin, int n_heads, int head_dim, int rope_dim, float scale);
    // One token's key and value of one head into slot `slot` of a page.
    void (*store_kv)(uint8_t *k_page, uint8_t *v_page, const float *k, const float *v, int slot, int head_dim,
                     int type);
    // Reads n bytes (a multiple of 256) and little else: returns their 8-byte words or-ed together.
    uint64_t (*read)(const uint8_t *p, size_t n_bytes);
    // Multiplies and little else: see kernels/read.inc.
    uint32_t (*multiply_bytes)(const uint8_t *p, size_t n_bytes, int times);
    float (*multiply_floats)(const float *p, size_t n, int times);
    void (*layernorm)(float *out, const float *x, const float *weight, float eps, int n);
    void (*soft_cap)(float *x, float cap, int n); // x = cap * tanh(x / cap)
    // A row of floats to a file's blocks, as tl_format.quantize; and n numbers of a format of floats to floats.
    void (*to_blocks[TL_N_FORMATS])(uint8_t *blocks, const float *x, size_t k, const float *importance);
    void (*to_floats)(float *out, const uint8_t *in, size_t n, int index);
    // Gated DeltaNet (kernels/delta.inc): its convolution of 16 channels, past [kernel - 1][16], and its rule; x *= the
    // sigmoid of gate.
    void (*conv)(float *out, const float *in, size_t stride, const float *past, const float *weights, int kernel,
                 int n);
    void (*delta_rule)(const tl_delta_rule *r);
    void (*sigmoid_mul)(float *x, const float *gate, int n);
    void (*arrange)(const tl_activations *in, int row); // or NULL: a row of q and groups into tiles and scales
} tl_kernels;

const tl_kernels *tl_isa(void); // the one in use

#endif
