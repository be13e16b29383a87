// cpu/quantize.c: floats -> a file's blocks, on any number of threads. How a row is rounded is
// formats/quantize.inc's, with the instruction set in use. Includes isa/isa.h. formats/pack.c reads what is written here.
#include "isa/isa.h"
#include <math.h>

#define X(name, ...)                                                                                                   \
    void tl_quantize_##name(uint8_t *blocks, const float *x, size_t k, const float *importance) {                      \
        tl_isa()->to_blocks[TL_INDEX_##name](blocks, x, k, importance);                                                \
    }
TL_GGUF_FORMATS(X)
#undef X

void tl_to_floats(float *out, int format, const uint8_t *in, size_t n) {
    tl_isa()->to_floats(out, in, n, (int)(tl_format_of(format) - tl_formats));
}

typedef struct convert_job {
    uint8_t *to;
    const uint8_t *in;
    const tl_format *format, *from;
    size_t rows, k, rows_per_unit;
    const float *importance;
    float *floats; // [threads, k]
} convert_job;

// The slow truth: one row packed into panels, and out again.
static void unpack_row(float *out, const tl_format *from, const uint8_t *in, size_t k) {
    uint8_t panel[TL_LARGEST_PANEL];
    for (size_t at = 0; at < k; at += (size_t)from->block, in += from->block_bytes) {
        const uint8_t *rows[TL_ROWS] = {in};
        from->pack(panel, rows);
        from->unpack(out + at, panel, 0);
    }
}

static void convert_rows(void *data, int unit, int thread) {
    const convert_job *job = data;
    const size_t in_bytes = job->k / (size_t)job->from->block * (size_t)job->from->block_bytes;
    const size_t out_bytes = job->k / (size_t)job->format->block * (size_t)job->format->block_bytes;
    const size_t first = (size_t)unit * job->rows_per_unit, end = first + job->rows_per_unit;
    float *floats = job->floats + (size_t)thread * job->k;
    for (size_t row = first; row < end && row < job->rows; row++) {
        if (job->from->is_float && job->from->block == 1)
            tl_to_floats(floats, job->from->id, job->in + row * in_bytes, job->k);
        else
            unpack_row(floats, job->from, job->in + row * in_bytes, job->k);
        job->format->quantize(job->to + row * out_bytes, floats, job->k, job->importance);
    }
}

tl_status tl_convert(uint8_t *to, const tl_format *format, const uint8_t *in, const tl_format *from, size_t rows,
                     size_t k, const float *importance, int threads, tl_message *message) {
    if (!k || k % (size_t)format->block || k % (size_t)from->block || threads < 1 || threads > TL_MAX_THREADS)
        return tl_fail(message, TL_ARGUMENT, "rows of %zu numbers do not fit %s's blocks of %d, on %d threads", k,
                       format->name, format->block, threads);
    if (!format->quantize) return tl_fail(message, TL_UNSUPPORTED, "nothing is quantized to %s here", format->name);
    for (size_t i = 0; importance && i < k; i++)
        if (!(importance[i] >= 0 && importance[i] < INFINITY))
            return tl_fail(message, TL_ARGUMENT, "the importance of column %zu is %g", i, (double)importance[i]);
    const size_t some = 16384 / k + 1, most = rows / 1048576 + 1; // numbers enough for a unit, and units few enough
    convert_job job = {to, in, format, from, rows, k, some > most ? some : most, importance, NULL};
    job.floats = tl_alloc((size_t)threads * k * sizeof(float));
    if (!job.floats) return tl_fail(message, TL_MEMORY, "no memory for %d rows of %zu floats", threads, k);
    tl_pool_enter();
    tl_parallel(threads, (int)((rows + job.rows_per_unit - 1) / job.rows_per_unit), convert_rows, &job);
    tl_pool_leave();
    tl_free(job.floats);
    return TL_OK;
}
