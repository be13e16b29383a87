// isa/avx512vnni.c: AVX-512 with VNNI (Ice Lake, Zen 4 and later).
#define TINYLLM_VNNI
#include "isa/avx512.h"
#include "isa/cpuid.h"

#define V_TILES(X) X(6, 2) X(4, 1) X(2, 1) X(1, 1) // (tokens, panels at once), widest first
#define V_SUMS     16                              // vectors of sums that registers hold beside the weights
#define V_AHEAD    8192                            // bytes ahead that a few tokens' weights are asked for, 0: never
#define ISA        avx512vnni
#define LIKE       avx512

X86_HAS_IT(X86_AVX512, X86_AVX512_VNNI)

#include "isa/target.inc"
