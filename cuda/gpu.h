// gpu.h: what the backend's files share: a device with its stream, errors that name it, and where a call's data lie.
// backend_cuda.cu has the operations, call.cuh a call's buffers and graphs, load.cuh weights in and out.
#ifndef TINYLLM_CUDA_GPU_H
#define TINYLLM_CUDA_GPU_H

#include "kernels/attention.cuh"
#include "kernels/candidates.cuh"
#include "kernels/embed.cuh"
#include "kernels/experts.cuh"
#include "kernels/pack.cuh"
#include "runtime.cuh"

#define MAX_DEVICES 16

struct gpu {
    int index;
    tl_cuda_info info;
    gpu_stream stream;   // everything on a device happens in its order
    gpu_stream recorder; // calls are recorded here: what others give the stream meanwhile is no part of them
    int shared_block, shared_processor; // bytes of shared memory a block, a processor may have
    void *pinned[2], *staging[2];       // while weights are loaded (load.cuh)
    size_t staging_bytes;
    bool waits; // kernels may take their places before the ones in front have ended
};

static inline tl_status gpu_fail(const gpu *d, int error, const char *doing, tl_message *message) {
    if (!gpu_out_of_memory(error))
        return tl_fail(message, TL_IO, "device %d (%s) failed while %s: %s", d->index, d->info.name, doing,
                       gpu_reason(error));
    tl_cuda_info now = {};
    (void)gpu_info(d->index, &now);
    return tl_fail(message, TL_MEMORY, "device %d (%s) has no memory left for %s: %.2f of %.2f GB are free", d->index,
                   d->info.name, doing, (double)now.free_bytes / 1e9, (double)now.total_bytes / 1e9);
}

static inline int chunks_of(const tl_matrix *w) {
    const int k = chunk_k_of(w->format->id);
    return (w->k + k - 1) / k;
}
static inline int tiles_of(const tl_matrix *w) { return (w->rows + 15) / 16; }

static inline float factor_of(const tl_matrix *w) { return w->factor == 0 ? 1.0f : w->factor; }

static inline product_matrix matrix_of(const tl_matrix *w, float *out) {
    return product_matrix{(const uint8_t *)w->data,      w->bias,     out,
                          tiles_id(w->format->id),       w->rows,     chunks_of(w),
                          chunk_bytes_of(w->format->id), factor_of(w)};
}

#endif
