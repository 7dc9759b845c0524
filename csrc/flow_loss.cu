// The flow loss and its gradients in one call: the velocity head over the leaves (DESIGN sections 1 and 2), as
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

template <typename T> struct Layer {
    T *y, *a;
    float *mean, *rstd;
    const T *weight, *bias;
    const void *gamma, *beta;
    T *d_weight;
};

template <typename T> int run(const FlowLoss &f, int dtype) {
    const Products<T> mm{f.gemm, f.handle};
    void *const stream = f.stream;
    const int64_t n = f.n, H = f.hidden, ld = 2 * f.d + f.hidden;
    const int d = f.d, F = f.inner, D = f.width, M = f.num_times, layers = f.layers, G = f.gain_dtype;
    const int parts = sizeof(T) == 2 ? 2 : 1; // of float32 in the products of the time's backward
    const int64_t nd = f.d_row, nD = f.width_row, partial_d = (d + 3) / 4 * 4, partial_D = (D + 3) / 4 * 4; // rows
    const auto at = [&](int k) { return static_cast<T *>(f.work[k]); };
    const auto param = [&](int k) { return static_cast<const T *>(f.params[k]); };
    T *x_t = at(0), *v = at(1), *u = at(2), *s = at(3), *z = at(4), *silu = at(5), *tau = at(6);
    float *table = static_cast<float *>(f.work[7]), *partial = static_cast<float *>(f.work[8]);
    float *moments = static_cast<float *>(f.work[9]), *wide = static_cast<float *>(f.work[10]);
    const int64_t Md = static_cast<int64_t>(M) * d, MF = static_cast<int64_t>(M) * F;
    const T *h = static_cast<const T *>(f.h);
    const T *w_1 = param(0), *w_2 = param(2), *w_x = param(4), *w_tau = w_x + d, *w_h = w_x + 2 * d;
    const T *w_out = param(4 * layers + 4), *b_out = param(4 * layers + 5);

    // τ, by way of F columns, and the table of row biases but b: M rows
    SFR_TRY(sfr_sinusoid(f.times, s, dtype, M, parts, d, f.time_scale, stream));
    SFR_TRY(mm(false, true, M, F, d, 1.0f, s, d, w_1, d, 0.0f, wide, F));
    SFR_TRY(add_bias(wide, param(1), z, silu, parts == 2 ? silu + MF : nullptr, M, F, stream));
    SFR_TRY(mm(false, true, M, d, F, 1.0f, silu, F, w_2, F, 0.0f, wide, d));
    SFR_TRY(add_bias<T>(wide, param(3), tau, nullptr, parts == 2 ? tau + Md : nullptr, M, d, stream));
    SFR_TRY(mm(false, true, M, D, d, 1.0f, tau, d, w_tau, ld, 0.0f, table, partial_D));

    SFR_TRY(sfr_flow_path(x_t, u, dtype, nd, f.targets, f.targets_dtype, f.target_row, f.times, f.noise_id, f.anchor,
                          f.time_index, f.seed, f.target_scale, f.source_std, n, d, stream));
    const auto layer = [&](int l) {
        void *const *w = f.work + 13 + 4 * l;
        const void *const *p = f.params + 4 + 4 * l;
        return Layer<T>{static_cast<T *>(w[0]), static_cast<T *>(w[1]), static_cast<float *>(w[2]),
                        static_cast<float *>(w[3]), static_cast<const T *>(p[0]), static_cast<const T *>(p[1]),
                        p[2], p[3], f.vectors == nullptr ? nullptr : static_cast<T *>(f.matrices[2 + l])};
    };
    for (int l = 0; l < layers; ++l) {
        const Layer<T> k = layer(l);
        if (l == 0) {
            SFR_TRY(mm(false, true, n, D, H, f.hidden_scale, h, f.h_row, w_h, ld, 0.0f, k.y, nD));
            SFR_TRY(mm(false, true, n, D, d, 1.0f, x_t, nd, w_x, ld, 1.0f, k.y, nD));
        } else {
            SFR_TRY(mm(false, true, n, D, D, 1.0f, layer(l - 1).a, nD, k.weight, D, 0.0f, k.y, nD));
        }
        SFR_TRY(sfr_norm_act(k.y, dtype, nD, 1, k.bias, k.gamma, k.beta, G, l ? nullptr : table, partial_D,
                             f.time_index, l ? layer(l - 1).a : nullptr, nD, 1, k.a, nD, k.mean, k.rstd, n, D, f.eps,
                             f.act_threads, stream));
    }
    T *a = layer(layers - 1).a;
    SFR_TRY(mm(false, true, n, d, D, 1.0f, a, nD, w_out, D, 0.0f, v, nd));
    SFR_TRY(sfr_flow_mse(v, dtype, nd, 1, u, nd, 1, b_out, f.coefficient, f.loss, partial, partial_d, n, d, f.mse_parts,
                         f.mse_rows, f.mse_threads, stream));

    // v holds dv; the gradient of the last activation takes that activation's place
    const bool need = f.vectors != nullptr;
    float *layer_vectors = need ? f.vectors + F + d : nullptr; // after those of b_1 and b_2
    if (need) {
        float *tail = layer_vectors + 3 * static_cast<int64_t>(D) * layers;
        SFR_TRY(sfr_column_sum(partial, FLOAT32, partial_d, tail, 1, f.mse_parts, d, stream));
        SFR_TRY(mm(true, false, d, D, n, 1.0f, v, nd, a, nD, 0.0f, static_cast<T *>(f.matrices[2 + layers]), D));
    }
    T *da = a;
    SFR_TRY(mm(false, false, n, D, d, 1.0f, v, nd, w_out, D, 0.0f, da, nD));
    for (int l = layers - 1; l >= 0; --l) {
        const Layer<T> k = layer(l);
        const bool sum_dy = l > 0 || M == 1; // else it is summed for each time
        SFR_TRY(sfr_norm_act_backward(da, dtype, nD, 1, k.y, nD, 1, l ? k.bias : nullptr, k.gamma, k.beta, G, k.mean,
                                      k.rstd, moments, k.y, nD, 1, partial, partial_D, sum_dy, n, D, f.back_parts,
                                      f.back_rows, f.back_threads, stream));
        if (need) {
            float *to = layer_vectors + 3 * static_cast<int64_t>(D) * l; // Σ dy, dγ, dβ
            SFR_TRY(sfr_column_sum(partial, FLOAT32, partial_D, sum_dy ? to : to + D, sum_dy ? 3 : 2, f.back_parts, D,
                                   stream));
        }
        if (l == 0) break;
        if (need)
            SFR_TRY(mm(true, false, D, D, n, 1.0f, k.y, nD, layer(l - 1).a, nD, 0.0f, k.d_weight, D));
        SFR_TRY(mm(false, false, n, D, D, 1.0f, k.y, nD, k.weight, D, 1.0f, da, nD));
    }
    const T *dy = layer(0).y;
    if (need) {
        T *d_x = static_cast<T *>(f.matrices[2]), *d_tau = d_x + d, *d_h = d_x + 2 * d;
        SFR_TRY(mm(true, false, D, d, n, 1.0f, dy, nD, x_t, nd, 0.0f, d_x, ld));
        SFR_TRY(mm(true, false, D, H, n, f.hidden_scale, dy, nD, h, f.h_row, 0.0f, d_h, ld));
        // a sum over many rows goes on in two parts of 16 bit, or in float32
        float *dtable = table;
        T *split = at(12);
        const int64_t rows = static_cast<int64_t>(parts) * M;
        if (M == 1) {
            dtable = layer_vectors;
        } else {
            int32_t *order = static_cast<int32_t *>(f.work[11]), *bounds = order + n;
            SFR_TRY(sfr_group(f.time_index, order, bounds, bounds + M + 1, static_cast<int>(n), M, stream));
            SFR_TRY(sfr_sum_by_index(dy, dtype, nD, 1, f.time_index, order, bounds, partial, dtable,
                                     static_cast<int>(n), D, M, f.back_parts, f.back_rows, f.back_threads, stream));
            SFR_TRY(sfr_column_sum(dtable, FLOAT32, D, layer_vectors, 1, M, D, stream));
        }
        SFR_TRY(sfr_split(dtable, nullptr, split, dtype, static_cast<int64_t>(M) * D, 0, stream));
        SFR_TRY(mm(true, false, D, d, rows, 1.0f, split, D, tau, d, 0.0f, d_tau, ld));
        SFR_TRY(mm(false, false, rows, d, D, 1.0f, split, D, w_tau, ld, 0.0f, wide, d));
        SFR_TRY(sfr_column_sum(wide, FLOAT32, d, f.vectors + F, 1, rows, d, stream));
        SFR_TRY(sfr_split(wide, nullptr, split, dtype, Md, parts == 2, stream));
        SFR_TRY(mm(true, false, d, F, rows, 1.0f, split, d, silu, F, 0.0f, static_cast<T *>(f.matrices[1]), F));
        SFR_TRY(mm(false, false, rows, F, d, 1.0f, split, d, w_2, F, 0.0f, wide, F));
        SFR_TRY(sfr_split(wide, z, split, dtype, MF, parts == 2, stream));
        SFR_TRY(mm(true, false, F, d, rows, 1.0f, split, F, s, d, 0.0f, static_cast<T *>(f.matrices[0]), d));
        SFR_TRY(sfr_column_sum(split, dtype, F, f.vectors, 1, rows, F, stream));
    }
    if (f.dh != nullptr)
        SFR_TRY(mm(false, false, n, H, D, f.hidden_scale, dy, nD, w_h, ld, f.add_to_dh ? 1.0f : 0.0f,
                   static_cast<T *>(f.dh), f.dh_row));
    return cudaSuccess;
}

} // namespace sfr

// In float32 or bfloat16. n > 0.
SFR_API sfr_flow_loss(const void *arguments, int dtype) {
    const sfr::FlowLoss &f = *static_cast<const sfr::FlowLoss *>(arguments);
    if (dtype == sfr::FLOAT32) return sfr::run<float>(f, dtype);
    if (dtype == sfr::BFLOAT16) return sfr::run<__nv_bfloat16>(f, dtype);
    return cudaErrorInvalidValue;
}

#ifdef SFR_EMULATION
// cublasGemmEx on the CPU, columns first, for float32 and bfloat16.
SFR_API sfr_emulated_gemm(void *, int transa, int transb, int m, int n, int k, const void *alpha, const void *a,
                          int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c,
                          int c_type, int ldc, int, int) {
    const auto get = [](const void *at, int type, int64_t i) {
        return type == 0 ? static_cast<const float *>(at)[i]
                         : __bfloat162float(static_cast<const __nv_bfloat16 *>(at)[i]);
    };
    const float scale = *static_cast<const float *>(alpha), add = *static_cast<const float *>(beta);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
            float sum = 0.0f;
            for (int64_t l = 0; l < k; ++l)
                sum += get(a, a_type, transa ? l + i * lda : i + l * lda) *
                       get(b, b_type, transb ? j + l * ldb : l + j * ldb);
            sum *= scale;
            if (add != 0.0f) sum += add * get(c, c_type, i + j * ldc);
            if (c_type == 0)
                static_cast<float *>(c)[i + j * ldc] = sum;
            else
                static_cast<__nv_bfloat16 *>(c)[i + j * ldc] = __float2bfloat16_rn(sum);
        }
    return 0;
}
#endif
