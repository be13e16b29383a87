// runtime.cuh: what the backend needs of a GPU beside its kernels: devices, memory, one stream a device, launches and
// graphs. A function answers 0, or the error that gpu_reason puts into words. host/runtime.h is the same on the CPU.
#ifndef TINYLLM_CUDA_RUNTIME_CUH
#define TINYLLM_CUDA_RUNTIME_CUH

#include "tinyllm_cuda.h"

#ifndef __CUDACC__
#include "host/runtime.h"
#else
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

typedef cudaStream_t gpu_stream;
typedef cudaGraphExec_t gpu_graph;

static inline const char *gpu_reason(int error) { return cudaGetErrorString((cudaError_t)error); }
static inline int gpu_out_of_memory(int error) { return error == (int)cudaErrorMemoryAllocation; }

// An error that is not left behind for the next call to find.
static inline int gpu_checked(cudaError_t error) {
    if (error != cudaSuccess) (void)cudaGetLastError();
    return (int)error;
}

// Why there is no device, in a sentence; "" where there is one.
static inline int gpu_count(int *n, char *why, size_t why_bytes) {
    int error = gpu_checked(cudaGetDeviceCount(n)), driver = 0;
    if (error == 0 && *n > 0) return 0;
    *n = 0;
    (void)gpu_checked(cudaDriverGetVersion(&driver));
    if (driver == 0)
        snprintf(why, why_bytes, "there is no NVIDIA driver (libcuda.so.1)");
    else if (error == (int)cudaErrorInsufficientDriver)
        snprintf(why, why_bytes, "the NVIDIA driver is too old: it knows CUDA %d.%d, this build needs %d.%d",
                 driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    else if (error == 0 || error == (int)cudaErrorNoDevice)
        snprintf(why, why_bytes, "the NVIDIA driver finds no device");
    else
        snprintf(why, why_bytes, "the NVIDIA driver does not answer: %s", gpu_reason(error));
    return 0;
}

static inline int gpu_use(int device) { return gpu_checked(cudaSetDevice(device)); }

static inline int gpu_info(int device, tl_cuda_info *info) {
    cudaDeviceProp properties;
    size_t free_bytes = 0, total_bytes = 0;
    int clock_khz = 0, bus_bits = 0;
    int error = gpu_checked(cudaGetDeviceProperties(&properties, device));
    if (!error) error = gpu_use(device);
    if (!error) error = gpu_checked(cudaMemGetInfo(&free_bytes, &total_bytes));
    if (error) return error;
    if (gpu_checked(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device))) clock_khz = 0;
    if (gpu_checked(cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, device))) bus_bits = 0;
    snprintf(info->name, sizeof info->name, "%s", properties.name);
    info->major = properties.major;
    info->minor = properties.minor;
    info->n_processors = properties.multiProcessorCount;
    info->total_bytes = total_bytes;
    info->free_bytes = free_bytes;
    info->bandwidth_gb_s = 2.0 * clock_khz * 1e3 * bus_bits / 8 / 1e9; // two transfers a clock
    return 0;
}

#endif
#endif
