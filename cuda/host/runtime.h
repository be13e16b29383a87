// host/runtime.h: runtime.cuh on the CPU: one device whose memory is the machine's, and whose kernels run in
// host/primitives.h. What a stream was given runs as late as it can: when somebody waits for it. So a host buffer that is
// written too early, or memory that is freed too early, shows.
#ifndef TINYLLM_CUDA_HOST_RUNTIME_H
#define TINYLLM_CUDA_HOST_RUNTIME_H

#include "../kernels/primitives.cuh"
#include "../tinyllm_cuda.h"
#include <functional>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

struct gpu_recording {
    std::vector<std::function<void()>> launches;
};
struct gpu_stream_state {
    std::deque<std::function<void()>> waiting;
    long n_given, n_run;
    gpu_recording *recording;
};
typedef gpu_stream_state *gpu_stream;
typedef gpu_recording *gpu_graph;

static std::recursive_mutex host_device_lock;
static std::vector<gpu_stream> host_streams;
static std::map<const uint8_t *, size_t> host_pinned; // blocks and their bytes
static long host_live;                                // blocks of device and pinned memory
extern "C" __attribute__((visibility("default"))) long tl_host_live() { return host_live; } // for the tests

static inline const char *gpu_reason(int error) {
    return error == 0 ? "no error" : error == 2 ? "out of memory" : "not while a stream records";
}
static inline int gpu_out_of_memory(int error) { return error == 2; }
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

// ---- streams ------------------------------------------------------------------------------------------------------------

static inline int gpu_stream_create(gpu_stream *s) {
    *s = new gpu_stream_state();
    host_streams.push_back(*s);
    return 0;
}
static inline int host_run_up_to(gpu_stream s, long n) {
    std::lock_guard<std::recursive_mutex> locked(host_device_lock);
    if (s->recording) return 3;
    for (; s->n_run < n; s->n_run++) {
        s->waiting.front()();
        s->waiting.pop_front();
    }
    return 0;
}
static inline int gpu_wait(gpu_stream s) { return host_run_up_to(s, s->n_given); }
template <class Work> static inline int host_give(gpu_stream s, Work work) {
    std::lock_guard<std::recursive_mutex> locked(host_device_lock);
    if (s->recording) return 3; // this backend records kernels alone
    s->waiting.push_back(work);
    s->n_given++;
    return 0;
}
static inline bool host_is_pinned(const void *p) {
    std::lock_guard<std::recursive_mutex> locked(host_device_lock);
    auto block = host_pinned.upper_bound((const uint8_t *)p);
    if (block == host_pinned.begin()) return false;
    --block;
    return (const uint8_t *)p < block->first + block->second;
}

// ---- memory -------------------------------------------------------------------------------------------------------------

static inline int gpu_alloc(void **p, size_t n_bytes) {
    std::lock_guard<std::recursive_mutex> locked(host_device_lock);
    *p = n_bytes < (size_t)16 << 30 ? aligned_alloc(256, (n_bytes + 255) / 256 * 256) : NULL;
    if (*p) memset(*p, 0xa5, n_bytes); // what cudaMalloc gives is not zero either
    host_live += *p != NULL;
    host_kernel_last = false;
    return *p ? 0 : 2;
}
static inline void gpu_free(void *p) {
    std::lock_guard<std::recursive_mutex> locked(host_device_lock);
    for (gpu_stream s : host_streams) (void)gpu_wait(s);
    host_live -= p != NULL;
    free(p);
}
static inline int gpu_alloc_pinned(void **p, size_t n_bytes) {
    const int error = gpu_alloc(p, n_bytes);
    if (!error) host_pinned[(const uint8_t *)*p] = n_bytes;
    return error;
}
static inline void gpu_free_pinned(void *p) {
    gpu_free(p);
    host_pinned.erase((const uint8_t *)p);
}
static inline void host_copied(void *to, const void *from, size_t n_bytes) {
    memcpy(to, from, n_bytes);
    host_kernel_last = false;
}
static inline int gpu_copy(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    return host_give(s, [=] { host_copied(to, from, n_bytes); });
}
static inline int gpu_copy_in(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    if (host_is_pinned(from)) return gpu_copy(s, to, from, n_bytes);
    const std::vector<uint8_t> bytes((const uint8_t *)from, (const uint8_t *)from + n_bytes); // taken before it returns
    return host_give(s, [=] { host_copied(to, bytes.data(), n_bytes); });
}
static inline int gpu_copy_out(gpu_stream s, void *to, const void *from, size_t n_bytes) {
    const int error = gpu_copy(s, to, from, n_bytes);
    return error || host_is_pinned(to) ? error : gpu_wait(s);
}
static inline int gpu_clear(gpu_stream s, void *to, size_t n_bytes) {
    return host_give(s, [=] {
        memset(to, 0, n_bytes);
        host_kernel_last = false;
    });
}

struct gpu_event {
    gpu_stream s;
    long n;
};
static inline int gpu_event_create(gpu_event *e) {
    *e = {};
    return 0;
}
static inline int gpu_event_record(gpu_event &e, gpu_stream s) {
    e = {s, s->n_given};
    return 0;
}
static inline int gpu_event_wait(gpu_event e) { return e.s ? host_run_up_to(e.s, e.n) : 0; }
static inline void gpu_event_free(gpu_event e) { (void)e; }

// ---- launches and graphs ------------------------------------------------------------------------------------------------

struct gpu_grid {
    int x, y, z;
};
template <class A> static inline int gpu_allow_shared(void (*kernel)(A), int n_bytes) {
    (void)kernel;
    return n_bytes > 227 << 10;
}
template <class A> static inline bool gpu_waits(void (*kernel)(A)) { return kernel != NULL; }
template <class A> static inline A host_taken(const A &arguments) {
    HOST_ASIDE;
    return arguments;
}
template <class A>
static inline int gpu_launch(gpu_stream s, void (*kernel)(A), gpu_grid grid, int threads, size_t shared_bytes,
                             bool after, const A &arguments) {
    if (shared_bytes > 227 << 10 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
        return 1;
    auto launch = [=] {
        struct call {
            void (*kernel)(A);
            const A *arguments;
        } c = {kernel, &arguments};
        host_run(
            grid.x, grid.y, grid.z, threads, shared_bytes, after,
            [](void *p) {
                const call &c = host_taken(*(call *)p);
                c.kernel(host_taken(*c.arguments));
            },
            &c);
    };
    if (!s->recording) return host_give(s, launch);
    s->recording->launches.push_back(launch);
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
    for (auto &launch : graph->launches)
        if (host_give(s, launch)) return 3;
    return 0;
}
static inline void gpu_graph_free(gpu_graph graph) { delete graph; }

#endif
