// kernels/primitives.cuh: the dozen things kernels do that plain C++ has no words for. Everything else under kernels/ is
// written on these, so that the very same source runs on the CPU (host/primitives.h, a fiber a thread) in the tests.
// Includes nothing else of the library. Read formats.cuh next.
//
// Fragments of mma.m16n8: lane = 4 * g + t holds rows g and g + 8 of A and of the result, column g of B, columns 2t and
// 2t + 1 of the result.
//   s8:  a[0] row g, k 4t..4t+3; a[1] row g + 8; a[2], a[3] the same of k + 16.  b[0] k 4t..4t+3 of column g, b[1] k + 16
//   f16: a[0] row g, k 2t, 2t+1; a[1] row g + 8; a[2], a[3] the same of k + 8.   b[0] k 2t, 2t+1 of column g, b[1] k + 8
//   c[0] row g column 2t, c[1] row g column 2t + 1, c[2] and c[3] the same of row g + 8
#ifndef TINYLLM_CUDA_PRIMITIVES_CUH
#define TINYLLM_CUDA_PRIMITIVES_CUH

#include <math.h>
#include <stdint.h>
#include <string.h>

struct alignas(16) words4 {
    uint32_t v[4];
};
struct alignas(8) words2 {
    uint32_t v[2];
};

#ifndef __CUDACC__
#include "../host/primitives.h"
#else
#include <cuda_fp16.h>

#define DEVICE                  static __device__ __forceinline__
#define BOTH                    static __host__ __device__ __forceinline__
#define GRID_CONSTANT           __grid_constant__
#define UNROLL                  _Pragma("unroll")
#define PRAGMA(text)            _Pragma(#text)
#define UNROLL_BY(n)            PRAGMA(unroll n)
#define KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)

DEVICE int thread_id() { return (int)threadIdx.x; }
DEVICE int n_threads() { return (int)blockDim.x; }
DEVICE int block_x() { return (int)blockIdx.x; }
DEVICE int block_y() { return (int)blockIdx.y; }
DEVICE int block_z() { return (int)blockIdx.z; }
DEVICE int n_blocks_x() { return (int)gridDim.x; }
DEVICE int lane_id() { return (int)threadIdx.x % 32; }
DEVICE int warp_id() { return (int)threadIdx.x / 32; }

// The block's shared memory, as much as the launch asked for.
DEVICE uint8_t *shared_memory() {
    extern __shared__ __align__(16) uint8_t tl_shared[];
    return tl_shared;
}
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

template <class T> DEVICE T shuffle(T x, int from) { return __shfl_sync(~0u, x, from); }
template <class T> DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
DEVICE float half_to_float(uint32_t h) { return __half2float(__ushort_as_half((unsigned short)h)); }
DEVICE uint32_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); } // rounded half to even
DEVICE int round_to_int(float x) { return __float2int_rn(x); }                          // half to even
// Four bytes out of low's (0..3) and high's (4..7), chosen by the low 3 bits of selector's four nibbles.
DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector & 0x7777);
}

// c += a b: 16 x 32 by 32 x 8 of int8; 16 x 16 by 16 x 8 of int8 (the first halves of a and b); 16 x 16 by 16 x 8 of f16.
DEVICE void mma_s8(int32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_s8_k16(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
DEVICE void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, on their way while the thread goes on: started ones form a group at commit, and
// wait leaves at most n of this thread's latest groups under way.
DEVICE void copy_async(uint8_t *shared, const uint8_t *global) {
    uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE int atomic_add(int *p, int x) { return atomicAdd(p, x); }
DEVICE void memory_fence() { __threadfence(); }
template <class T> DEVICE T load_fresh(const T *p) {
    return __ldcg(p);
} // what another block wrote: not from this processor's cache

// Dependent launch: everything that the kernels before this one wrote is there after wait; let_next_start says that the
// next kernel's blocks may take their places (before wait they read nothing but weights). Nothing on older devices.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

#endif
#endif
