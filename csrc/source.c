// source.c: rows of a file's tensor, read into memory. Includes tinyllm.h only. The CPU's loader (cpu/load.c) and the
// GPU's (cuda/load.cuh) call it.
#define _GNU_SOURCE
#include "tinyllm.h"
#include <errno.h>
#include <string.h>
#include <unistd.h>

static int read_at(const tl_source *s, uint8_t *to, uint64_t from, size_t n_bytes) {
    if (s->fd < 0) memcpy(to, s->memory + from, n_bytes);
    for (size_t done = 0; s->fd >= 0 && done < n_bytes;) {
        ssize_t got = pread(s->fd, to + done, n_bytes - done, (off_t)(s->offset + from + done));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return -1;
        done += (size_t)got;
    }
    return 0;
}

// A row of MXFP4 blocks, 17 bytes each: the scale, then number i in the low half of byte i and number i + 16 in its high
// half. The file's 16 bytes a block are read to the end of the row's place, which is filled from its start.
static int join_mxfp4(const tl_source *s, uint8_t *to, uint64_t row, size_t n_blocks) {
    uint8_t *halves = to + n_blocks, scales[256], numbers[16];
    if (read_at(s, halves, row * n_blocks * 16, n_blocks * 16)) return -1;
    for (size_t b = 0; b < n_blocks; b++, to += 17, halves += 16) {
        const size_t at = b % sizeof scales, left = n_blocks - b;
        if (at == 0 && read_at(s->scales, scales, row * n_blocks + b, left < sizeof scales ? left : sizeof scales))
            return -1;
        memcpy(numbers, halves, 16);
        to[0] = scales[at];
        for (int i = 0; i < 16; i++) {
            const int low = numbers[i / 2] >> i % 2 * 4 & 15, high = numbers[8 + i / 2] >> i % 2 * 4 & 15;
            to[1 + i] = (uint8_t)(low | high << 4);
        }
    }
    return 0;
}

int tl_read_rows(const tl_source *s, uint8_t *to, int first, int n, size_t row_bytes) {
    const int stride = s->row_stride > 1 ? s->row_stride : 1;
    if (stride == 1 && !s->scales) return read_at(s, to, (uint64_t)first * row_bytes, (size_t)n * row_bytes);
    for (uint64_t i = 0; i < (uint64_t)n; i++) {
        const uint64_t row = ((uint64_t)first + i) * (uint64_t)stride;
        uint8_t *at = to + i * row_bytes;
        if (s->scales ? join_mxfp4(s, at, row, row_bytes / 17) : read_at(s, at, row * row_bytes, row_bytes)) return -1;
    }
    return 0;
}
