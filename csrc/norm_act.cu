// LayerNorm and SiLU, with the row bias before and the residual after, and their backward (DESIGN section 2):
//
//     y ← y + row_bias[row_index]      x̂ = (y − μ) ρ      z = γ x̂ + β      out = SiLU(z) (+ residual)
//
//     dz = dout σ(z)(1 + z(1 − σ(z)))      q = γ dz      dy = ρ (q − mean(q) − x̂ mean(q x̂))
//     dγ = Σ dz x̂      dβ = Σ dz      Σ dy
//
// A row that fits a block of threads stays in registers. A wider one is read again from cache: three times forward;
// backward a first kernel leaves mean(q) and mean(q x̂).

#include "reduce.cuh"
#include "types.cuh"

namespace sfr {

template <typename T> struct Matrix {
    T *data;
    int64_t row, col; // strides
    __device__ T *at(int64_t i) const { return data + i * row; }
};

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

template <typename T, typename G> struct NormAct {
    Matrix<T> y;
    const G *gamma, *beta;
    const float *row_bias; // (M, D), or null
    const int32_t *row_index;
    Matrix<const T> residual; // null: none
    T *out;                   // (n, D)
    float *mean, *rstd;       // (n,)
    int width;
    float eps;
};

template <typename T, typename G, int VECTOR, bool WHOLE, bool ONE_BLOCK>
__global__ void __launch_bounds__(512) norm_act_kernel(NormAct<T, G> a) {
    const int64_t row = blockIdx.x;
    const int step = blockDim.x * VECTOR, begin = threadIdx.x * VECTOR;
    const float *bias = a.row_bias == nullptr ? nullptr : a.row_bias + a.row_index[row] * static_cast<int64_t>(a.width);
    const auto read = [&](int first, float(&y)[VECTOR]) {
        load_columns<VECTOR, WHOLE>(a.y.at(row), a.y.col, first, a.width, y);
        if (bias == nullptr) return;
        float b[VECTOR];
        load_columns<VECTOR, WHOLE>(bias, 1, first, a.width, b);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) y[i] += b[i];
    };
    float y[VECTOR] = {}, sum[1] = {0.0f};
    for (int first = begin; first < a.width; first += step) {
        read(first, y);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[0] += y[i];
    }
    block_sum(sum);
    const float mean = sum[0] / a.width;
    sum[0] = 0.0f;
    for (int first = begin; first < a.width; first += step) {
        if (!ONE_BLOCK) read(first, y);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float centred = WHOLE || first + i < a.width ? y[i] - mean : 0.0f;
            sum[0] += centred * centred;
        }
    }
    block_sum(sum);
    const float rstd = 1.0f / sqrtf(sum[0] / a.width + a.eps);
    for (int first = begin; first < a.width; first += step) {
        if (!ONE_BLOCK) read(first, y);
        float gamma[VECTOR], beta[VECTOR], out[VECTOR];
        load_columns<VECTOR, WHOLE>(a.gamma, 1, first, a.width, gamma);
        load_columns<VECTOR, WHOLE>(a.beta, 1, first, a.width, beta);
        if (a.residual.data != nullptr) {
            load_columns<VECTOR, WHOLE>(a.residual.at(row), a.residual.col, first, a.width, out);
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) out[i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float z = gamma[i] * ((y[i] - mean) * rstd) + beta[i];
            out[i] += z * sigmoid(z);
        }
        if (bias != nullptr) store_columns<VECTOR, WHOLE>(a.y.at(row), a.y.col, first, a.width, y);
        store_columns<VECTOR, WHOLE>(a.out + row * a.width, 1, first, a.width, out);
    }
    if (threadIdx.x == 0) {
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
}

template <typename T, typename G> struct NormActBackward {
    Matrix<const T> dout, y;
    const G *gamma, *beta;
    const float *mean, *rstd; // (n,)
    float *moments;           // (n, 2), where a row is wider than a block
    Matrix<T> dy;
    float *partial; // (2 or 3, parts, D): dγ, dβ and, if SUM_DY, Σ dy
    int64_t n;
    int width, rows;
};

// x̂ and dz of some columns of a row.
template <int VECTOR, bool WHOLE, typename T, typename G>
__device__ inline void gates(const NormActBackward<T, G> &a, int64_t row, int first, const float (&gamma)[VECTOR],
                             const float (&beta)[VECTOR], float (&x_hat)[VECTOR], float (&dz)[VECTOR]) {
    load_columns<VECTOR, WHOLE>(a.y.at(row), a.y.col, first, a.width, x_hat);
    load_columns<VECTOR, WHOLE>(a.dout.at(row), a.dout.col, first, a.width, dz);
    const float mean = a.mean[row], rstd = a.rstd[row];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        x_hat[i] = (x_hat[i] - mean) * rstd;
        const float z = gamma[i] * x_hat[i] + beta[i], sigma = sigmoid(z);
        dz[i] *= sigma * (1.0f + z * (1.0f - sigma));
    }
}

template <typename T, typename G, int VECTOR, bool WHOLE>
__global__ void __launch_bounds__(256) moments_kernel(NormActBackward<T, G> a) {
    const int64_t row = blockIdx.x;
    float sum[2] = {0.0f, 0.0f};
    for (int first = threadIdx.x * VECTOR; first < a.width; first += blockDim.x * VECTOR) {
        float gamma[VECTOR], beta[VECTOR], x_hat[VECTOR], dz[VECTOR];
        load_columns<VECTOR, WHOLE>(a.gamma, 1, first, a.width, gamma);
        load_columns<VECTOR, WHOLE>(a.beta, 1, first, a.width, beta);
        gates<VECTOR, WHOLE>(a, row, first, gamma, beta, x_hat, dz);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            sum[0] += gamma[i] * dz[i];
            sum[1] += gamma[i] * dz[i] * x_hat[i];
        }
    }
    block_sum(sum);
    if (threadIdx.x == 0) {
        a.moments[2 * row] = sum[0] / a.width;
        a.moments[2 * row + 1] = sum[1] / a.width;
    }
}

template <typename T, typename G, int VECTOR, bool WHOLE, bool SUM_DY>
__global__ void __launch_bounds__(256, 1) norm_act_backward_kernel(NormActBackward<T, G> a) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.rows;
    const int64_t end = begin + a.rows < a.n ? begin + a.rows : a.n;
    const bool mine = first < a.width;
    float gamma[VECTOR] = {}, beta[VECTOR] = {}, dgamma[VECTOR] = {}, dbeta[VECTOR] = {}, db[VECTOR] = {};
    if (mine) {
        load_columns<VECTOR, WHOLE>(a.gamma, 1, first, a.width, gamma);
        load_columns<VECTOR, WHOLE>(a.beta, 1, first, a.width, beta);
    }
    for (int64_t row = begin; row < end; ++row) {
        float x_hat[VECTOR] = {}, dz[VECTOR] = {}, mean[2] = {0.0f, 0.0f};
        if (mine) gates<VECTOR, WHOLE>(a, row, first, gamma, beta, x_hat, dz);
        if (a.moments == nullptr) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                mean[0] += gamma[i] * dz[i];
                mean[1] += gamma[i] * dz[i] * x_hat[i];
            }
            block_sum(mean);
            mean[0] /= a.width;
            mean[1] /= a.width;
        } else {
            mean[0] = a.moments[2 * row];
            mean[1] = a.moments[2 * row + 1];
        }
        if (!mine) continue;
        const float rstd = a.rstd[row];
        float dy[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            dy[i] = rstd * (gamma[i] * dz[i] - mean[0] - x_hat[i] * mean[1]);
            dgamma[i] += dz[i] * x_hat[i];
            dbeta[i] += dz[i];
            if (SUM_DY) db[i] += dy[i];
        }
        store_columns<VECTOR, WHOLE>(a.dy.at(row), a.dy.col, first, a.width, dy);
    }
    if (!mine) return;
    const int64_t parts = gridDim.x;
    float *at = a.partial + static_cast<int64_t>(blockIdx.x) * a.width;
    store_columns<VECTOR, WHOLE>(at, 1, first, a.width, dgamma);
    store_columns<VECTOR, WHOLE>(at + parts * a.width, 1, first, a.width, dbeta);
    if (SUM_DY) store_columns<VECTOR, WHOLE>(at + 2 * parts * a.width, 1, first, a.width, db);
}

template <typename T> bool whole(const Matrix<T> &m, int width) {
    return m.data == nullptr ||
           (m.col == 1 && width % (16 / sizeof(T)) == 0 && aligned(m.data, m.row * sizeof(T), 16));
}

} // namespace sfr

// T is the type of y, G that of gamma and beta: T or float.
#define SFR_DISPATCH_PAIR(dtype, vector_dtype, T, G, ...)                                                              \
    SFR_DISPATCH(dtype, T, {                                                                                           \
        if ((vector_dtype) == sfr::FLOAT32) {                                                                          \
            using G = float;                                                                                           \
            __VA_ARGS__;                                                                                               \
        } else if ((vector_dtype) == (dtype)) {                                                                        \
            using G = T;                                                                                               \
            __VA_ARGS__;                                                                                               \
        }                                                                                                              \
        return cudaErrorInvalidValue;                                                                                  \
    })

SFR_API sfr_norm_act(void *y, int dtype, int64_t y_row, int64_t y_col, const void *gamma, const void *beta,
                     int vector_dtype, const float *row_bias, const int32_t *row_index, const void *residual,
                     int64_t residual_row, int64_t residual_col, void *out, float *mean, float *rstd, int64_t n,
                     int width, float eps, int threads, void *stream) {
    if (n == 0) return cudaSuccess;
    SFR_DISPATCH_PAIR(dtype, vector_dtype, T, G, {
        constexpr int VECTOR = 16 / sizeof(T);
        const sfr::NormAct<T, G> a{{static_cast<T *>(y), y_row, y_col},
                                   static_cast<const G *>(gamma),
                                   static_cast<const G *>(beta),
                                   row_bias,
                                   row_index,
                                   {static_cast<const T *>(residual), residual_row, residual_col},
                                   static_cast<T *>(out),
                                   mean,
                                   rstd,
                                   width,
                                   eps};
        const dim3 grid(static_cast<unsigned>(n));
        const bool vectors = sfr::whole(a.y, width) && sfr::whole(a.residual, width) && sfr::aligned(gamma, 16, 16) &&
                             sfr::aligned(beta, 16, 16) && sfr::aligned(row_bias, 16, 16) && sfr::aligned(out, 16, 16);
        const bool one = width <= threads * VECTOR;
        if (vectors && one)
            return SFR_LAUNCH((sfr::norm_act_kernel<T, G, VECTOR, true, true>), grid, threads, 0, stream, a);
        if (vectors)
            return SFR_LAUNCH((sfr::norm_act_kernel<T, G, VECTOR, true, false>), grid, threads, 0, stream, a);
        return SFR_LAUNCH((sfr::norm_act_kernel<T, G, VECTOR, false, false>), grid, threads, 0, stream, a);
    })
}

SFR_API sfr_norm_act_backward(const void *dout, int dtype, int64_t dout_row, int64_t dout_col, const void *y,
                              int64_t y_row, int64_t y_col, const void *gamma, const void *beta, int vector_dtype,
                              const float *mean, const float *rstd, float *moments, void *dy, int64_t dy_row,
                              int64_t dy_col, float *partial, int sum_dy, int64_t n, int width, int parts, int rows,
                              int threads, void *stream) {
    if (n == 0) return cudaSuccess;
    SFR_DISPATCH_PAIR(dtype, vector_dtype, T, G, {
        constexpr int VECTOR = 16 / sizeof(T);
        sfr::NormActBackward<T, G> a{{static_cast<const T *>(dout), dout_row, dout_col},
                                     {static_cast<const T *>(y), y_row, y_col},
                                     static_cast<const G *>(gamma),
                                     static_cast<const G *>(beta),
                                     mean,
                                     rstd,
                                     moments,
                                     {static_cast<T *>(dy), dy_row, dy_col},
                                     partial,
                                     n,
                                     width,
                                     rows};
        const bool vectors = sfr::whole(a.dout, width) && sfr::whole(a.y, width) && sfr::whole(a.dy, width) &&
                             sfr::aligned(gamma, 16, 16) && sfr::aligned(beta, 16, 16);
        const dim3 grid(parts, (width + threads * VECTOR - 1) / (threads * VECTOR));
        if (grid.y == 1) a.moments = nullptr;
        if (a.moments != nullptr) {
            const dim3 all(static_cast<unsigned>(n));
            const int error =
                vectors ? SFR_LAUNCH((sfr::moments_kernel<T, G, VECTOR, true>), all, threads, 0, stream, a)
                        : SFR_LAUNCH((sfr::moments_kernel<T, G, VECTOR, false>), all, threads, 0, stream, a);
            if (error != cudaSuccess) return error;
        }
        if (vectors && sum_dy)
            return SFR_LAUNCH((sfr::norm_act_backward_kernel<T, G, VECTOR, true, true>), grid, threads, 0, stream, a);
        if (vectors)
            return SFR_LAUNCH((sfr::norm_act_backward_kernel<T, G, VECTOR, true, false>), grid, threads, 0, stream, a);
        if (sum_dy)
            return SFR_LAUNCH((sfr::norm_act_backward_kernel<T, G, VECTOR, false, true>), grid, threads, 0, stream, a);
        return SFR_LAUNCH((sfr::norm_act_backward_kernel<T, G, VECTOR, false, false>), grid, threads, 0, stream, a);
    })
}
