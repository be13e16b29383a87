// host/runtime.h: runtime.cuh on the CPU: one device whose memory is the machine's.
#ifndef TINYLLM_CUDA_HOST_RUNTIME_H
#define TINYLLM_CUDA_HOST_RUNTIME_H

#include "../tinyllm_cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline const char *gpu_reason(int error) { return error ? "out of memory" : "no error"; }
static inline int gpu_out_of_memory(int error) { return error != 0; }
static inline int gpu_count(int *n, char *why, size_t why_bytes) {
    (void)why, (void)why_bytes;
    *n = 1;
    return 0;
}
static inline int gpu_use(int device) { return device != 0; }
static inline int gpu_info(int device, tl_cuda_info *info) {
    snprintf(info->name, sizeof info->name, "the kernels on the CPU");
    info->major = 9;
    info->n_processors = 2;
    info->total_bytes = info->free_bytes = (uint64_t)4 << 30;
    return gpu_use(device);
}

#endif
