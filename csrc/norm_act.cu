// LayerNorm and SiLU, with the row bias before and the residual after, and their backward (DESIGN section 2):
//
//     y ← y + row_bias[row_index]      x̂ = (y − μ) ρ      z = γ x̂ + β      out = SiLU(z) (+ residual)
//
// A bias that is the same for all rows is added in registers, forward and backward, and y left without it, unless what
// is added comes from a table as well.
//
//     dz = dout σ(z)(1 + z(1 − σ(z)))      q = γ dz      dy = ρ (q − mean(q) − x̂ mean(q x̂))
//     dγ = Σ dz x̂      dβ = Σ dz      Σ dy
//
// A row that fits a block of threads stays in registers. A wider one is read three times forward; backward a first
// kernel leaves mean(q) and mean(q x̂).

#include "reduce.cuh"
#include "sigmoid.cuh"
#include "types.cuh"

namespace sfr {

template <typename T, typename G> struct NormAct {
    Matrix<T> y;
    const T *bias; // (D,), or null: one for all rows
    const G *gamma, *beta;
    const float *row_bias; // (M, D), rows `bias_row` apart, or null
    int64_t bias_row;
    const int32_t *row_index;
    Matrix<const T> residual; // null: none
    T *out;                   // (n, D), rows `out_row` apart
    int64_t out_row;
    float *mean, *rstd; // (n,)
    int64_t n;
    int width;
    float eps, over_width; // 1 / D
};

template <int N> __device__ inline void add(float (&to)[N], const float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] += x[i];
}

// y − μ, and 0 beyond the end of the row.
template <int N> __device__ inline void centre(float (&y)[N], float mean, int first, int width) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] -= mean;
    if (__builtin_expect(first + N <= width, 1)) return; // else the compiler compares for each number of every row
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (first + i >= width) y[i] = 0.0f;
}

// Rows that fit a block: it takes one after another, the vectors in registers, the next row on its way.
template <typename T, typename G, int VECTOR, bool ALIGNED>
__global__ void __launch_bounds__(512, 1) norm_act_kernel(NormAct<T, G> a) {
    const int first = threadIdx.x * VECTOR;
    float bias[VECTOR] = {}, gamma[VECTOR], beta[VECTOR];
    if (a.bias != nullptr) load_columns<VECTOR, ALIGNED>(a.bias, 1, first, a.width, bias);
    load_columns<VECTOR, ALIGNED>(a.gamma, 1, first, a.width, gamma);
    load_columns<VECTOR, ALIGNED>(a.beta, 1, first, a.width, beta);
    Columns<VECTOR, T> next_y, next_residual{};
    int32_t next_index = 0;
    const auto fetch = [&](int64_t row) {
        next_y = fetch_columns<VECTOR, ALIGNED>(a.y.at(row), a.y.col, first, a.width);
        if (a.residual.data != nullptr)
            next_residual = fetch_columns<VECTOR, ALIGNED>(a.residual.at(row), a.residual.col, first, a.width);
        if (a.row_bias != nullptr) next_index = a.row_index[row];
    };
    fetch(blockIdx.x);
    for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x) {
        float y[VECTOR], out[VECTOR], sum[1] = {0.0f};
        next_y.unpack(y);
        if (a.bias != nullptr) add(y, bias);
        if (a.row_bias != nullptr) {
            float b[VECTOR];
            load_columns<VECTOR, ALIGNED>(a.row_bias + next_index * a.bias_row, 1, first, a.width, b);
            add(y, b);
            store_columns<VECTOR, ALIGNED>(a.y.at(row), a.y.col, first, a.width, y);
        }
        next_residual.unpack(out);
        if (row + gridDim.x < a.n) fetch(row + gridDim.x);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[0] += y[i];
        block_sum(sum, 0);
        const float mean = sum[0] * a.over_width;
        sum[0] = 0.0f;
        centre(y, mean, first, a.width);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[0] += y[i] * y[i];
        block_sum(sum, 1);
        const float rstd = reciprocal_root(sum[0] * a.over_width + a.eps);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float z = gamma[i] * (y[i] * rstd) + beta[i];
            out[i] += z * sigmoid(z);
        }
        store_columns<VECTOR, ALIGNED>(a.out + row * a.out_row, 1, first, a.width, out);
        if (threadIdx.x == 0) {
            a.mean[row] = mean;
            a.rstd[row] = rstd;
        }
    }
}

// Wider rows: a block reads its own three times, from cache but the first.
template <typename T, typename G, int VECTOR, bool ALIGNED>
__global__ void __launch_bounds__(512, 2) norm_act_wide_kernel(NormAct<T, G> a) {
    const int64_t row = blockIdx.x;
    const int step = blockDim.x * VECTOR, begin = threadIdx.x * VECTOR;
    const auto read = [&](int first, float(&y)[VECTOR]) {
        float b[VECTOR];
        load_columns<VECTOR, ALIGNED>(a.y.at(row), a.y.col, first, a.width, y);
        if (a.bias != nullptr) {
            load_columns<VECTOR, ALIGNED>(a.bias, 1, first, a.width, b);
            add(y, b);
        }
        if (a.row_bias != nullptr) {
            load_columns<VECTOR, ALIGNED>(a.row_bias + a.row_index[row] * a.bias_row, 1, first, a.width, b);
            add(y, b);
        }
    };
    float y[VECTOR], sum[1] = {0.0f};
    for (int first = begin; first < a.width; first += step) {
        read(first, y);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[0] += y[i];
    }
    block_sum(sum, 0);
    const float mean = sum[0] * a.over_width;
    sum[0] = 0.0f;
    for (int first = begin; first < a.width; first += step) {
        read(first, y);
        centre(y, mean, first, a.width);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[0] += y[i] * y[i];
    }
    block_sum(sum, 1);
    const float rstd = reciprocal_root(sum[0] * a.over_width + a.eps);
    for (int first = begin; first < a.width; first += step) {
        read(first, y);
        if (a.row_bias != nullptr) store_columns<VECTOR, ALIGNED>(a.y.at(row), a.y.col, first, a.width, y);
        float gamma[VECTOR], beta[VECTOR], out[VECTOR] = {};
        load_columns<VECTOR, ALIGNED>(a.gamma, 1, first, a.width, gamma);
        load_columns<VECTOR, ALIGNED>(a.beta, 1, first, a.width, beta);
        if (a.residual.data != nullptr)
            load_columns<VECTOR, ALIGNED>(a.residual.at(row), a.residual.col, first, a.width, out);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float z = gamma[i] * ((y[i] - mean) * rstd) + beta[i];
            out[i] += z * sigmoid(z);
        }
        store_columns<VECTOR, ALIGNED>(a.out + row * a.out_row, 1, first, a.width, out);
    }
    if (threadIdx.x == 0) {
        a.mean[row] = mean;
        a.rstd[row] = rstd;
    }
}

template <typename T, typename G> struct NormActBackward {
    Matrix<const T> dout, y;
    const T *bias; // (D,), or null: what y was left without
    const G *gamma, *beta;
    const float *mean, *rstd; // (n,)
    float *moments;           // (n, 2), where a row is wider than a block
    Matrix<T> dy;
    float *partial; // (3 or 2, parts, D): Σ dy if SUM_DY, dγ, dβ; rows `partial_row` apart
    int64_t partial_row, n;
    int width, rows;
    float over_width; // 1 / D
};

// Some columns of the vectors, and x̂ and dz of a row at them.
template <int VECTOR> struct Gate {
    float bias[VECTOR], gamma[VECTOR], beta[VECTOR];

    template <bool ALIGNED, typename T, typename G>
    __device__ void load(const NormActBackward<T, G> &a, int first) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) bias[i] = 0.0f;
        if (a.bias != nullptr) load_columns<VECTOR, ALIGNED>(a.bias, 1, first, a.width, bias);
        load_columns<VECTOR, ALIGNED>(a.gamma, 1, first, a.width, gamma);
        load_columns<VECTOR, ALIGNED>(a.beta, 1, first, a.width, beta);
    }

    template <typename T>
    __device__ void operator()(const Columns<VECTOR, T> &y, const Columns<VECTOR, T> &dout, float mean, float rstd,
                               float (&x_hat)[VECTOR], float (&dz)[VECTOR]) const {
        y.unpack(x_hat);
        dout.unpack(dz);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            x_hat[i] = (x_hat[i] + bias[i] - mean) * rstd;
            const float z = gamma[i] * x_hat[i] + beta[i], sigma = sigmoid(z);
            dz[i] *= sigma * (1.0f + z * (1.0f - sigma));
        }
    }
};

template <typename T, typename G, int VECTOR, bool ALIGNED>
__global__ void __launch_bounds__(256, 2) moments_kernel(NormActBackward<T, G> a) {
    const int64_t row = blockIdx.x;
    float sum[2] = {0.0f, 0.0f};
    for (int first = threadIdx.x * VECTOR; first < a.width; first += blockDim.x * VECTOR) {
        Gate<VECTOR> gate;
        float x_hat[VECTOR], dz[VECTOR];
        gate.template load<ALIGNED>(a, first);
        gate(fetch_columns<VECTOR, ALIGNED>(a.y.at(row), a.y.col, first, a.width),
             fetch_columns<VECTOR, ALIGNED>(a.dout.at(row), a.dout.col, first, a.width), a.mean[row], a.rstd[row],
             x_hat, dz);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float q = gate.gamma[i] * dz[i];
            sum[0] += q;
            sum[1] += q * x_hat[i];
        }
    }
    block_sum(sum, 0);
    if (threadIdx.x == 0) {
        a.moments[2 * row] = sum[0] * a.over_width;
        a.moments[2 * row + 1] = sum[1] * a.over_width;
    }
}

template <typename T, typename G, int VECTOR, bool ALIGNED, bool SUM_DY>
__global__ void __launch_bounds__(256, 2) norm_act_backward_kernel(NormActBackward<T, G> a) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.rows;
    const int64_t end = begin + a.rows < a.n ? begin + a.rows : a.n;
    float dgamma[VECTOR] = {}, dbeta[VECTOR] = {}, db[VECTOR] = {};
    Gate<VECTOR> gate;
    gate.template load<ALIGNED>(a, first);
    Columns<VECTOR, T> y, dout;
    float next_mean, next_rstd;
    const auto fetch = [&](int64_t row) {
        y = fetch_columns<VECTOR, ALIGNED>(a.y.at(row), a.y.col, first, a.width);
        dout = fetch_columns<VECTOR, ALIGNED>(a.dout.at(row), a.dout.col, first, a.width);
        next_mean = a.mean[row];
        next_rstd = a.rstd[row];
    };
    fetch(begin);
    for (int64_t row = begin; row < end; ++row) {
        float x_hat[VECTOR], dz[VECTOR], mean[2] = {0.0f, 0.0f};
        const float rstd = next_rstd;
        gate(y, dout, next_mean, rstd, x_hat, dz);
        if (row + 1 < end) fetch(row + 1); // on its way while this row is added up
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            dgamma[i] += dz[i] * x_hat[i];
            dbeta[i] += dz[i];
            dz[i] *= gate.gamma[i];
            mean[0] += dz[i];
            mean[1] += dz[i] * x_hat[i];
        }
        if (a.moments == nullptr) {
            block_sum(mean, row & 1);
            mean[0] *= a.over_width;
            mean[1] *= a.over_width;
        } else {
            mean[0] = a.moments[2 * row];
            mean[1] = a.moments[2 * row + 1];
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            dz[i] = rstd * (dz[i] - mean[0] - x_hat[i] * mean[1]);
            if (SUM_DY) db[i] += dz[i];
        }
        store_columns<VECTOR, ALIGNED>(a.dy.at(row), a.dy.col, first, a.width, dz);
    }
    const auto leave = [&](int sum, const float(&from)[VECTOR]) {
        const int64_t part = static_cast<int64_t>(sum) * gridDim.x + blockIdx.x;
        store_columns<VECTOR, ALIGNED>(a.partial + part * a.partial_row, 1, first, a.width, from);
    };
    if (SUM_DY) leave(0, db);
    leave(SUM_DY, dgamma);
    leave(SUM_DY + 1, dbeta);
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

SFR_API sfr_norm_act(void *y, int dtype, int64_t y_row, int64_t y_col, const void *bias, const void *gamma,
                     const void *beta, int vector_dtype, const float *row_bias, int64_t bias_row,
                     const int32_t *row_index, const void *residual, int64_t residual_row, int64_t residual_col,
                     void *out, int64_t out_row, float *mean, float *rstd, int64_t n, int width, float eps, int threads,
                     void *stream) {
    if (n == 0) return cudaSuccess;
    SFR_DISPATCH_PAIR(dtype, vector_dtype, T, G, {
        constexpr int VECTOR = 16 / sizeof(T);
        const sfr::NormAct<T, G> a{{static_cast<T *>(y), y_row, y_col},
                                   static_cast<const T *>(bias),
                                   static_cast<const G *>(gamma),
                                   static_cast<const G *>(beta),
                                   row_bias,
                                   bias_row,
                                   row_index,
                                   {static_cast<const T *>(residual), residual_row, residual_col},
                                   static_cast<T *>(out),
                                   out_row,
                                   mean,
                                   rstd,
                                   n,
                                   width,
                                   eps,
                                   1.0f / width};
        const bool vectors = sfr::aligned(a.y) && sfr::aligned(a.residual) && sfr::aligned(bias, 16, 16) &&
                             sfr::aligned(gamma, 16, 16) && sfr::aligned(beta, 16, 16) &&
                             sfr::aligned(row_bias, bias_row * sizeof(float), 16) &&
                             sfr::aligned(out, out_row * sizeof(T), 16);
        if (width > threads * VECTOR) {
            const dim3 grid(static_cast<unsigned>(n));
            if (vectors)
                return SFR_LAUNCH((sfr::norm_act_wide_kernel<T, G, VECTOR, true>), grid, threads, 0, stream, a);
            return SFR_LAUNCH((sfr::norm_act_wide_kernel<T, G, VECTOR, false>), grid, threads, 0, stream, a);
        }
        const dim3 grid(sfr::resident_blocks(n, threads, 768));
        if (vectors) return SFR_LAUNCH((sfr::norm_act_kernel<T, G, VECTOR, true>), grid, threads, 0, stream, a);
        return SFR_LAUNCH((sfr::norm_act_kernel<T, G, VECTOR, false>), grid, threads, 0, stream, a);
    })
}

SFR_API sfr_norm_act_backward(const void *dout, int dtype, int64_t dout_row, int64_t dout_col, const void *y,
                              int64_t y_row, int64_t y_col, const void *bias, const void *gamma, const void *beta,
                              int vector_dtype, const float *mean, const float *rstd, float *moments, void *dy,
                              int64_t dy_row, int64_t dy_col, float *partial, int64_t partial_row, int sum_dy,
                              int64_t n, int width, int parts, int rows, int threads, void *stream) {
    if (n == 0) return cudaSuccess;
    SFR_DISPATCH_PAIR(dtype, vector_dtype, T, G, {
        constexpr int VECTOR = 16 / sizeof(T);
        sfr::NormActBackward<T, G> a{{static_cast<const T *>(dout), dout_row, dout_col},
                                     {static_cast<const T *>(y), y_row, y_col},
                                     static_cast<const T *>(bias),
                                     static_cast<const G *>(gamma),
                                     static_cast<const G *>(beta),
                                     mean,
                                     rstd,
                                     moments,
                                     {static_cast<T *>(dy), dy_row, dy_col},
                                     partial,
                                     partial_row,
                                     n,
                                     width,
                                     rows,
                                     1.0f / width};
        const bool vectors = sfr::aligned(a.dout) && sfr::aligned(a.y) && sfr::aligned(a.dy) &&
                             sfr::aligned(bias, 16, 16) && sfr::aligned(gamma, 16, 16) && sfr::aligned(beta, 16, 16) &&
                             sfr::aligned(partial, partial_row * sizeof(float), 16);
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
