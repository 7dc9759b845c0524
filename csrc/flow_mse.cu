// The matching loss of each row and its gradient, in one read of v, the target velocity made again in registers:
//
//     u = x_1 − x_0      e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
//
// A block takes some rows and some columns: ℓ comes in one part for each block of columns, db in one for each block of
// rows (sums.cu adds those up).

#include "flow_path.cuh"
#include "reduce.cuh"
#include "types.cuh"

namespace sfr {

template <typename T, typename E, int VECTOR, bool WHOLE>
__global__ void __launch_bounds__(256)
    flow_mse_kernel(T *v, int64_t v_row, int64_t v_col, const float *coefficient, float *loss, float *partial,
                    Path<E> path, int64_t n, int d, int rows) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * rows;
    const int64_t end = begin + rows < n ? begin + rows : n;
    float db[VECTOR] = {};
    for (int64_t row = begin; row < end; ++row) {
        float e[VECTOR], square[1] = {0.0f};
        T *at = v + row * v_row;
        if (first < d) {
            float x_0[VECTOR], x_1[VECTOR];
            path_ends<VECTOR, WHOLE>(path, row, first, d, x_0, x_1);
            load_columns<VECTOR, WHOLE>(at, v_col, first, d, e);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                e[i] = WHOLE || first + i < d ? e[i] - (x_1[i] - x_0[i]) : 0.0f;
                square[0] += e[i] * e[i];
            }
        }
        block_sum(square);
        if (threadIdx.x == 0) loss[row * gridDim.y + blockIdx.y] = square[0] / d;
        if (coefficient == nullptr || first >= d) continue;
        const float scale = 2.0f / d * coefficient[row];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            e[i] *= scale;
            db[i] += e[i];
        }
        store_columns<VECTOR, WHOLE>(at, v_col, first, d, e);
    }
    if (coefficient != nullptr)
        for (int i = 0; i < VECTOR && first + i < d; ++i)
            partial[static_cast<int64_t>(blockIdx.x) * d + first + i] = db[i];
}

} // namespace sfr

// loss (n, blocks of columns) float32, partial (parts, d) float32, v holds dv afterwards if there is a coefficient.
// A block has 16 bytes of a row for each of its threads.
SFR_API sfr_flow_mse(void *v, int dtype, int64_t v_row, int64_t v_col, const float *coefficient, float *loss,
                     float *partial, const void *targets, int targets_dtype, int64_t target_stride,
                     const int64_t *noise_id, const int32_t *anchor, const int64_t *seed, float target_scale,
                     float source_std, int64_t n, int d, int parts, int rows, int threads, void *stream) {
    if (n == 0) return cudaSuccess;
    SFR_DISPATCH(targets_dtype, E, {
        const sfr::Path<E> path{static_cast<const E *>(targets), target_stride, noise_id,  anchor,
                                seed,                            target_scale,  source_std};
        SFR_DISPATCH(dtype, T, {
            constexpr int VECTOR = 16 / sizeof(T);
            const dim3 grid(parts, (d + threads * VECTOR - 1) / (threads * VECTOR));
            T *at = static_cast<T *>(v);
            if (v_col == 1 && d % VECTOR == 0 && sfr::aligned(at, v_row * sizeof(T), 16) && sfr::vectors<VECTOR>(path))
                return SFR_LAUNCH((sfr::flow_mse_kernel<T, E, VECTOR, true>), grid, threads, 0, stream, at, v_row,
                                  v_col, coefficient, loss, partial, path, n, d, rows);
            return SFR_LAUNCH((sfr::flow_mse_kernel<T, E, VECTOR, false>), grid, threads, 0, stream, at, v_row, v_col,
                              coefficient, loss, partial, path, n, d, rows);
        })
    })
    return cudaErrorInvalidValue;
}
