// scalar.c: the plain C target, usable everywhere: the reference.
#include "scalar.h"

#define V_UNROLL
#define V_TILES(X) X(1, 1)
#define ISA        scalar

static int usable(void) { return 1; }

#include "target.inc"
