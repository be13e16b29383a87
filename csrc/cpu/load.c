// cpu/load.c: weights on their way in: read in bounded chunks (source.c), put into row order, quantized where asked,
// packed into panels (formats/pack.c); and back out row by row. Includes cpu.h.
#include "cpu/cpu.h"

#define COPY_UNIT (TL_GROUP * TL_ROWS) // rows packed at a time: panels that stand side by side

typedef struct upload_job {
    tl_matrix *matrix;
    const tl_source *source;
    uint8_t *buffers; // [threads][COPY_UNIT] rows of the file, then, where it changes, of the format kept and of floats
    size_t source_bytes, row_bytes, buffer_bytes; // of a row: in the file, as kept, in the buffers
    int n_panels;
    int failed_row;
} upload_job;

static void upload_rows(void *data, int unit, int thread) {
    upload_job *job = data;
    const tl_matrix *m = job->matrix;
    const tl_format *f = m->format, *from = job->source->format;
    const int first = unit * COPY_UNIT, n = tl_min(COPY_UNIT, m->rows - first), n_blocks = m->k / f->block;
    uint8_t *file = job->buffers + (size_t)thread * COPY_UNIT * job->buffer_bytes, *kept = file;
    for (int i = 0, run; i < n; i += run) { // rows that follow each other in the file are one read
        const int32_t *order = job->source->row_order;
        const int row = order ? order[first + i] : first + i;
        for (run = 1; i + run < n && (!order || order[first + i + run] == row + run);) run++;
        if (tl_read_rows(job->source, file + (size_t)i * job->source_bytes, row, run, job->source_bytes))
            __atomic_store_n(&job->failed_row, row + 1, __ATOMIC_RELAXED);
    }
    if (f != from) { // quantized on the way, row by row
        kept = file + COPY_UNIT * job->source_bytes;
        float *floats = (float *)(void *)(kept + COPY_UNIT * job->row_bytes);
        for (int i = 0; i < n; i++) {
            tl_to_floats(floats, from->id, file + (size_t)i * job->source_bytes, (size_t)m->k);
            f->quantize(kept + (size_t)i * job->row_bytes, floats, (size_t)m->k, NULL);
        }
    }
    const int lead = unit * (COPY_UNIT / TL_ROWS), side = tl_min(TL_GROUP, job->n_panels - lead);
    uint8_t *to = (uint8_t *)m->data + (size_t)lead * (size_t)n_blocks * (size_t)f->panel_bytes;
    for (int b = 0; b < n_blocks; b++)
        for (int p = 0; p < side; p++, to += f->panel_bytes) {
            const uint8_t *rows[TL_ROWS];
            for (int i = 0; i < TL_ROWS; i++) {
                int row = p * TL_ROWS + i;
                rows[i] = row < n ? kept + (size_t)row * job->row_bytes + (size_t)b * (size_t)f->block_bytes : NULL;
            }
            f->pack(to, rows);
        }
}

tl_status tl_cpu_upload(tl_matrix *m, const tl_source *source, int threads, tl_message *message) {
    const tl_format *f = m->format, *from = source->format;
    upload_job job = {.matrix = m,
                      .source = source,
                      .source_bytes = (size_t)(m->k / from->block) * (size_t)from->block_bytes,
                      .row_bytes = (size_t)(m->k / f->block) * (size_t)f->block_bytes,
                      .n_panels = (m->rows + TL_ROWS - 1) / TL_ROWS};
    m->n_bytes = (size_t)job.n_panels * (size_t)(m->k / f->block) * (size_t)f->panel_bytes;
    m->data = tl_alloc(m->n_bytes);
    job.buffer_bytes = job.source_bytes + (f == from ? 0 : job.row_bytes + (size_t)m->k * sizeof(float));
    job.buffers = tl_alloc((size_t)threads * COPY_UNIT * job.buffer_bytes);
    if (m->data && job.buffers) tl_parallel(threads, (m->rows + COPY_UNIT - 1) / COPY_UNIT, upload_rows, &job);
    int complete = m->data && job.buffers && !job.failed_row;
    tl_free(job.buffers);
    if (complete) return TL_OK;
    int no_memory = !m->data || !job.buffers;
    tl_free(m->data);
    m->data = NULL;
    if (no_memory) return tl_fail(message, TL_MEMORY, "no memory for a matrix of %zu bytes", m->n_bytes);
    return tl_fail(message, TL_IO,
                   "row %d of %d, %zu bytes from offset %llu on, could not be read: the file ends there or "
                   "changed while it was read",
                   job.failed_row - 1, m->rows, job.source_bytes,
                   (unsigned long long)(source->offset + (uint64_t)(job.failed_row - 1) * job.source_bytes));
}

tl_status tl_cpu_upload_floats(float **to, const tl_source *source, int n, tl_message *message) {
    size_t n_bytes = (size_t)n * (size_t)source->format->block_bytes;
    uint8_t *file = tl_alloc(n_bytes);
    float *floats = tl_alloc((size_t)n * sizeof(float));
    tl_status status = TL_OK;
    if (!file || !floats)
        status = tl_fail(message, TL_MEMORY, "no memory for a vector of %d numbers", n);
    else if (tl_read_rows(source, file, 0, 1, n_bytes))
        status = tl_fail(message, TL_IO, "%zu bytes at offset %llu could not be read: the file ends there", n_bytes,
                         (unsigned long long)source->offset);
    for (int i = 0; status == TL_OK && i < n; i++) {
        int row = source->row_order ? source->row_order[i] : i;
        tl_to_floats(floats + i, source->format->id, file + (size_t)row * (size_t)source->format->block_bytes, 1);
    }
    tl_free(file);
    *to = status == TL_OK ? floats : NULL;
    if (status != TL_OK) tl_free(floats);
    return status;
}

// One row of a packed matrix: out [k].
void tl_cpu_unpack_row(const tl_matrix *m, int row, float *out) {
    const tl_format *f = m->format;
    size_t side;
    const uint8_t *block = tl_panel(m, row / TL_ROWS, &side);
    for (int k = 0; k < m->k; k += f->block, block += side) f->unpack(out + k, block, row % TL_ROWS);
    for (int k = 0; m->factor != 0 && k < m->k; k++) out[k] *= m->factor;
}

tl_status tl_cpu_unpack(const tl_matrix *m, float *out) {
    for (int row = 0; row < m->rows; row++) tl_cpu_unpack_row(m, row, out + (size_t)row * (size_t)m->k);
    return TL_OK;
}
