// isa/neondot.c: NEON with SDOT (Cortex-A55 and A76 and later, Neoverse, Apple silicon).
#define TINYLLM_DOTPROD
#include "isa/neon.h"
#ifdef __linux__
#include <sys/auxv.h>
#endif

// A vector is four of the 32 registers: the integer sums of 4 tokens take 16, a weight 4, its activations one or two, and
// their float sums (16 more, touched once in 32 k) half fit.
#define V_TILES(X) X(4, 1) X(2, 1) X(1, 1) // (tokens, panels at once), widest first
#define V_SUMS     4                       // vectors of sums that registers hold beside the weights
#define V_AHEAD    0                       // bytes ahead that a few tokens' weights are asked for, 0: never
#define ISA        neondot
#define LIKE       neon

static int has_it(void) {
#ifdef __linux__
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; // Apple's all have it
#endif
}

#include "isa/target.inc"
