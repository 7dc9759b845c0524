// LayerNorm and SiLU, with the row bias before and the residual after, and their backward:
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

#include "launchers.h"
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
    float *partial; // (3 or 2, row blocks, D): Σ dy if SUM_DY, dγ, dβ; rows `partial_row` apart
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

SFR_API sfr_norm_act(const sfr::NormActArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    SFR_DISPATCH_PAIR(dtype, f.vector_dtype, T, G, {
        constexpr int VECTOR = 16 / sizeof(T);
        sfr::NormAct<T, G> a;
        a.y = {static_cast<T *>(f.y), f.y_row, f.y_col};
        a.bias = static_cast<const T *>(f.bias);
        a.gamma = static_cast<const G *>(f.gamma);
        a.beta = static_cast<const G *>(f.beta);
        a.row_bias = f.row_bias;
        a.bias_row = f.row_bias_row;
        a.row_index = f.row_index;
        a.residual = {static_cast<const T *>(f.residual), f.residual_row, f.residual_col};
        a.out = static_cast<T *>(f.out);
        a.out_row = f.out_row;
        a.mean = f.mean;
        a.rstd = f.rstd;
        a.n = f.n;
        a.width = f.width;
        a.eps = f.eps;
        a.over_width = 1.0f / f.width;
        const bool vectors = sfr::aligned(a.y) && sfr::aligned(a.residual) && sfr::aligned(f.bias, 16, 16) &&
                             sfr::aligned(f.gamma, 16, 16) && sfr::aligned(f.beta, 16, 16) &&
                             sfr::aligned(f.row_bias, f.row_bias_row * sizeof(float), 16) &&
                             sfr::aligned(f.out, f.out_row * sizeof(T), 16);
        if (f.width > f.threads * VECTOR) {
            const dim3 grid(static_cast<unsigned>(f.n));
            SFR_BOOL(vectors, ALIGNED,
                     return SFR_LAUNCH((sfr::norm_act_wide_kernel<T, G, VECTOR, ALIGNED>), grid, f.threads, 0, stream,
                                       a))
        }
        const dim3 grid(sfr::resident_blocks(f.n, f.threads, 768));
        SFR_BOOL(vectors, ALIGNED,
                 return SFR_LAUNCH((sfr::norm_act_kernel<T, G, VECTOR, ALIGNED>), grid, f.threads, 0, stream, a))
    })
}

SFR_API sfr_norm_act_backward(const sfr::NormActBackwardArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    SFR_DISPATCH_PAIR(dtype, f.vector_dtype, T, G, {
        constexpr int VECTOR = 16 / sizeof(T);
        sfr::NormActBackward<T, G> a;
        a.dout = {static_cast<const T *>(f.dout), f.dout_row, f.dout_col};
        a.y = {static_cast<const T *>(f.y), f.y_row, f.y_col};
        a.bias = static_cast<const T *>(f.bias);
        a.gamma = static_cast<const G *>(f.gamma);
        a.beta = static_cast<const G *>(f.beta);
        a.mean = f.mean;
        a.rstd = f.rstd;
        a.dy = {static_cast<T *>(f.dy), f.dy_row, f.dy_col};
        a.partial = f.partial;
        a.partial_row = f.partial_row;
        a.n = f.n;
        a.width = f.width;
        a.rows = f.rows;
        a.over_width = 1.0f / f.width;
        const bool vectors = sfr::aligned(a.dout) && sfr::aligned(a.y) && sfr::aligned(a.dy) &&
                             sfr::aligned(f.bias, 16, 16) && sfr::aligned(f.gamma, 16, 16) &&
                             sfr::aligned(f.beta, 16, 16) &&
                             sfr::aligned(f.partial, f.partial_row * sizeof(float), 16);
        const dim3 grid(f.num_blocks, (f.width + f.threads * VECTOR - 1) / (f.threads * VECTOR));
        a.moments = grid.y == 1 ? nullptr : f.moments;
        if (a.moments != nullptr) {
            const dim3 all(static_cast<unsigned>(f.n));
            const int error =
                vectors ? SFR_LAUNCH((sfr::moments_kernel<T, G, VECTOR, true>), all, f.threads, 0, stream, a)
                        : SFR_LAUNCH((sfr::moments_kernel<T, G, VECTOR, false>), all, f.threads, 0, stream, a);
            if (error != cudaSuccess) return error;
        }
        SFR_BOOL(vectors, ALIGNED,
                 SFR_BOOL(f.sum_dy != 0, SUM_DY,
                          return SFR_LAUNCH((sfr::norm_act_backward_kernel<T, G, VECTOR, ALIGNED, SUM_DY>), grid,
                                            f.threads, 0, stream, a)))
    })
}
