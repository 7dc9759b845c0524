// The words behind the noise and the times, as they are: for comparison with other implementations.

#include "philox.cuh"

namespace sfr {

__global__ void philox_kernel(const int64_t *identity, const int64_t *seed, int64_t *out, int stream, int blocks) {
    const int64_t row = blockIdx.x;
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) {
        const Words words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(identity[row]),
                                   static_cast<uint32_t>(block), static_cast<uint32_t>(stream));
        for (int lane = 0; lane < 4; ++lane) out[(row * blocks + block) * 4 + lane] = words.w[lane];
    }
}

} // namespace sfr

// out (n, 4 · blocks) int64.
SFR_API sfr_philox(const int64_t *identity, const int64_t *seed, int64_t *out, int64_t n, int philox_stream, int blocks,
                   void *stream) {
    if (n == 0) return cudaSuccess;
    return SFR_LAUNCH(sfr::philox_kernel, dim3(static_cast<unsigned>(n)), 32, 0, stream, identity, seed, out,
                      philox_stream, blocks);
}
