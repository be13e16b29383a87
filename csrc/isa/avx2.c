// isa/avx2.c: AVX2 with FMA and F16C (Haswell and later, Zen).

#include "isa/avx2.h"
#include "isa/cpuid.h"

#define V_TILES(X) X(4, 1) X(2, 1) X(1, 1) // (tokens, panels at once), widest first
#define V_SUMS     4                       // vectors of sums that registers hold beside the weights
#define V_AHEAD    0                       // bytes ahead that a few tokens' weights are asked for, 0: never
#define ISA        avx2

X86_HAS_IT(X86_AVX2)

#include "isa/target.inc"
