// avx512.c: AVX-512 F, BW, DQ, VL without VNNI (Skylake-X).
#include "avx512.h"

#define V_UNROLL   _Pragma("GCC unroll 16")
#define V_TILES(X) X(6, 2) X(4, 2) X(3, 4) X(2, 4) X(1, 4) // (tokens, panels) that registers hold, widest first
#define ISA        avx512

static int usable(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#include "target.inc"
