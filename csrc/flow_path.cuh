// Both ends of a row's flow path, for those who need them in registers.
#pragma once

#include "philox.cuh"
#include "types.cuh"

namespace sfr {

template <typename E> struct Path {
    const E *targets; // (A, d)
    int64_t target_stride;
    const int64_t *noise_id; // (n,)
    const int32_t *anchor;   // (n,)
    const int64_t *seed;     // (1,)
    float target_scale, source_std;
};

// Whether N targets can be read at once.
template <int N, typename E> bool vectors(const Path<E> &path) {
    const int bytes = N * sizeof(E) < 16 ? N * sizeof(E) : 16;
    return aligned(path.targets, path.target_stride * sizeof(E), bytes);
}

// x_0 and x_1 of a row at N coordinates from `first` on, a multiple of four; what lies beyond d is 0 in x_1.
template <int N, bool WHOLE, typename E>
__device__ inline void path_ends(const Path<E> &path, int64_t row, int first, int d, float (&x_0)[N], float (&x_1)[N]) {
    const E *row_targets = path.targets + path.anchor[row] * path.target_stride;
    load_columns<N, WHOLE>(row_targets, 1, first, d, x_1);
    const uint64_t seed = static_cast<uint64_t>(*path.seed), identity = static_cast<uint64_t>(path.noise_id[row]);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float noise[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (path.source_std != 0.0f) gaussian(seed, identity, static_cast<uint32_t>(first + i) / 4, noise);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x_0[i + j] = noise[j] * path.source_std;
            x_1[i + j] *= path.target_scale;
        }
    }
}

} // namespace sfr
