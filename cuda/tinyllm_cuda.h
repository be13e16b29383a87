// tinyllm_cuda.h: what libtinyllm_cuda.so exports: facts about the devices and, for each, the operation table that the
// core's forward pass calls (tinyllm.h, "the seam"). Plain C, loaded at run time; nothing here prints, exits or aborts.
// The same interface is exported by the library that runs the kernels on the CPU for tests (host/host.h).
//
// Building: one translation unit, backend_cuda.cu, with the flags of nvcc_flags.txt (the numbers depend on them), and
// csrc/memory.c and source.c beside it. Formats come with what the core passes in.
#ifndef TINYLLM_CUDA_H
#define TINYLLM_CUDA_H

#include "../csrc/tinyllm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tl_cuda_info {
    char name[256];
    int major, minor; // compute capability
    int n_processors; // streaming multiprocessors
    uint64_t total_bytes, free_bytes;
    double bandwidth_gb_s; // memory clock x bus width, 1e9 bytes a second; 0 where the driver does not say
} tl_cuda_info;

// tl_seam_abi() as this library was compiled; use its tables only if it equals the core's.
int tl_cuda_abi(void);
// Usable devices; 0 and a sentence when there is none, or the driver is missing or too old.
int tl_cuda_device_count(tl_message *why);
// TL_ARGUMENT for a device that is not there.
tl_status tl_cuda_device_info(int device, tl_cuda_info *info, tl_message *message);
// The operation table of a device: the same pointer each time, never freed. TL_ARGUMENT for a device that is not there,
// TL_UNSUPPORTED for one older than compute capability 8.0.
tl_status tl_cuda_backend(int device, const tl_backend **backend, tl_message *message);
// How fast the device reads n_bytes (at least 1 MB) of its memory, in 1e9 bytes a second over all repetitions: the limit
// of decoding, as tl_read_bandwidth is the CPU's. Takes the memory and writes it once before. (bandwidth.cuh)
tl_status tl_cuda_read_bandwidth(int device, double *gb_s, size_t n_bytes, int repetitions, tl_message *message);

#ifdef __cplusplus
}
#endif
#endif
