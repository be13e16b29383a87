// isa/neon.c: NEON as every ARMv8-A has it (Cortex-A53, A57, A72).
#include "isa/neon.h"

// A vector is four of the 32 registers: the integer sums of 4 tokens take 16, a weight 4, its activations one or two, and
// their float sums (16 more, touched once in 32 k) half fit.
#define V_TILES(X) X(4, 1) X(2, 1) X(1, 1) // (tokens, panels at once), widest first
#define V_SUMS     4                       // vectors of sums that registers hold beside the weights
#define V_AHEAD    0                       // bytes ahead that a few tokens' weights are asked for, 0: never
#define ISA        neon

static int has_it(void) { return 1; }

#include "isa/target.inc"
