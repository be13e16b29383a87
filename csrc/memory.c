// memory.c: every block the core holds, aligned and counted, and the sentence of an error. Includes
// tinyllm.h.
#define _GNU_SOURCE
#include "tinyllm.h"
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HEADER     64 // in front of a block: how it was mapped
#define HUGE_BYTES ((size_t)2 << 20)
#define PAGE_BYTES ((size_t)64 << 10) // a multiple of every machine's page size

typedef struct header {
    size_t n_bytes, mapped_bytes; // mapped_bytes: 0 where the block came from malloc
} header;

static _Atomic size_t live_blocks, live_bytes;

// Fresh zeroed pages from a 2 MB boundary, untouched: whoever first writes a page decides where it lies. Huge pages where
// they are whole; a last one would hold up to 2 MB that nobody asked for.
static void *map_huge(size_t *mapped_bytes) {
    *mapped_bytes = (*mapped_bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    size_t whole = *mapped_bytes + HUGE_BYTES;
    char *base = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return NULL;
    size_t lead = (HUGE_BYTES - (uintptr_t)base % HUGE_BYTES) % HUGE_BYTES;
    if (lead) munmap(base, lead);
    if (HUGE_BYTES - lead) munmap(base + lead + *mapped_bytes, HUGE_BYTES - lead);
#ifdef MADV_HUGEPAGE
    madvise(base + lead, *mapped_bytes / HUGE_BYTES * HUGE_BYTES, MADV_HUGEPAGE);
#endif
    return base + lead;
}

void *tl_alloc(size_t n_bytes) {
    if (n_bytes > SIZE_MAX / 2) return NULL;
    header h = {n_bytes, 0};
    size_t total = (n_bytes + 2 * HEADER - 1) / HEADER * HEADER;
    char *base;
    if (n_bytes >= HUGE_BYTES) {
        h.mapped_bytes = total;
        base = map_huge(&h.mapped_bytes);
    } else if ((base = aligned_alloc(HEADER, total))) {
        memset(base, 0, total);
    }
    if (!base) return NULL;
    memcpy(base, &h, sizeof h);
    atomic_fetch_add(&live_blocks, 1);
    atomic_fetch_add(&live_bytes, n_bytes);
    return base + HEADER;
}

void tl_free(void *block) {
    if (!block) return;
    char *base = (char *)block - HEADER;
    header h;
    memcpy(&h, base, sizeof h);
    atomic_fetch_sub(&live_blocks, 1);
    atomic_fetch_sub(&live_bytes, h.n_bytes);
    if (h.mapped_bytes) {
        munmap(base, h.mapped_bytes);
    } else {
        free(base);
    }
}

tl_status tl_clear(void *to, size_t n_bytes) {
    memset(to, 0, n_bytes);
    return TL_OK;
}

tl_status tl_copy(void *to, const void *from, size_t n_bytes) {
    memcpy(to, from, n_bytes);
    return TL_OK;
}

void tl_memory_live(size_t *n_blocks, size_t *n_bytes) {
    *n_blocks = atomic_load(&live_blocks);
    *n_bytes = atomic_load(&live_bytes);
}

tl_status tl_fail(tl_message *message, tl_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message->text, sizeof message->text, format, arguments);
    va_end(arguments);
    return status;
}
