// isa/cpuid.c: asks an x86 processor what it has. Compiled for any x86-64.
#include "isa/cpuid.h"
#if defined __x86_64__
#include <cpuid.h>

int tl_x86_has(const x86_features *wanted) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted->leaf1_ecx) != wanted->leaf1_ecx) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); // there, as leaf 1 said OSXSAVE, bit 27
    if ((low & wanted->saved) != wanted->saved) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if ((b & wanted->leaf7_ebx) != wanted->leaf7_ebx || (c & wanted->leaf7_ecx) != wanted->leaf7_ecx) return 0;
    if ((d & wanted->leaf7_edx) != wanted->leaf7_edx) return 0;
    if (!wanted->leaf71_eax) return 1;
    return a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & wanted->leaf71_eax) == wanted->leaf71_eax;
}
#endif
