// bandwidth.cuh: how fast a device reads its memory now, the limit that decoding runs against (docs/roofline.md). On the
// CPU (host/) the same loop reads the machine's. Includes runtime.cuh.
#ifndef TINYLLM_CUDA_BANDWIDTH_CUH
#define TINYLLM_CUDA_BANDWIDTH_CUH

#include "runtime.cuh"

#define READ_UNIT_BYTES ((size_t)1 << 20)

#ifdef __CUDACC__
#define READ_THREADS 512
#define READ_AHEAD   8 // loads of 16 bytes that a thread has on their way

// Every block reads its own pieces; a sum that cannot come out keeps the loads from being left out.
static __global__ void __launch_bounds__(READ_THREADS) read_all(const uint4 *from, size_t n, unsigned *never) {
    const size_t piece = (size_t)READ_THREADS * READ_AHEAD;
    unsigned sum = 0;
    for (size_t at = blockIdx.x * piece + threadIdx.x; at < n; at += gridDim.x * piece) {
        uint4 v[READ_AHEAD];
#pragma unroll
        for (int i = 0; i < READ_AHEAD; i++) v[i] = __ldcs(from + at + (size_t)i * READ_THREADS);
#pragma unroll
        for (int i = 0; i < READ_AHEAD; i++) sum |= v[i].x | v[i].y | v[i].z | v[i].w;
    }
    if (sum & 2) *never = sum; // every byte is 1
}

static int read_timed(int device, double *seconds, size_t n_bytes, int repetitions) {
    tl_cuda_info info;
    void *buffer = NULL;
    cudaEvent_t start = NULL, end = NULL;
    float ms = 0;
    int error = gpu_info(device, &info);
    if (!error) error = gpu_checked(cudaMalloc(&buffer, n_bytes));
    if (!error) error = gpu_checked(cudaMemset(buffer, 1, n_bytes));
    if (!error) error = gpu_checked(cudaEventCreate(&start));
    if (!error) error = gpu_checked(cudaEventCreate(&end));
    for (int i = -1; !error && i < repetitions; i++) { // once to warm up
        if (i == 0) error = gpu_checked(cudaEventRecord(start));
        read_all<<<4 * info.n_processors, READ_THREADS>>>((const uint4 *)buffer, n_bytes / 16, (unsigned *)buffer);
    }
    if (!error) error = gpu_checked(cudaGetLastError());
    if (!error) error = gpu_checked(cudaEventRecord(end));
    if (!error) error = gpu_checked(cudaEventSynchronize(end));
    if (!error) error = gpu_checked(cudaEventElapsedTime(&ms, start, end));
    if (start) cudaEventDestroy(start);
    if (end) cudaEventDestroy(end);
    cudaFree(buffer);
    *seconds = 1e-3 * (double)ms;
    return error;
}
#else
#include <time.h>

static int read_timed(int device, double *seconds, size_t n_bytes, int repetitions) {
    uint64_t *buffer = (uint64_t *)malloc(n_bytes);
    volatile uint64_t never;
    struct timespec start, end;
    if (!buffer) return 1;
    memset(buffer, 1, n_bytes);
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < repetitions; i++) {
        uint64_t sum = 0;
        for (size_t at = 0; at < n_bytes / 8; at++) sum |= buffer[at];
        never = sum;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    (void)never, (void)device;
    free(buffer);
    *seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    return 0;
}
#endif

#endif
