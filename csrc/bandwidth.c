// bandwidth.c: how fast this machine reads memory now, with the pool's threads: the limit that decoding runs
// against (docs/roofline.md). Includes tinyllm.h, isa/isa.h.
#define _GNU_SOURCE
#include "isa/isa.h"
#include "tinyllm.h"
#include <string.h>
#include <time.h>

#define UNIT_BYTES ((size_t)1 << 20)

static void write_unit(void *data, int unit, int thread) { // pages belong to the thread that will read them
    (void)thread;
    memset((uint8_t *)data + (size_t)unit * UNIT_BYTES, 1, UNIT_BYTES);
}

static void read_unit(void *data, int unit, int thread) {
    (void)thread;
    tl_isa()->read((const uint8_t *)data + (size_t)unit * UNIT_BYTES, UNIT_BYTES);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

tl_status tl_read_bandwidth(double *gb_s, size_t n_bytes, int threads, int repetitions, tl_message *message) {
    const size_t n_units = n_bytes / UNIT_BYTES;
    if (n_units < 1 || n_units > INT32_MAX || repetitions < 1 || threads < 1 || threads > TL_MAX_THREADS)
        return tl_fail(message, TL_ARGUMENT,
                       "%zu bytes (at least %zu), %d threads (1 to %d), %d repetitions (at least 1)", n_bytes,
                       UNIT_BYTES, threads, TL_MAX_THREADS, repetitions);
    uint8_t *buffer = tl_alloc(n_units * UNIT_BYTES);
    if (!buffer) return tl_fail(message, TL_MEMORY, "no memory for the %zu bytes to read", n_bytes);
    tl_pool_enter();
    tl_parallel(threads, (int)n_units, write_unit, buffer);
    double start = now_s();
    for (int i = 0; i < repetitions; i++) tl_parallel(threads, (int)n_units, read_unit, buffer);
    *gb_s = 1e-9 * (double)(n_units * UNIT_BYTES) * repetitions / (now_s() - start);
    tl_pool_leave();
    tl_free(buffer);
    return TL_OK;
}
