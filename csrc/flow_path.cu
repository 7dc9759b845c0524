// The flow path of each row, from its identity, anchor and time:
//
//     x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
//     x_t = (1 − t) x_0 + t x_1                   t = times[time_index]
//
// Nothing is saved: whoever needs the noise again makes it again.

#include "flow_path.cuh"
#include "types.cuh"

namespace sfr {

template <typename T, typename E, int VECTOR, bool WHOLE>
__global__ void __launch_bounds__(128)
    flow_path_kernel(T *x_t, Path<E> path, const float *times, const int32_t *time_index, int d) {
    const int64_t row = blockIdx.x;
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    if (first >= d) return;
    const float t = times[time_index[row]];
    float x_0[VECTOR], x_1[VECTOR], out[VECTOR];
    path_ends<VECTOR, WHOLE>(path, row, first, d, x_0, x_1);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) out[i] = (1.0f - t) * x_0[i] + t * x_1[i];
    store_columns<VECTOR, WHOLE>(x_t + row * d, 1, first, d, out);
}

template <typename T, typename E>
int launch_flow_path(void *x_t, const Path<E> &path, const float *times, const int32_t *time_index, int64_t n, int d,
                     void *stream) {
    // 16 bytes of x_t a thread: two counters in 16 bit, one in float32
    constexpr int VECTOR = 16 / sizeof(T);
    const int threads = d >= 128 * VECTOR ? 128 : ((d + VECTOR - 1) / VECTOR + 31) / 32 * 32;
    const dim3 grid(static_cast<unsigned>(n), (d + threads * VECTOR - 1) / (threads * VECTOR));
    T *out = static_cast<T *>(x_t);
    if (d % VECTOR == 0 && aligned(out, 16, 16) && vectors<VECTOR>(path))
        return SFR_LAUNCH((flow_path_kernel<T, E, VECTOR, true>), grid, threads, 0, stream, out, path, times,
                          time_index, d);
    return SFR_LAUNCH((flow_path_kernel<T, E, VECTOR, false>), grid, threads, 0, stream, out, path, times, time_index,
                      d);
}

} // namespace sfr

SFR_API sfr_flow_path(void *x_t, int dtype, const void *targets, int targets_dtype, int64_t target_stride,
                      const float *times, const int64_t *noise_id, const int32_t *anchor, const int32_t *time_index,
                      const int64_t *seed, float target_scale, float source_std, int64_t n, int d, void *stream) {
    if (n == 0) return cudaSuccess;
    SFR_DISPATCH(targets_dtype, E, {
        const sfr::Path<E> path{static_cast<const E *>(targets), target_stride, noise_id,  anchor,
                                seed,                            target_scale,  source_std};
        SFR_DISPATCH(dtype, T, return (sfr::launch_flow_path<T, E>(x_t, path, times, time_index, n, d, stream)))
    })
    return cudaErrorInvalidValue;
}
