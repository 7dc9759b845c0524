// What a kernel file needs of CUDA: from nvcc, or from the emulation on a CPU (tests/emulation.h).
#pragma once

#include <stdint.h>

#ifdef SFR_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#define SFR_LAUNCH(kernel, grid, block, shared, stream, ...)                                                          \
    ((kernel)<<<(grid), (block), (shared), reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), cudaGetLastError())
#define SFR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define SFR_LAUNCH_CLUSTER(kernel, most, block, shared, cluster, stream, ...)                                         \
    sfr::launch_cluster((kernel), (most), (block), (shared), (cluster), (stream), __VA_ARGS__)

#include <cooperative_groups.h>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

namespace sfr {

__device__ inline void check_alignment(const void *, size_t) {} // the hardware does

// One store, which the compiler would otherwise feel free to split.
template <typename T> __device__ inline void store_global(T *at, T value) { __stwb(at, value); }

// 2^x, 1 / x and 1 / √x, to 2 units in the last place; what is smaller than normal numbers is 0.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// All 64 bits, in one instruction: of the same in C++ the compiler makes a product of 64 by 64 bits and corrects it.
__device__ inline uint64_t product(uint32_t a, uint32_t b) {
    uint64_t out;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(out) : "r"(a), "r"(b));
    return out;
}

// Blocks that the current device holds at once, so many of them on a multiprocessor.
inline int64_t most_resident(int on_each) {
    int device = 0, count = 132;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return static_cast<int64_t>(count) * on_each;
}

// The architecture (80, 90, …) of the code that the current device would run of a kernel; 0: none.
template <typename Kernel> int code_of(Kernel *kernel) {
    cudaFuncAttributes found{};
    return cudaFuncGetAttributes(&found, kernel) ? 0 : found.ptxVersion;
}

inline cudaError_t clear(void *at, size_t bytes, void *stream) {
    return cudaMemsetAsync(at, 0, bytes, reinterpret_cast<cudaStream_t>(stream));
}

// How many clusters the current device runs at once, asked for once: a launch would notice the question.
inline cudaError_t resident_clusters(const void *kernel, const cudaLaunchConfig_t &config, int *count) {
    static std::mutex lock;
    static std::map<std::tuple<const void *, int, unsigned, size_t>, int> known;
    int device = 0, most = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const std::lock_guard<std::mutex> alone(lock);
    int &found = known[{kernel, device, config.gridDim.x, config.dynamicSmemBytes}];
    if (found == 0) {
        // All that a block may have, so that no launch depends on what another has set.
        int fit = 0;
        cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&fit, kernel, &config);
        if (error == cudaSuccess && fit == 0) error = cudaErrorLaunchOutOfResources;
        if (error != cudaSuccess) return error;
        found = fit;
    }
    *count = found;
    return cudaSuccess;
}

// As many clusters as run at once, and at most `most`: whoever waits for a place has no share of the work.
template <typename... Parameters, typename... Arguments>
int launch_cluster(void (*kernel)(Parameters...), int64_t most, int block, size_t shared, int cluster, void *stream,
                   Arguments... arguments) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int resident = 0;
    cudaError_t error = resident_clusters(reinterpret_cast<const void *>(kernel), config, &resident);
    config.gridDim = dim3(cluster * static_cast<int>(most < resident ? most : resident));
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) (void)cudaGetLastError(); // told once: the next launch has errors of its own
    return error;
}

// Adds 1 to what is there and returns what was: as atomicAdd, which would wait for it at once to share it in the warp.
__device__ inline int64_t claim(int64_t *at) {
    int64_t before;
    asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(at) : "memory");
    return before;
}

__device__ inline unsigned shared_address(const void *at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SFR_CLUSTERS // this code may be run by clusters of blocks
__device__ inline int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
__device__ inline int cluster_size() { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }

// A barrier in shared memory. Its first phase has parity 0; a phase ends when one thread has said how many bytes the
// others will send, and they have come.
__device__ inline void start_barrier(uint64_t *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); // before the others of the cluster use it
}
__device__ inline void expect_bytes(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Of this block's scope, although others have sent them: they lie in shared memory, and the wider one empties the L1
// cache, which has nothing of it.
__device__ inline void wait_for_bytes(uint64_t *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "WAIT: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra WAIT;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// Writes 4 or 8 bytes where block `rank` of the cluster has `to`, and counts them at its `barrier`.
template <typename T> __device__ inline void send(T *to, int rank, T value, uint64_t *barrier) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one store");
    unsigned at, counted;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(shared_address(barrier)), "r"(rank));
    typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type bits;
    memcpy(&bits, &value, sizeof(bits));
    if constexpr (sizeof(T) == 4)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at), "r"(bits),
                     "r"(counted)
                     : "memory");
    else
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(at), "l"(bits),
                     "r"(counted)
                     : "memory");
}

// Sixteen bytes from global to shared memory, past the registers: the first `bytes` of them, then zeros. Both are
// aligned.
template <typename T> __device__ inline void copy_async(T *to, const T *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_all_copies_but_the_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
#endif

} // namespace sfr
#endif

namespace sfr {

constexpr int MOST_STATIC_SHARED = 48 << 10; // bytes of shared memory that a block may declare
constexpr int MOST_SHARED = 227 << 10;       // and that a launch may give it, on sm_90 and sm_100

} // namespace sfr

// A launcher: called through ctypes, returns a cudaError_t.
#define SFR_API extern "C" __attribute__((visibility("default"))) int
