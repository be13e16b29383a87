// test_read.c: reading memory and multiplying at full speed: every instruction set sees every number, none beyond the
// end, and what is measured is a rate or an error.
#include "check.h"
#include "isa/isa.h"
#include "tinyllm.h"
#include <math.h>
#include <string.h>

static void sees_every_byte(void) {
    for (size_t n = 256; n <= 1024; n += 256) {
        uint8_t *bytes = exactly(n);
        memset(bytes, 0, n);
        for (size_t i = 0; i < n; i++) {
            bytes[i] = (uint8_t)(1 + random_below(255));
            uint64_t word = 0;
            memcpy(&word, bytes + i / 8 * 8, 8);
            CHECK(tl_isa()->read(bytes, n) == word, "%s: byte %zu of %zu is not seen", tl_isa_name(), i, n);
            bytes[i] = 0;
        }
        free(bytes);
    }
}

// Small whole numbers, whose sums are exact in float32.
static void multiplies_every_number(void) {
    for (size_t n = 1024; n <= 4 * 1024; n += 1024)
        for (int times = 0; times < 3; times++) {
            uint8_t *bytes = exactly(n);
            float *floats = exactly(n * sizeof(float));
            uint32_t sum = 0;
            float float_sum = 0;
            for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)random_below(64);
            for (size_t i = 0; i < n; i++) floats[i] = (float)random_below(9) - 4;
            for (size_t i = 0; i < n; i++) sum += (uint32_t)times * bytes[i] * bytes[i % 4];
            for (size_t i = 0; i < n; i++) float_sum += (float)times * floats[i] * floats[0];
            const uint32_t got = tl_isa()->multiply_bytes(bytes, n, times);
            const float float_got = tl_isa()->multiply_floats(floats, n, times);
            CHECK(got == sum, "%s: %u, not %u", tl_isa_name(), got, sum);
            CHECK(float_got == float_sum, "%s: %g, not %g", tl_isa_name(), (double)float_got, (double)float_sum);
            free(bytes);
            free(floats);
        }
}

static void measures_or_refuses(void) {
    const size_t megabyte = (size_t)1 << 20;
    tl_message message;
    for (int threads = 1; threads <= 3; threads++) {
        double gb_s = 0;
        CHECK(tl_read_bandwidth(&gb_s, 3 * megabyte + 1, threads, 2, &message) == TL_OK, "%s", message.text);
        CHECK(isfinite(gb_s) && gb_s > 0, "%d threads: %g GB/s", threads, gb_s);
    }
    const struct {
        size_t n_bytes;
        int threads, repetitions;
    } wrong[] = {{megabyte - 1, 1, 1}, {megabyte, 0, 1}, {megabyte, TL_MAX_THREADS + 1, 1}, {megabyte, 1, 0}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        double gb_s;
        tl_status status = tl_read_bandwidth(&gb_s, wrong[i].n_bytes, wrong[i].threads, wrong[i].repetitions, &message);
        CHECK(status == TL_ARGUMENT, "case %zu is not refused", i);
    }
    for (int threads = 1; threads <= 3; threads++)
        for (int floats = 0; floats < 2; floats++) {
            double gmac_s = 0;
            CHECK(tl_multiply_rate(&gmac_s, floats, threads, 2, &message) == TL_OK, "%s", message.text);
            CHECK(isfinite(gmac_s) && gmac_s > 0, "%d threads: %g GMAC/s", threads, gmac_s);
        }
    double rate;
    CHECK(tl_multiply_rate(&rate, 0, 0, 1, &message) == TL_ARGUMENT, "no threads are not refused");
    CHECK(tl_multiply_rate(&rate, 0, 1, 0, &message) == TL_ARGUMENT, "no repetitions are not refused");
    size_t blocks, bytes;
    tl_memory_live(&blocks, &bytes);
    CHECK(blocks == 0, "%zu blocks are left", blocks);
}

int main(void) {
    for (const char *const *isa = tl_isa_names(); *isa; isa++) {
        CHECK(tl_isa_select(*isa) == 0, "%s is not usable", *isa);
        sees_every_byte();
        multiplies_every_number();
    }
    measures_or_refuses();
    return 0;
}
