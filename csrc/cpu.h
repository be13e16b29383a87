// cpu.h: what the CPU backend's three files share: backend_cpu.c (the operations), cpu_load.c (weights in), cpu_run.c (a
// call's buffers and the cutting of its queries into tiles). Includes tinyllm.h, isa/isa.h.
#ifndef TINYLLM_CPU_H
#define TINYLLM_CPU_H

#include "isa/isa.h"
#include "tinyllm.h"

#define TL_UNITS_THREAD 8 // units of work a thread at least, so that the last ones to finish are short

typedef struct tl_tile { // queries that share a sequence: columns [first, first + n) of tokens (from `token` on) x group heads
    int token, first, n, n_segments;
} tl_tile;

typedef struct tl_cpu_run {
    tl_run base;
    void *arena; // every buffer below
    size_t arena_bytes;
    float *cos, *sin;    // [n, rope_dim / 2]
    float *k, *v;        // [n, kv heads * head_dim]
    float *normed;       // [n, dim]
    float *up;           // [n, ff_dim]
    tl_activations in;   // what the products read
    tl_tile *tiles;      // [n_tiles], the same for every kv head
    float *partial;      // [n, heads, n_splits] of v_stride sums, maximum, sum of weights (16 floats apart)
    float *part;         // [threads, 8, v_stride] one segment's result
    int n_tiles, n_splits, group, v_stride; // n_splits: segments computed apart from each other, or 1; group: heads a kv head
} tl_cpu_run;

// cpu_load.c
tl_status tl_cpu_upload(tl_matrix *matrix, const tl_source *source, int threads, tl_message *message);
tl_status tl_cpu_upload_floats(float **to, const tl_source *source, int n, tl_message *message);
void tl_cpu_unpack_row(const tl_matrix *matrix, int row, float *out);
tl_status tl_cpu_unpack(const tl_matrix *matrix, float *out);
// cpu_run.c
tl_status tl_cpu_begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *batch, tl_message *message);
tl_status tl_cpu_end(tl_run *run, tl_message *message);
void tl_cpu_release(tl_run *run);

static inline int tl_min(int a, int b) { return a < b ? a : b; }
static inline int tl_max(int a, int b) { return a > b ? a : b; }

#endif
