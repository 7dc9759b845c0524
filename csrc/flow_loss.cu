// The flow loss and its gradients in one call: the velocity head over the kernels, as
// ops/velocity_head.py has it, with nothing of Python between the launches. Products are cuBLAS's, by way of a pointer
// that the caller brings: this library links no other.

#include "launchers.h"
#include "sigmoid.cuh"
#include "types.cuh"

#define SFR_TRY(...)                                                                                                   \
    if (const int error = (__VA_ARGS__)) return error

namespace sfr {

constexpr int THREADS = 256;

// z = x + bias, rounded once; where there is `silu` SiLU(z); `again` gets what the next step reads once more.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_bias_kernel(const float *x, const T *bias, T *z, T *silu, T *again, int64_t n, int width) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n * width) return;
    T out = from_float<T>(x[i] + to_float(bias[i % width]));
    z[i] = out;
    if (silu != nullptr) {
        const float gate = to_float(out);
        silu[i] = out = from_float<T>(gate * sigmoid(gate));
    }
    if (again != nullptr) again[i] = out;
}

template <typename T>
int add_bias(const float *x, const T *bias, T *z, T *silu, T *again, int64_t n, int width, void *stream) {
    const dim3 grid(static_cast<unsigned>((n * width + THREADS - 1) / THREADS));
    return SFR_LAUNCH((add_bias_kernel<T>), grid, THREADS, 0, stream, x, bias, z, silu, again, n, width);
}

// C (m, n) = alpha · op(A) op(B) + beta · C over k, all row-major; a leading dimension is a row's length in memory.
template <typename T> struct Products {
    Gemm gemm;
    void *handle;
    static constexpr int NORMAL = 0, TRANSPOSED = 1, FLOAT = 0, BFLOAT16_CODE = 14, COMPUTE_32F = 68, DEFAULT = -1;

    template <typename C>
    int operator()(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha, const T *a, int64_t lda, const T *b,
                   int64_t ldb, float beta, C *c, int64_t ldc) const {
        const int type = sizeof(T) == 4 ? FLOAT : BFLOAT16_CODE, out = sizeof(C) == 4 ? FLOAT : BFLOAT16_CODE;
        // column by column, Cᵀ = op(B)ᵀ op(A)ᵀ
        const int error = gemm(handle, tb ? TRANSPOSED : NORMAL, ta ? TRANSPOSED : NORMAL, static_cast<int>(n),
                               static_cast<int>(m), static_cast<int>(k), &alpha, b, type, static_cast<int>(ldb), a,
                               type, static_cast<int>(lda), &beta, c, out, static_cast<int>(ldc), COMPUTE_32F, DEFAULT);
        return error ? cudaErrorUnknown : cudaSuccess;
    }
};

// A layer with its types.
template <typename T> struct Layer {
    const T *weight, *bias;
    const void *gamma, *beta;
    T *y, *a;
    float *mean, *rstd;
    T *d_weight;

    explicit Layer(const FlowLossLayer &f)
        : weight(static_cast<const T *>(f.weight)), bias(static_cast<const T *>(f.bias)), gamma(f.gamma), beta(f.beta),
          y(static_cast<T *>(f.y)), a(static_cast<T *>(f.a)), mean(f.mean), rstd(f.rstd),
          d_weight(static_cast<T *>(f.d_weight)) {}
};

template <typename T> int run(const FlowLossArguments &f, int dtype, void *stream) {
    const Products<T> mm{f.gemm, f.handle};
    const int64_t n = f.n, H = f.hidden, ld = 2 * f.d + f.hidden;
    const int d = f.d, F = f.inner, D = f.width, M = f.num_times, last = f.num_layers - 1;
    const int twice = sizeof(T) == 2 ? 2 : 1; // float32 in the products of the time's backward, as two of 16 bit
    const int64_t nd = f.d_row, nD = f.width_row, partial_d = (d + 3) / 4 * 4, partial_D = (D + 3) / 4 * 4; // rows
    const int64_t Md = static_cast<int64_t>(M) * d, MF = static_cast<int64_t>(M) * F, MD = static_cast<int64_t>(M) * D;
    const auto layer = [&](int l) { return Layer<T>(f.layers[l]); };
    const T *h = static_cast<const T *>(f.h);
    const T *w_1 = static_cast<const T *>(f.w_1), *b_1 = static_cast<const T *>(f.b_1);
    const T *w_2 = static_cast<const T *>(f.w_2), *b_2 = static_cast<const T *>(f.b_2);
    const T *w_x = layer(0).weight, *w_tau = w_x + d, *w_h = w_x + 2 * d;
    const T *w_out = static_cast<const T *>(f.w_out);
    T *x_t = static_cast<T *>(f.x_t), *v = static_cast<T *>(f.v), *split = static_cast<T *>(f.split);
    T *s = static_cast<T *>(f.sinusoid), *gate = static_cast<T *>(f.gate);
    T *silu = static_cast<T *>(f.silu), *tau = static_cast<T *>(f.tau);

    // τ, by way of F columns, and the table of row biases but b: M rows
    SFR_TRY(sfr_sinusoid(f.times, s, dtype, M, twice, d, f.time_scale, stream));
    SFR_TRY(mm(false, true, M, F, d, 1.0f, s, d, w_1, d, 0.0f, f.wide, F));
    SFR_TRY(add_bias(f.wide, b_1, gate, silu, twice == 2 ? silu + MF : nullptr, M, F, stream));
    SFR_TRY(mm(false, true, M, d, F, 1.0f, silu, F, w_2, F, 0.0f, f.wide, d));
    SFR_TRY(add_bias<T>(f.wide, b_2, tau, nullptr, twice == 2 ? tau + Md : nullptr, M, d, stream));
    SFR_TRY(mm(false, true, M, D, d, 1.0f, tau, d, w_tau, ld, 0.0f, f.table, partial_D));

    FlowPathArguments path{};
    path.x_t = x_t, path.u = f.u, path.row = nd;
    path.targets = f.targets, path.targets_dtype = f.targets_dtype, path.target_row = f.target_row;
    path.times = f.times, path.time_index = f.time_index, path.noise_id = f.noise_id, path.anchor = f.anchor;
    path.seed = f.seed, path.target_scale = f.target_scale, path.source_std = f.source_std;
    path.n = n, path.d = d;
    SFR_TRY(sfr_flow_path(path, dtype, stream));
    for (int l = 0; l <= last; ++l) {
        const Layer<T> k = layer(l);
        NormActArguments act{};
        if (l == 0) {
            SFR_TRY(mm(false, true, n, D, H, f.hidden_scale, h, f.h_row, w_h, ld, 0.0f, k.y, nD));
            SFR_TRY(mm(false, true, n, D, d, 1.0f, x_t, nd, w_x, ld, 1.0f, k.y, nD));
            act.row_bias = f.table, act.row_bias_row = partial_D, act.row_index = f.time_index;
        } else {
            const T *before = layer(l - 1).a;
            SFR_TRY(mm(false, true, n, D, D, 1.0f, before, nD, k.weight, D, 0.0f, k.y, nD));
            act.residual = before, act.residual_row = nD, act.residual_col = 1;
        }
        act.y = k.y, act.y_row = nD, act.y_col = 1;
        act.bias = k.bias, act.gamma = k.gamma, act.beta = k.beta, act.vector_dtype = f.vector_dtype;
        act.out = k.a, act.out_row = nD, act.mean = k.mean, act.rstd = k.rstd;
        act.n = n, act.width = D, act.eps = f.eps, act.threads = f.act_threads;
        SFR_TRY(sfr_norm_act(act, dtype, stream));
    }
    T *a = layer(last).a;
    SFR_TRY(mm(false, true, n, d, D, 1.0f, a, nD, w_out, D, 0.0f, v, nd));
    FlowMseArguments mse{};
    mse.v = v, mse.v_row = nd, mse.v_col = 1;
    mse.u = f.u, mse.u_row = nd, mse.u_col = 1;
    mse.bias = f.b_out, mse.coefficient = f.coefficient, mse.loss = f.loss;
    mse.partial = f.partial, mse.partial_row = partial_d;
    mse.n = n, mse.d = d, mse.num_blocks = f.mse_blocks, mse.rows = f.mse_rows, mse.threads = f.mse_threads;
    SFR_TRY(sfr_flow_mse(mse, dtype, stream));

    // v holds dv; the gradient of the last activation takes that activation's place
    const bool need = f.vectors != nullptr;
    float *layer_vectors = need ? f.vectors + F + d : nullptr; // after those of b_1 and b_2
    if (need) {
        float *tail = layer_vectors + 3 * static_cast<int64_t>(D) * f.num_layers;
        SFR_TRY(sfr_column_sum(f.partial, FLOAT32, partial_d, tail, 1, f.mse_blocks, d, stream));
        SFR_TRY(mm(true, false, d, D, n, 1.0f, v, nd, a, nD, 0.0f, static_cast<T *>(f.d_w_out), D));
    }
    T *da = a;
    SFR_TRY(mm(false, false, n, D, d, 1.0f, v, nd, w_out, D, 0.0f, da, nD));
    for (int l = last; l >= 0; --l) {
        const Layer<T> k = layer(l);
        const bool sum_dy = l > 0 || M == 1; // else it is summed for each time
        NormActBackwardArguments back{};
        back.dout = da, back.dout_row = nD, back.dout_col = 1;
        back.y = k.y, back.y_row = nD, back.y_col = 1;
        back.bias = l ? k.bias : nullptr;
        back.gamma = k.gamma, back.beta = k.beta, back.vector_dtype = f.vector_dtype;
        back.mean = k.mean, back.rstd = k.rstd, back.moments = f.moments;
        back.dy = k.y, back.dy_row = nD, back.dy_col = 1;
        back.partial = f.partial, back.partial_row = partial_D, back.sum_dy = sum_dy;
        back.n = n, back.width = D;
        back.num_blocks = f.back_blocks, back.rows = f.back_rows, back.threads = f.back_threads;
        SFR_TRY(sfr_norm_act_backward(back, dtype, stream));
        if (need) {
            float *to = layer_vectors + 3 * static_cast<int64_t>(D) * l; // Σ dy, dγ, dβ
            SFR_TRY(sfr_column_sum(f.partial, FLOAT32, partial_D, sum_dy ? to : to + D, sum_dy ? 3 : 2, f.back_blocks,
                                   D, stream));
        }
        if (l == 0) break;
        if (need)
            SFR_TRY(mm(true, false, D, D, n, 1.0f, k.y, nD, layer(l - 1).a, nD, 0.0f, k.d_weight, D));
        SFR_TRY(mm(false, false, n, D, D, 1.0f, k.y, nD, k.weight, D, 1.0f, da, nD));
    }
    const T *dy = layer(0).y;
    if (need) {
        T *d_x = layer(0).d_weight, *d_tau = d_x + d, *d_h = d_x + 2 * d;
        SFR_TRY(mm(true, false, D, d, n, 1.0f, dy, nD, x_t, nd, 0.0f, d_x, ld));
        SFR_TRY(mm(true, false, D, H, n, f.hidden_scale, dy, nD, h, f.h_row, 0.0f, d_h, ld));
        // a sum over many rows goes on in two parts of 16 bit, or in float32
        float *d_table = M == 1 ? layer_vectors : f.table;
        const int64_t rows = static_cast<int64_t>(twice) * M;
        if (M > 1) {
            SFR_TRY(sfr_group(f.time_index, f.order, f.bounds, f.rank_and_counts, static_cast<int>(n), M, stream));
            SumByIndexArguments sum{};
            sum.x = dy, sum.x_row = nD, sum.x_col = 1;
            sum.index = f.time_index, sum.order = f.order, sum.bounds = f.bounds;
            sum.pieces = f.partial, sum.out = d_table;
            sum.n = static_cast<int>(n), sum.width = D, sum.size = M;
            sum.num_blocks = f.back_blocks, sum.rows = f.back_rows, sum.threads = f.back_threads;
            SFR_TRY(sfr_sum_by_index(sum, dtype, stream));
            SFR_TRY(sfr_column_sum(d_table, FLOAT32, D, layer_vectors, 1, M, D, stream));
        }
        SFR_TRY(sfr_split(d_table, nullptr, split, dtype, MD, 0, stream));
        SFR_TRY(mm(true, false, D, d, rows, 1.0f, split, D, tau, d, 0.0f, d_tau, ld));
        SFR_TRY(mm(false, false, rows, d, D, 1.0f, split, D, w_tau, ld, 0.0f, f.wide, d));
        SFR_TRY(sfr_column_sum(f.wide, FLOAT32, d, f.vectors + F, 1, rows, d, stream));
        SFR_TRY(sfr_split(f.wide, nullptr, split, dtype, Md, twice == 2, stream));
        SFR_TRY(mm(true, false, d, F, rows, 1.0f, split, d, silu, F, 0.0f, static_cast<T *>(f.d_w_2), F));
        SFR_TRY(mm(false, false, rows, F, d, 1.0f, split, d, w_2, F, 0.0f, f.wide, F));
        SFR_TRY(sfr_split(f.wide, gate, split, dtype, MF, twice == 2, stream));
        SFR_TRY(mm(true, false, F, d, rows, 1.0f, split, F, s, d, 0.0f, static_cast<T *>(f.d_w_1), d));
        SFR_TRY(sfr_column_sum(split, dtype, F, f.vectors, 1, rows, F, stream));
    }
    if (f.dh != nullptr)
        SFR_TRY(mm(false, false, n, H, D, f.hidden_scale, dy, nD, w_h, ld, f.add_to_dh ? 1.0f : 0.0f,
                   static_cast<T *>(f.dh), f.dh_row));
    return cudaSuccess;
}

} // namespace sfr

// In float32 or bfloat16. n > 0.
SFR_API sfr_flow_loss(const sfr::FlowLossArguments &f, int dtype, void *stream) {
    if (dtype == sfr::FLOAT32) return sfr::run<float>(f, dtype, stream);
    if (dtype == sfr::BFLOAT16) return sfr::run<__nv_bfloat16>(f, dtype, stream);
    return cudaErrorInvalidValue;
}
