// isa/select.c: the one place that knows which instruction sets there are and which one is in use. Best first.
#include "isa/isa.h"
#include <string.h>

#if defined __x86_64__ && !defined TL_SCALAR_ONLY // an option of the build
#define X86
#elif defined __aarch64__ && !defined TL_SCALAR_ONLY
#define ARM64
#endif

// Those that are not constant are filled by their `usable`, from another's.
extern const tl_kernels tl_kernels_scalar;
#ifdef X86
extern tl_kernels tl_kernels_amx, tl_kernels_avx512vnni, tl_kernels_avx2vnni;
extern const tl_kernels tl_kernels_avx512, tl_kernels_avx2;
extern const char *tl_amx_refused;
#endif
#ifdef ARM64
extern tl_kernels tl_kernels_neondot;
extern const tl_kernels tl_kernels_neon;
#endif

static const tl_kernels *const built[] = {
#ifdef X86
    &tl_kernels_amx,     &tl_kernels_avx512vnni, &tl_kernels_avx512, &tl_kernels_avx2vnni, &tl_kernels_avx2,
#endif
#ifdef ARM64
    &tl_kernels_neondot, &tl_kernels_neon,
#endif
    &tl_kernels_scalar,
};
#define N_BUILT (sizeof built / sizeof built[0])

static const tl_kernels *current;

static const tl_kernels *best(void) {
    for (size_t i = 0; i < N_BUILT; i++)
        if (built[i]->usable()) return built[i];
    return &tl_kernels_scalar;
}

const tl_kernels *tl_isa(void) { return current ? current : (current = best()); }

const char *tl_isa_name(void) { return tl_isa()->name; }

const char *const *tl_isa_names(void) {
    static const char *names[N_BUILT + 1];
    size_t n = 0;
    for (size_t i = 0; i < N_BUILT; i++)
        if (built[i]->usable()) names[n++] = built[i]->name;
    return names;
}

const char *tl_isa_refused(void) {
#ifdef X86
    tl_kernels_amx.usable();
    return tl_amx_refused;
#else
    return NULL;
#endif
}

int tl_isa_select(const char *name) {
    for (size_t i = 0; i < N_BUILT; i++)
        if (!strcmp(built[i]->name, name) && built[i]->usable()) {
            tl_pool_enter(); // between calls: one keeps to the buffers that it began with
            current = built[i];
            tl_pool_leave();
            return 0;
        }
    return -1;
}
