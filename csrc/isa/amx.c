// isa/amx.c: AVX-512 with VNNI and AMX (Xeon since Sapphire Rapids): many tokens' products on the matrix unit, the rest is
// avx512vnni's. The kernel is asked for the unit's registers once a process: programs may not use them unasked, since they
// make signal frames and every thread's saved state 8 KB larger (Documentation/arch/x86/xstate.rst of Linux).
#define _GNU_SOURCE
#define TINYLLM_VNNI
#define TINYLLM_AMX
#include "isa/avx512.h"
#include "isa/cpuid.h"
#include "isa/isa.h"
#include "isa/tiles.h"
#include <errno.h>
#include <pthread.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define T_FEW tl_kernels_avx512vnni
extern tl_kernels tl_kernels_avx512vnni;

#include "isa/tiles.inc"

static int usable(void);
tl_kernels tl_kernels_amx = {.name = "amx", .usable = usable};
const char *tl_amx_refused; // why a machine that has the unit does not use it, or NULL

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XTILEDATA           18

static void ask_kernel(void) {
    static const x86_features unit = {X86_AMX}, unit_saved = {X86_AMX, .saved = 3u << 17};
    if (!T_FEW.usable() || !tl_x86_has(&unit)) return;
    if (!tl_x86_has(&unit_saved)) {
        tl_amx_refused = "amx: the kernel does not keep its registers";
        return;
    }
#ifdef __linux__
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA)) {
        tl_amx_refused = errno == ENOSPC ? "amx: a signal stack of this process is too small for its registers"
                                         : "amx: the kernel does not allow this process its registers";
        return;
    }
    tl_kernels_amx = T_FEW;
    tl_kernels_amx.name = "amx";
    tl_kernels_amx.usable = usable;
    take_tiles(&tl_kernels_amx);
#endif
}

static int usable(void) {
    static pthread_once_t asked = PTHREAD_ONCE_INIT;
    pthread_once(&asked, ask_kernel);
    return tl_kernels_amx.arrange != NULL;
}
