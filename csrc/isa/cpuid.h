// isa/cpuid.h: what an x86 processor has and the kernel saves. Not the compilers' own __builtin_cpu_supports: names that it
// knows differ with their versions, and not every run-time library has what it calls.
#ifndef TINYLLM_CPUID_H
#define TINYLLM_CPUID_H

// Features by the bit of CPUID that says them: leaf 1's ecx, leaf 7's ebx, ecx and edx, leaf 7.1's eax.
typedef struct x86_features {
    unsigned leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf71_eax, saved; // saved: bits of XCR0, the registers kept
} x86_features;

#define X86_AVX2                                                                                                       \
    .leaf1_ecx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29, .leaf7_ebx = 1u << 5, .saved = 0x06 // FMA, AVX, F16C, AVX2
#define X86_AVX512                                                                                                     \
    .leaf1_ecx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29,                                                            \
    .leaf7_ebx = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, .saved = 0xe6 // F, DQ, BW, VL
#define X86_AVX512_VNNI .leaf7_ecx = 1u << 11
#define X86_AVX_VNNI    .leaf71_eax = 1u << 4
#define X86_AMX         .leaf1_ecx = 1u << 27, .leaf7_edx = 1u << 24 | 1u << 25 // TILE, INT8

// In a file of its own, without any instruction set's flags: compilers use what a file's flags allow, and this is asked
// where nobody knows yet what the machine has. For the same reason by its address: copying it may take vectors.
int tl_x86_has(const x86_features *wanted);

#define X86_HAS_IT(...)                                                                                                \
    static int has_it(void) {                                                                                          \
        static const x86_features wanted = {__VA_ARGS__};                                                              \
        return tl_x86_has(&wanted);                                                                                    \
    }

#endif
