// check.h: what the C tests share: CHECK, which says what is wrong and exits with 1, a seeded generator, and
// buffers of exactly the bytes asked for, so that AddressSanitizer sees one byte too far. Includes nothing of
// the library.
#ifndef TINYLLM_CHECK_H
#define TINYLLM_CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("%s:%d: ", __FILE__, __LINE__);                                                                     \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static uint32_t random_state = 1;

static inline uint32_t random_bits(void) { // Marsaglia's xorshift32
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

static inline int random_below(int n) { return (int)(random_bits() % (uint32_t)n); }

static inline float random_float(void) { // in [-1, 1)
    return (float)((int32_t)random_bits() >> 8) * 0x1p-23f;
}

static inline void *exactly(size_t n_bytes) {
    void *block = malloc(n_bytes ? n_bytes : 1);
    CHECK(block, "no memory for %zu bytes", n_bytes);
    return block;
}

static inline float *random_floats(size_t n, float size) {
    float *x = exactly(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = size * random_float();
    return x;
}

#endif
