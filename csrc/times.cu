// The flow times of a step, drawn from the seed, and their sinusoid: each a single launch.

#include "philox.cuh"
#include "types.cuh"

namespace sfr {

constexpr int THREADS = 128;

__global__ void stratified_kernel(const int64_t *noise_id, const int64_t *seed, float *times, int32_t *index, int64_t n,
                                  int num_times) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const uint64_t key = static_cast<uint64_t>(*seed);
    if (i < n) {
        const uint32_t word = philox(key, static_cast<uint64_t>(noise_id[i]), 0, 1).w[0];
        index[i] = static_cast<int32_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(num_times)) >> 32);
    }
    if (i < num_times) {
        const Words words = philox(key, 0, static_cast<uint32_t>(i) / 4, 2);
        const uint32_t lane = static_cast<uint32_t>(i) % 4;
        const uint32_t word = lane == 0 ? words.w[0] : lane == 1 ? words.w[1] : lane == 2 ? words.w[2] : words.w[3];
        times[i] = (static_cast<float>(i) + uniform(word)) / static_cast<float>(num_times);
    }
}

__global__ void sequence_kernel(const int64_t *identity, const int64_t *seed, float *times, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n)
        times[i] = uniform(philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(identity[i]), 0, 3).w[0]);
}

// Angles reach time_scale radians: in float64 they keep their fraction of a turn. There are few of them.
template <typename T>
__global__ void sinusoid_kernel(const float *times, T *out, int num_times, int d, double time_scale) {
    const int j = blockIdx.y * THREADS + threadIdx.x, half = d / 2;
    if (j >= d) return;
    const double rate = 9.210340371976184 / (half > 1 ? half - 1 : 1); // ln 10000 / (d / 2 − 1)
    const double angle = times[blockIdx.x % num_times] * time_scale * exp(-rate * (j < half ? j : j - half));
    const double turns = angle * 0.15915494309189535;
    float sine, cosine;
    circle(1.0f, static_cast<uint32_t>((turns - floor(turns)) * 4294967296.0), &cosine, &sine);
    out[blockIdx.x * static_cast<int64_t>(d) + j] = from_float<T>(j < half ? sine : j < 2 * half ? cosine : 0.0f);
}

inline dim3 blocks(int64_t n) { return dim3(static_cast<unsigned>((n + THREADS - 1) / THREADS)); }

} // namespace sfr

SFR_API sfr_stratified_times(const int64_t *noise_id, const int64_t *seed, float *times, int32_t *index, int64_t n,
                             int num_times, void *stream) {
    const dim3 grid = sfr::blocks(n > num_times ? n : num_times);
    return SFR_LAUNCH(sfr::stratified_kernel, grid, sfr::THREADS, 0, stream, noise_id, seed, times, index, n,
                      num_times);
}

SFR_API sfr_sequence_times(const int64_t *identity, const int64_t *seed, float *times, int64_t n, void *stream) {
    if (n == 0) return cudaSuccess;
    return SFR_LAUNCH(sfr::sequence_kernel, sfr::blocks(n), sfr::THREADS, 0, stream, identity, seed, times, n);
}

// out (copies · num_times, d): the same rows again and again.
SFR_API sfr_sinusoid(const float *times, void *out, int dtype, int num_times, int copies, int d, double time_scale,
                     void *stream) {
    if (num_times == 0) return cudaSuccess;
    const dim3 grid(copies * num_times, (d + sfr::THREADS - 1) / sfr::THREADS);
    SFR_DISPATCH(dtype, T,
                 return SFR_LAUNCH((sfr::sinusoid_kernel<T>), grid, sfr::THREADS, 0, stream, times,
                                   static_cast<T *>(out), num_times, d, time_scale))
    return cudaErrorInvalidValue;
}
