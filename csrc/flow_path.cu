// The flow path of each row, from its identity, anchor and time:
//
//     x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
//     u = x_1 − x_0        x_t = x_0 + t u        t = times[time_index]
//
// Both are stored: reading u again costs less than its noise does.

#include "launchers.h"
#include "philox.cuh"
#include "types.cuh"

namespace sfr {

template <typename T, typename E> struct FlowPath {
    T *x_t, *u; // (n, d), each row `row` behind the last
    int64_t row;
    const E *targets; // (A, d)
    int64_t target_row;
    const float *times;
    const int64_t *noise_id;
    const int32_t *anchor, *time_index;
    const int64_t *seed;
    float target_scale, source_std;
    int64_t n;
    int d;
};

// A thread has the same columns of one row after another, so what the noise needs of the seed and of the columns is
// computed once.
template <typename T, typename E, int VECTOR, bool ALIGNED>
__global__ void __launch_bounds__(128) flow_path_kernel(FlowPath<T, E> a) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    if (first >= a.d) return;
    const uint64_t seed = static_cast<uint64_t>(*a.seed);
    for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x) {
        const float t = a.times[a.time_index[row]];
        float x_0[VECTOR] = {}, u[VECTOR];
        load_columns<VECTOR, ALIGNED>(a.targets + a.anchor[row] * a.target_row, 1, first, a.d, u);
        if (a.source_std != 0.0f) {
            const uint64_t identity = static_cast<uint64_t>(a.noise_id[row]);
#pragma unroll
            for (int i = 0; i < VECTOR; i += 4)
                gaussian(seed, identity, static_cast<uint32_t>(first + i) / 4, a.source_std, x_0 + i);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            u[i] = u[i] * a.target_scale - x_0[i];
            x_0[i] += t * u[i];
        }
        store_columns<VECTOR, ALIGNED>(a.u + row * a.row, 1, first, a.d, u);
        store_columns<VECTOR, ALIGNED>(a.x_t + row * a.row, 1, first, a.d, x_0);
    }
}

template <typename T, typename E> int launch_flow_path(const FlowPath<T, E> &a, void *stream) {
    // 16 bytes of x_t a thread: two counters in 16 bit, one in float32
    constexpr int VECTOR = 16 / sizeof(T);
    static_assert(VECTOR % 4 == 0, "a counter makes the noise of four columns");
    const int threads = a.d >= 128 * VECTOR ? 128 : ((a.d + VECTOR - 1) / VECTOR + 31) / 32 * 32;
    const dim3 grid(resident_blocks(a.n, threads, 1536), (a.d + threads * VECTOR - 1) / (threads * VECTOR));
    const bool vectors = aligned(a.x_t, a.row * sizeof(T), 16) && aligned(a.u, 16, 16) &&
                         aligned(a.targets, a.target_row * sizeof(E), 16);
    SFR_BOOL(vectors, ALIGNED,
             return SFR_LAUNCH((flow_path_kernel<T, E, VECTOR, ALIGNED>), grid, threads, 0, stream, a))
}

} // namespace sfr

SFR_API sfr_flow_path(const sfr::FlowPathArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    SFR_DISPATCH(f.targets_dtype, E, SFR_DISPATCH(dtype, T, {
                     sfr::FlowPath<T, E> a;
                     a.x_t = static_cast<T *>(f.x_t);
                     a.u = static_cast<T *>(f.u);
                     a.row = f.row;
                     a.targets = static_cast<const E *>(f.targets);
                     a.target_row = f.target_row;
                     a.times = f.times;
                     a.noise_id = f.noise_id;
                     a.anchor = f.anchor;
                     a.time_index = f.time_index;
                     a.seed = f.seed;
                     a.target_scale = f.target_scale;
                     a.source_std = f.source_std;
                     a.n = f.n;
                     a.d = f.d;
                     return sfr::launch_flow_path(a, stream);
                 }))
    return cudaErrorInvalidValue;
}
