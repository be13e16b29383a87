// host/runtime.h: runtime.cuh on the CPU: one device whose memory is the machine's, and whose kernels run in
// host/primitives.h.
#ifndef TINYLLM_CUDA_HOST_RUNTIME_H
#define TINYLLM_CUDA_HOST_RUNTIME_H

#include "../kernels/primitives.cuh"
#include "../tinyllm_cuda.h"
#include <functional>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

struct gpu_recording {
    std::vector<std::function<void()>> launches;
};
struct gpu_stream_state {
    gpu_recording *recording;
};
typedef gpu_stream_state *gpu_stream;
typedef gpu_recording *gpu_graph;

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

static inline int gpu_shared_bytes(int device, int *of_block, int *of_processor) {
    *of_block = 227 << 10;
    *of_processor = 228 << 10;
    return gpu_use(device);
}
static inline int gpu_stream_create(gpu_stream *s) {
    *s = new gpu_stream_state();
    return 0;
}
static long host_live; // blocks of device and pinned memory
extern "C" __attribute__((visibility("default"))) long tl_host_live() { return host_live; } // for the tests

static inline int gpu_alloc(void **p, size_t n_bytes) {
    *p = n_bytes < (size_t)16 << 30 ? aligned_alloc(256, (n_bytes + 255) / 256 * 256) : NULL;
    if (*p) memset(*p, 0xa5, n_bytes); // what cudaMalloc gives is not zero either
    host_live += *p != NULL;
    return *p ? 0 : 2;
}
static inline void gpu_free(void *p) {
    host_live -= p != NULL;
    free(p);
}
static inline int gpu_alloc_pinned(void **p, size_t n_bytes) { return gpu_alloc(p, n_bytes); }
static inline void gpu_free_pinned(void *p) { gpu_free(p); }
static inline int gpu_copy(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    (void)s;
    memcpy(to, from, n_bytes);
    return 0;
}
static inline int gpu_copy_in(gpu_stream s, void *to, const void *from, size_t n) { return gpu_copy(s, to, from, n); }
static inline int gpu_copy_out(gpu_stream s, void *to, const void *from, size_t n) { return gpu_copy(s, to, from, n); }
static inline int gpu_clear(gpu_stream s, void *to, size_t n_bytes) {
    (void)s;
    memset(to, 0, n_bytes);
    return 0;
}
static inline int gpu_wait(gpu_stream s) {
    (void)s;
    return 0;
}

typedef int gpu_event;
static inline int gpu_event_create(gpu_event *e) { return *e = 0; }
static inline int gpu_event_record(gpu_event e, gpu_stream s) { return gpu_wait(s) + e; }
static inline int gpu_event_wait(gpu_event e) { return e; }
static inline void gpu_event_free(gpu_event e) { (void)e; }

struct gpu_grid {
    int x, y, z;
};
template <class A> static inline int gpu_allow_shared(void (*kernel)(A), int n_bytes) {
    (void)kernel;
    return n_bytes > 227 << 10;
}
template <class A> static inline bool gpu_waits(void (*kernel)(A)) { return kernel != NULL; }
template <class A>
static inline int gpu_launch(gpu_stream s, void (*kernel)(A), gpu_grid grid, int threads, size_t shared_bytes,
                             bool after, const A &arguments) {
    (void)after;
    if (shared_bytes > 227 << 10) return 1;
    auto launch = [=] {
        struct call {
            void (*kernel)(A);
            const A *arguments;
        } c = {kernel, &arguments};
        host_run(
            grid.x, grid.y, grid.z, threads, shared_bytes,
            [](void *p) { ((call *)p)->kernel(*((call *)p)->arguments); }, &c);
    };
    if (s->recording)
        s->recording->launches.push_back(launch);
    else
        launch();
    return 0;
}

static inline int gpu_record(gpu_stream s) {
    s->recording = new gpu_recording();
    return 0;
}
static inline int gpu_record_end(gpu_stream s, gpu_graph *graph) {
    if (graph)
        *graph = s->recording;
    else
        delete s->recording;
    s->recording = NULL;
    return 0;
}
static inline int gpu_run(gpu_stream s, gpu_graph graph) {
    (void)s;
    for (auto &launch : graph->launches) launch();
    return 0;
}
static inline void gpu_graph_free(gpu_graph graph) { delete graph; }

#endif
