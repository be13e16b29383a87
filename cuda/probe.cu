// probe.cu: does nvcc work with the host compiler here? Compiled before the backend is (CMakeLists.txt); run, it prints
// the compute capability of each GPU, a line each, and nothing where there is no driver.
#include <cmath>
#include <cstdio>
#include <cuda_runtime.h>
#include <string>

__global__ void nothing(float *out) { *out = std::sqrt(2.0f); }

int main() {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) n = 0;
    for (int device = 0; device < n; device++) {
        int major = 0, minor = 0;
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        std::printf("%d%d\n", major, minor);
    }
    return 0;
}
