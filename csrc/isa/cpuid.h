// isa/cpuid.h: what an x86 processor has and the kernel saves. Not the compilers' own __builtin_cpu_supports: names that it
// knows differ with their versions, and not every run-time library has what it calls.
#ifndef TINYLLM_CPUID_H
#define TINYLLM_CPUID_H

#include <cpuid.h>

// Features by the bit of CPUID that says them: leaf 1's ecx, leaf 7's ebx and ecx, leaf 7.1's eax.
typedef struct x86_features {
    unsigned leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf71_eax, saved; // saved: bits of XCR0, the registers that are kept
} x86_features;

#define X86_AVX2                                                                                                       \
    .leaf1_ecx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29, .leaf7_ebx = 1u << 5, .saved = 0x06 // FMA, AVX, F16C, AVX2
#define X86_AVX512                                                                                                     \
    .leaf1_ecx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29,                                                            \
    .leaf7_ebx = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, .saved = 0xe6 // F, DQ, BW, VL
#define X86_AVX512_VNNI .leaf7_ecx = 1u << 11
#define X86_AVX_VNNI    .leaf71_eax = 1u << 4

static inline int x86_has(x86_features wanted) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted.leaf1_ecx) != wanted.leaf1_ecx) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); // there, as leaf 1 said OSXSAVE, bit 27
    if ((low & wanted.saved) != wanted.saved) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((b & wanted.leaf7_ebx) != wanted.leaf7_ebx || (c & wanted.leaf7_ecx) != wanted.leaf7_ecx) return 0;
    if (!wanted.leaf71_eax) return 1;
    return a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & wanted.leaf71_eax) == wanted.leaf71_eax;
}

#endif
