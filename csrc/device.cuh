// What a kernel file needs of CUDA: from nvcc, or from the emulation on a CPU (emulation.h).
#pragma once

#ifdef SFR_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#define SFR_LAUNCH(kernel, grid, block, shared, stream, ...)                                                          \
    ((kernel)<<<(grid), (block), (shared), reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), cudaGetLastError())
#define SFR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SFR_LAUNCH_CLUSTER(kernel, grid, block, shared, cluster, stream, ...)                                         \
    sfr::launch_cluster((kernel), (grid), (block), (shared), (cluster), (stream), __VA_ARGS__)

#include <cooperative_groups.h>

namespace sfr {

__device__ inline void check_alignment(const void *, size_t) {} // the hardware does

// One store, which the compiler would otherwise feel free to split.
template <typename T> __device__ inline void store_global(T *at, T value) { __stwb(at, value); }

template <typename... Parameters, typename... Arguments>
int launch_cluster(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, int cluster, void *stream,
                   Arguments... arguments) {
    // All that a block may have: a limit of this launch alone could be lowered by another thread's before it is used.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) (void)cudaGetLastError(); // told once: the next launch has errors of its own
    return error;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
__device__ inline int cluster_size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <typename T> __device__ inline T *remote(T *mine, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
}

// Sixteen bytes from global to shared memory, past the registers. Both are aligned.
template <typename T> __device__ inline void copy_async(T *to, const T *from) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_all_copies_but_the_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
#endif

} // namespace sfr
#endif

// A launcher: called through ctypes, returns a cudaError_t.
#define SFR_API extern "C" __attribute__((visibility("default"))) int
