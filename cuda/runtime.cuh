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

// ---- memory and the stream ----------------------------------------------------------------------------------------------

static inline int gpu_shared_bytes(int device, int *of_block, int *of_processor) {
    int error = gpu_checked(cudaDeviceGetAttribute(of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (error) return error;
    return gpu_checked(cudaDeviceGetAttribute(of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
}
static inline int gpu_stream_create(gpu_stream *s) {
    return gpu_checked(cudaStreamCreateWithFlags(s, cudaStreamNonBlocking));
}
static inline int gpu_alloc(void **p, size_t n_bytes) { return gpu_checked(cudaMalloc(p, n_bytes)); }
static inline void gpu_free(void *p) { (void)gpu_checked(cudaFree(p)); }
static inline int gpu_alloc_pinned(void **p, size_t n_bytes) { return gpu_checked(cudaMallocHost(p, n_bytes)); }
static inline void gpu_free_pinned(void *p) { (void)gpu_checked(cudaFreeHost(p)); }
static inline int gpu_copy_in(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    return gpu_checked(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyHostToDevice, s));
}
static inline int gpu_copy_out(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    return gpu_checked(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToHost, s));
}
static inline int gpu_copy(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    return gpu_checked(cudaMemcpyAsync(to, from, n_bytes, cudaMemcpyDeviceToDevice, s));
}
static inline int gpu_clear(gpu_stream s, void *to, size_t n_bytes) {
    return gpu_checked(cudaMemsetAsync(to, 0, n_bytes, s));
}
static inline int gpu_wait(gpu_stream s) { return gpu_checked(cudaStreamSynchronize(s)); }

typedef cudaEvent_t gpu_event;
static inline int gpu_event_create(gpu_event *e) {
    return gpu_checked(cudaEventCreateWithFlags(e, cudaEventDisableTiming));
}
static inline int gpu_event_record(gpu_event &e, gpu_stream s) { return gpu_checked(cudaEventRecord(e, s)); }
static inline int gpu_event_wait(gpu_event e) { return gpu_checked(cudaEventSynchronize(e)); }
static inline void gpu_event_free(gpu_event e) {
    if (e) (void)gpu_checked(cudaEventDestroy(e));
}

// ---- launches -----------------------------------------------------------------------------------------------------------

struct gpu_grid {
    int x, y, z;
};

template <class A> static inline int gpu_allow_shared(void (*kernel)(A), int n_bytes) {
    const int error = gpu_checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes));
    if (error) return error;
    // All alike: a processor divides its memory anew only when it is empty, so kernels that differ could not overlap.
    return gpu_checked(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

// Whether this code waits for the kernel in front (griddepcontrol, sm_90): not if the driver made it from older PTX.
template <class A> static inline bool gpu_waits(void (*kernel)(A)) {
    cudaFuncAttributes attributes = {};
    return gpu_checked(cudaFuncGetAttributes(&attributes, kernel)) == 0 && attributes.ptxVersion >= 90;
}

// after: whether the kernel may take its place before the one in front of it has ended (it calls wait_for_previous).
template <class A>
static inline int gpu_launch(gpu_stream s, void (*kernel)(A), gpu_grid grid, int threads, size_t shared_bytes,
                             bool after, const A &arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    config.gridDim = dim3((unsigned)grid.x, (unsigned)grid.y, (unsigned)grid.z);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = s;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = after ? 1 : 0;
    return gpu_checked(cudaLaunchKernelEx(&config, kernel, arguments));
}

// ---- graphs: launches recorded once, run often ----------------------------------------------------------------------------

// What else this thread does meanwhile (Python may free another model while it is asked whether to stop) is allowed.
static inline int gpu_record(gpu_stream s) {
    return gpu_checked(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
}
// NULL graph: what was recorded is dropped.
static inline int gpu_record_end(gpu_stream s, gpu_graph *graph) {
    cudaGraph_t recorded = NULL;
    int error = gpu_checked(cudaStreamEndCapture(s, &recorded));
    if (!error && graph) error = gpu_checked(cudaGraphInstantiate(graph, recorded, 0));
    if (recorded) (void)gpu_checked(cudaGraphDestroy(recorded));
    return error;
}
static inline int gpu_run(gpu_stream s, gpu_graph graph) { return gpu_checked(cudaGraphLaunch(graph, s)); }
static inline void gpu_graph_free(gpu_graph graph) { (void)gpu_checked(cudaGraphExecDestroy(graph)); }

#endif
#endif
