// backend_cuda.cu: the GPU's implementation of the operations that csrc/model.c calls, and what the library exports.
#include "bandwidth.cuh"
#include "runtime.cuh"
#include <stdio.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int tl_cuda_abi(void) { return tl_seam_abi(); }

EXPORT int tl_cuda_device_count(tl_message *why) {
    int n = 0;
    gpu_count(&n, why->text, sizeof why->text);
    return n;
}

static tl_status check_device(int device, tl_message *message) {
    tl_message why;
    const int n = tl_cuda_device_count(&why);
    if (n == 0) return tl_fail(message, TL_UNSUPPORTED, "%s", why.text);
    if (device >= 0 && device < n) return TL_OK;
    return tl_fail(message, TL_ARGUMENT, "device %d is not one of the %d there are (0 to %d)", device, n, n - 1);
}

EXPORT tl_status tl_cuda_device_info(int device, tl_cuda_info *info, tl_message *message) {
    memset(info, 0, sizeof *info);
    tl_status status = check_device(device, message);
    if (status != TL_OK) return status;
    const int error = gpu_info(device, info);
    return error ? tl_fail(message, TL_UNSUPPORTED, "device %d does not answer: %s", device, gpu_reason(error)) : TL_OK;
}

EXPORT tl_status tl_cuda_backend(int device, const tl_backend **backend, tl_message *message) {
    tl_cuda_info info;
    tl_status status = tl_cuda_device_info(device, &info, message);
    *backend = NULL;
    if (status != TL_OK) return status;
    return tl_fail(message, TL_UNSUPPORTED, "the CUDA backend has no kernels yet");
}

EXPORT tl_status tl_cuda_read_bandwidth(int device, double *gb_s, size_t n_bytes, int repetitions,
                                        tl_message *message) {
    const size_t n_read = n_bytes / READ_UNIT_BYTES * READ_UNIT_BYTES;
    double seconds = 0;
    tl_status status = check_device(device, message);
    if (status != TL_OK) return status;
    if (n_read == 0 || repetitions < 1)
        return tl_fail(message, TL_ARGUMENT, "%zu bytes (at least %zu), %d repetitions (at least 1)", n_bytes,
                       READ_UNIT_BYTES, repetitions);
    const int error = read_timed(device, &seconds, n_read, repetitions);
    if (error)
        return tl_fail(message, gpu_out_of_memory(error) ? TL_MEMORY : TL_UNSUPPORTED,
                       "%zu bytes of device %d could not be read: %s", n_read, device, gpu_reason(error));
    *gb_s = 1e-9 * (double)n_read * repetitions / seconds;
    return TL_OK;
}
