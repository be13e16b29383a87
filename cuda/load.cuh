// load.cuh: weights on their way to the device: rows of the file are read into pinned memory, copied, and packed there
// (kernels/pack.cuh) while the next rows are read; and back out as floats. Includes gpu.h.
#ifndef TINYLLM_CUDA_LOAD_CUH
#define TINYLLM_CUDA_LOAD_CUH

#include "gpu.h"
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#define STAGING_BYTES ((size_t)16 << 20)

// work(i) for i in [0, n), on up to `threads` threads.
template <class Work> static void on_threads(int threads, int n, Work work) {
    std::vector<std::thread> others;
    std::atomic<int> next{0};
    auto run = [&] {
        for (int i; (i = next.fetch_add(1)) < n;) work(i);
    };
    try {
        for (int i = 1; i < threads && i < n; i++) others.emplace_back(run);
    } catch (const std::system_error &) { // no more threads are to be had: fewer do it all
    }
    run();
    for (std::thread &t : others) t.join();
}

// n numbers of a float format.
static void to_floats(float *out, const tl_format *format, const uint8_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) format->unpack(out + i, from + i * (size_t)format->block_bytes, 0);
}

struct row_job {
    const tl_matrix *matrix;
    const tl_source *source;
    size_t source_bytes, row_bytes; // of a row in the file, and as it goes to the device
};

// Rows [first, first + n) in the matrix's order, in the format that is kept, into `to`. -1, or the row that failed.
static int read_rows(const row_job &job, uint8_t *to, int first, int n, int threads) {
    const tl_source *s = job.source;
    const bool same = s->format == job.matrix->format;
    const int unit = 64;
    std::atomic<int> failed{-1};
    on_threads(threads, (n + unit - 1) / unit, [&](int u) {
        std::vector<uint8_t> file(same ? 0 : job.source_bytes);
        std::vector<float> floats(same ? 0 : (size_t)job.matrix->k);
        const int end = (u + 1) * unit < n ? (u + 1) * unit : n;
        for (int i = u * unit, run; i < end; i += run) { // rows that follow each other in the file are one read
            const int row = s->row_order ? s->row_order[first + i] : first + i;
            for (run = 1; same && i + run < end && (!s->row_order || s->row_order[first + i + run] == row + run);)
                run++;
            uint8_t *into = same ? to + (size_t)i * job.row_bytes : file.data();
            if (tl_read_rows(s, into, row, run, job.source_bytes)) failed = row;
            if (same || failed >= 0) continue;
            to_floats(floats.data(), s->format, file.data(), floats.size());
            job.matrix->format->quantize(to + (size_t)i * job.row_bytes, floats.data(), floats.size(), NULL);
        }
    });
    return failed;
}

static void free_staging(gpu *d) {
    for (int i = 0; i < 2; i++) {
        if (d->pinned[i]) gpu_free_pinned(d->pinned[i]);
        if (d->staging[i]) gpu_free(d->staging[i]);
        d->pinned[i] = d->staging[i] = NULL;
    }
    d->staging_bytes = 0;
}

// Both pairs of staging buffers hold n_bytes; they stay for the next matrix, and go when the first call begins.
static int stage(gpu *d, size_t n_bytes) {
    if (n_bytes <= d->staging_bytes) return 0;
    free_staging(d);
    int error = 0;
    for (int i = 0; i < 2 && !error; i++) {
        error = gpu_alloc_pinned(&d->pinned[i], n_bytes);
        if (!error) error = gpu_alloc(&d->staging[i], n_bytes);
    }
    d->staging_bytes = error ? 0 : n_bytes;
    return error;
}

// Reads, copies and packs, in pieces of whole tiles through two staging buffers: one is read into while the other's copy
// and packing go on.
static int pack_rows(gpu *d, const row_job &job, int piece, int threads, int *failed_row) {
    const tl_matrix *m = job.matrix;
    const int n_chunks = chunks_of(m);
    const size_t tile_bytes = (size_t)n_chunks * (size_t)chunk_bytes_of(m->format->id);
    gpu_event copied[2] = {};
    void *codes = NULL;
    const size_t codes_bytes = (size_t)m->format->n_codes * sizeof(uint16_t);
    int error = codes_bytes ? gpu_alloc(&codes, codes_bytes) : 0;
    if (!error && codes) error = gpu_copy_in(d->stream, codes, m->format->codes, codes_bytes);
    if (!error) error = gpu_event_create(&copied[0]);
    if (!error) error = gpu_event_create(&copied[1]);
    for (int first = 0, i = 0; first < m->rows && !error; first += piece, i ^= 1) {
        const int n = m->rows - first < piece ? m->rows - first : piece;
        if (first >= 2 * piece) error = gpu_event_wait(copied[i]);
        if (error) break;
        *failed_row = read_rows(job, (uint8_t *)d->pinned[i], first, n, threads);
        if (*failed_row >= 0) break;
        error = gpu_copy_in(d->stream, d->staging[i], d->pinned[i], (size_t)n * job.row_bytes);
        if (!error) error = gpu_event_record(copied[i], d->stream);
        const pack_arguments p = {(const uint8_t *)d->staging[i],
                                  (uint8_t *)m->data + (size_t)(first / 16) * tile_bytes,
                                  job.row_bytes,
                                  n,
                                  m->k,
                                  n_chunks,
                                  m->format->id,
                                  (const uint16_t *)codes};
        if (!error)
            error = gpu_launch(d->stream, pack_matrix, {(n + 15) / 16, (n_chunks + 7) / 8, 1}, 256, 0, false, p);
    }
    const int waited = gpu_wait(d->stream);
    for (gpu_event e : copied) gpu_event_free(e);
    if (codes) gpu_free(codes);
    return error ? error : waited;
}

static tl_status upload_matrix(gpu *d, tl_matrix *m, const tl_source *source, int threads, tl_message *message) {
    const tl_format *f = m->format, *from = source->format;
    const row_job job = {m, source, (size_t)(m->k / from->block) * (size_t)from->block_bytes,
                         (size_t)(m->k / f->block) * (size_t)f->block_bytes};
    m->n_bytes = (size_t)tiles_of(m) * (size_t)chunks_of(m) * (size_t)chunk_bytes_of(f->id);
    int piece = (int)(STAGING_BYTES / job.row_bytes) / 16 * 16, failed_row = -1;
    if (piece < 16) piece = 16;
    if (piece > m->rows) piece = (m->rows + 15) / 16 * 16;
    int error = gpu_use(d->index);
    if (!error) error = gpu_alloc(&m->data, m->n_bytes);
    if (!error) error = stage(d, (size_t)piece * job.row_bytes);
    if (!error) error = pack_rows(d, job, piece, threads, &failed_row);
    if (!error && failed_row < 0) return TL_OK;
    if (m->data) gpu_free(m->data);
    m->data = NULL;
    if (error) return gpu_fail(d, error, "a matrix of weights", message);
    return tl_fail(
        message, TL_IO,
        "row %d of %d, %zu bytes from offset %llu on, could not be read: the file ends there or changed while "
        "it was read",
        failed_row, m->rows, job.source_bytes,
        (unsigned long long)(source->offset + (uint64_t)failed_row * job.source_bytes));
}

static tl_status upload_vector(gpu *d, float **to, const tl_source *source, int n, tl_message *message) {
    const size_t each = (size_t)source->format->block_bytes, n_bytes = (size_t)n * sizeof(float);
    std::vector<uint8_t> file((size_t)n * each);
    std::vector<float> floats((size_t)n);
    *to = NULL;
    if (tl_read_rows(source, file.data(), 0, 1, file.size()))
        return tl_fail(message, TL_IO, "%zu bytes at offset %llu could not be read: the file ends there", file.size(),
                       (unsigned long long)source->offset);
    for (int i = 0; i < n; i++) {
        const int row = source->row_order ? source->row_order[i] : i;
        to_floats(&floats[(size_t)i], source->format, &file[(size_t)row * each], 1);
    }
    void *data = NULL;
    int error = gpu_use(d->index);
    if (!error) error = gpu_alloc(&data, n_bytes);
    if (!error) error = gpu_copy_in(d->stream, data, floats.data(), n_bytes);
    if (!error) error = gpu_wait(d->stream);
    if (!error) {
        *to = (float *)data;
        return TL_OK;
    }
    if (data) gpu_free(data);
    return gpu_fail(d, error, "a vector of weights", message);
}

// out [rows, k] on the host: exactly the numbers that the matrix's format means.
static tl_status unpack_matrix(gpu *d, const tl_matrix *m, float *out) {
    const size_t row_bytes = (size_t)m->k * sizeof(float);
    int piece = (int)(STAGING_BYTES / row_bytes), error = gpu_use(d->index);
    if (piece < 1) piece = 1;
    if (piece > m->rows) piece = m->rows;
    void *floats = NULL;
    if (!error) error = gpu_alloc(&floats, (size_t)piece * row_bytes);
    for (int first = 0; first < m->rows && !error; first += piece) {
        const int n = m->rows - first < piece ? m->rows - first : piece;
        const unpack_arguments u = {(const uint8_t *)m->data,
                                    (float *)floats,
                                    tiles_id(m->format->id),
                                    first,
                                    n,
                                    m->k,
                                    chunks_of(m),
                                    factor_of(m)};
        error = gpu_launch(d->stream, unpack_rows, {n, 1, 1}, 256, 0, false, u);
        if (!error) error = gpu_copy_out(d->stream, out + (size_t)first * (size_t)m->k, floats, (size_t)n * row_bytes);
        if (!error) error = gpu_wait(d->stream);
    }
    if (floats) gpu_free(floats);
    return error ? TL_MEMORY : TL_OK;
}

#endif
