// cpu/bandwidth.c: how fast this machine reads memory and multiplies now, with the pool's threads: the limits that
// decoding and reading a prompt run against (docs/roofline.md). Includes tinyllm.h, isa/isa.h.
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

#define N_BYTES 12288 // of numbers, which stay in the first cache
#define N_TIMES 2000  // that a unit goes through them

typedef struct numbers {
    _Alignas(64) uint8_t bytes[N_BYTES];
    _Alignas(64) float floats[N_BYTES / sizeof(float)];
    int use_floats;
} numbers;

static void multiply_unit(void *data, int unit, int thread) {
    (void)unit;
    (void)thread;
    const numbers *of = data;
    if (of->use_floats)
        tl_isa()->multiply_floats(of->floats, N_BYTES / sizeof(float), N_TIMES);
    else
        tl_isa()->multiply_bytes(of->bytes, N_BYTES, N_TIMES);
}

tl_status tl_multiply_rate(double *gmac_s, int floats, int threads, int repetitions, tl_message *message) {
    if (repetitions < 1 || repetitions > 1000000 || threads < 1 || threads > TL_MAX_THREADS)
        return tl_fail(message, TL_ARGUMENT, "%d threads (1 to %d), %d repetitions (1 to 1000000)", threads,
                       TL_MAX_THREADS, repetitions);
    numbers of = {.use_floats = floats};
    memset(of.bytes, 1, sizeof of.bytes);
    for (size_t i = 0; i < sizeof of.floats / sizeof of.floats[0]; i++) of.floats[i] = 1;
    tl_pool_enter();
    tl_parallel(threads, threads, multiply_unit, &of); // wakes the pool, and the clock
    const double start = now_s();
    tl_parallel(threads, threads * repetitions, multiply_unit, &of);
    const double each = (double)N_BYTES / (floats ? sizeof(float) : 1) * N_TIMES * threads * repetitions;
    *gmac_s = 1e-9 * each / (now_s() - start);
    tl_pool_leave();
    return TL_OK;
}
