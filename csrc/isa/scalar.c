// isa/scalar.c: the plain C target, usable everywhere: the reference.
#include "isa/scalar.h"

#define V_UNROLL
#define V_TILES(X) X(1, 1) // (tokens, panels at once), widest first
#define V_SUMS     1       // vectors of sums that registers hold beside the weights
#define V_AHEAD    0       // bytes ahead that a few tokens' weights are asked for, 0: never
#define ISA        scalar
#define Q_INLINE                                                                                                       \
    static __attribute__((noinline)) // written out into each other, the quantizers take a minute to compile

static int has_it(void) { return 1; }

#include "isa/target.inc"
