// cpu/cpu.h: what the CPU backend's files share: backend.c (the operations), products.c, attend.c and experts.c (how their
// work is cut up), rows.c (single tokens), run.c (a call's buffers), load.c (weights in). Includes tinyllm.h, isa/isa.h.
#ifndef TINYLLM_CPU_H
#define TINYLLM_CPU_H

#include "isa/isa.h"
#include "tinyllm.h"

#define TL_UNITS_THREAD 8 // units of work a thread at least, so that the last ones to finish are short
#define TL_FEW_TOKENS   4 // fewer rows than this are not worth waking threads for
#define TL_MAX_PRODUCTS 4 // that share their activations

// Queries that share a sequence and a kv head: columns [first, first + n) of (tokens, from `token` on) x (heads of the group).
typedef struct tl_tile {
    int token, first, n;
} tl_tile;

// Which experts a batch's tokens go to. A row is one token's visit to one expert: n * n_experts_used of them, those of
// an expert together, experts and then tokens ascending.
typedef struct tl_routing {
    float *scores;  // [n, n_experts] the router's
    int *experts;   // [n, n_experts_used] ascending
    float *weights; // [n, n_experts_used] of those
    int *rows;      // [n, n_experts_used] where their rows are
    int *tokens;    // [n * n_experts_used] each row's token
    int *first_row; // [n_experts + 1] of each expert
    int *active;    // [n_active] experts that have rows
    int n_active;
} tl_routing;

typedef struct tl_cpu_run {
    tl_run base;
    void *arena; // every buffer below
    size_t arena_bytes;
    float *cos, *sin;         // [n, rope_dim / 2], then the same of local layers
    float *k, *v;             // [n, kv heads * head_dim]
    float *normed;            // [n, dim]
    float *up;                // [n, ff_dim], or [rows, ff_dim] where there are experts
    tl_routing routing;       // where there are experts
    float *gate;              // [n, heads * head_dim] of attention's output, where it has one
    float *mixed, *convolved; // [n, channels] where there are layers of Gated DeltaNet (delta.c)
    float *gates;             // [n, 2, v_heads] of those: decay, beta
    float *visits;            // [rows, dim] what experts read, then what they give
    tl_activations in;        // what the products read
    tl_tile *tiles;           // [n_tiles], the same for every kv head
    int *last;                // [n] the last position that a token may attend to, whatever the layer's window
    float *partial;           // [n, heads, n_splits] of v_stride sums, maximum, sum of weights (16 floats apart)
    float *part;              // [threads, 8, v_stride] one segment's result
    size_t q_width, kv_width; // heads * head_dim, kv heads * head_dim
    int layer;                // that an operation works on
    int n_tiles, v_stride;
    int group;               // heads that share a kv head
    int n_splits;            // segments computed apart from each other, or 1
    struct tl_low_rank *low; // of calls with adapters (adapters.c)
} tl_cpu_run;

// load.c
tl_status tl_cpu_upload(tl_matrix *matrix, const tl_source *source, int threads, tl_message *message);
tl_status tl_cpu_upload_floats(float **to, const tl_source *source, int n, tl_message *message);
void tl_cpu_unpack_row(const tl_matrix *matrix, int row, float *out);
tl_status tl_cpu_unpack(const tl_matrix *matrix, float *out);
// run.c
tl_status tl_cpu_begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *batch, tl_message *message);
tl_status tl_cpu_end(tl_run *run, tl_message *message);
void tl_cpu_release(tl_run *run);

// products.c: rows of x (the chosen ones, or the first n), normed where there is a norm, times each product's matrix.
void tl_cpu_products(tl_cpu_run *run, const float *x, const int32_t *rows, int n, const tl_norm *norm,
                     tl_product *products, int n_products);
// rows.c: what happens to a token between the products.
void tl_cpu_norm(const tl_norm *norm, float *out, const float *x, int n);
void tl_cpu_rotate_and_store(tl_cpu_run *run, int layer);
void tl_cpu_add(tl_cpu_run *run, float *add, const tl_norm *norm);
void tl_cpu_finish_logits(tl_cpu_run *run);
// Adds n rows x [n, k] to what the matrix has seen, where somebody asked. On one thread, in order: the same bits always.
void tl_cpu_observe(const tl_matrix *w, const float *x, int n);
// experts.c
void tl_cpu_route(tl_routing *routing, const tl_config *config, int n, int threads); // from scores to the rest
// A unit of the experts' work: panels [first, last) of one expert's matrices times all its rows [from, to), so that a
// batch reads a weight once. Units of one call: n_active * ceil(n_panels / block).
typedef struct tl_expert_unit {
    int expert, first, last, from, to;
} tl_expert_unit;
tl_expert_unit tl_cpu_expert_unit(const tl_routing *routing, int n_panels, int block, int unit);
void tl_cpu_moe(tl_run *run, int layer);
// The halves of their work: hidden = activation(gate) * up; gate into hidden and up apart; visits = what down gives.
typedef enum tl_expert_half { TL_GATED, TL_GATE_AND_UP, TL_DOWN } tl_expert_half;
void tl_cpu_experts(tl_cpu_run *run, const tl_layer *layer, tl_expert_half half);
void tl_cpu_add_visits(tl_cpu_run *run); // x += what the experts gave
// A product's panels [first, last) for rows [from, to) of its input; with `up` both, and the activation.
void tl_cpu_multiply(const tl_product *p, int first, int last, int from, int to);
// Panels a unit takes: as many as stay in L2, at most `share`, whole groups, at least one.
int tl_cpu_block(const tl_matrix *w, int share);
// delta.c
void tl_cpu_delta_net(tl_run *run, int layer);
// adapters.c
extern const tl_backend tl_cpu_adapted;
// attend.c
void tl_cpu_tiles(tl_cpu_run *run);
void tl_cpu_attend(tl_run *run, int layer);

// The pages of a token's sequence that hold the run's layer.
static inline const int32_t *tl_cpu_pages(const tl_cpu_run *r, int token) {
    const tl_batch *b = r->base.batch;
    const tl_model *model = r->base.model;
    const size_t sequence = (size_t)b->sequences[token], table = (size_t)model->layers[r->layer].table;
    return b->page_tables + (sequence * (size_t)model->n_tables + table) * (size_t)b->max_pages;
}

static inline int tl_panels(const tl_matrix *w) { return (w->rows + TL_ROWS - 1) / TL_ROWS; }
static inline int tl_min(int a, int b) { return a < b ? a : b; }
static inline int tl_max(int a, int b) { return a > b ? a : b; }

#endif
