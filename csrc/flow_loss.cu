// The flow loss and its gradients in one call: the velocity head over the leaves (DESIGN sections 1 and 2), as
// ops/velocity_head.py has it, with nothing of Python between the launches. Products are cuBLAS's, by way of a pointer
// that the caller brings: this library links no other.

#include "launchers.h"
#include "types.cuh"

#define SFR_TRY(...)                                                                                                   \
    if (const int error = (__VA_ARGS__)) return error

namespace sfr {

constexpr int THREADS = 256;

// rows: x += bias, and where there is `silu` SiLU(x); `again` gets what the next step reads once more.
template <typename T, typename B>
__global__ void __launch_bounds__(THREADS) add_bias_kernel(T *x, const B *bias, T *silu, T *again, int64_t n, int width) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n * width) return;
    T z = from_float<T>(to_float(x[i]) + to_float(bias[i % width]));
    x[i] = z;
    if (silu != nullptr) {
        const float gate = to_float(z);
        silu[i] = z = from_float<T>(gate / (1.0f + expf(-gate)));
    }
    if (again != nullptr) again[i] = z;
}

// Each row of out is the bias: what a product is then added to.
template <typename T, bool WHOLE>
__global__ void __launch_bounds__(THREADS) fill_rows_kernel(T *out, const T *bias, int width) {
    constexpr int VECTOR = 16 / sizeof(T);
    for (int first = threadIdx.x * VECTOR; first < width; first += THREADS * VECTOR) {
        float b[VECTOR];
        load_columns<VECTOR, WHOLE>(bias, 1, first, width, b);
        store_columns<VECTOR, WHOLE>(out + static_cast<int64_t>(blockIdx.x) * width, 1, first, width, b);
    }
}

template <typename T, typename B>
int add_bias(T *x, const B *bias, T *silu, T *again, int64_t n, int width, void *stream) {
    const dim3 grid(static_cast<unsigned>((n * width + THREADS - 1) / THREADS));
    return SFR_LAUNCH((add_bias_kernel<T, B>), grid, THREADS, 0, stream, x, bias, silu, again, n, width);
}

template <typename T> int fill_rows(T *out, const T *bias, int64_t n, int width, void *stream) {
    const dim3 grid(static_cast<unsigned>(n));
    if (width % (16 / sizeof(T)) == 0 && aligned(out, 16, 16) && aligned(bias, 16, 16))
        return SFR_LAUNCH((fill_rows_kernel<T, true>), grid, THREADS, 0, stream, out, bias, width);
    return SFR_LAUNCH((fill_rows_kernel<T, false>), grid, THREADS, 0, stream, out, bias, width);
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
    const auto at = [&](int k) { return static_cast<T *>(f.work[k]); };
    const auto param = [&](int k) { return static_cast<const T *>(f.params[k]); };
    T *x_t = at(0), *v = at(1), *s = at(2), *z = at(3), *silu = at(4), *tau = at(5);
    float *table = static_cast<float *>(f.work[6]), *partial = static_cast<float *>(f.work[7]);
    float *moments = static_cast<float *>(f.work[8]);
    const int64_t Md = static_cast<int64_t>(M) * d, MF = static_cast<int64_t>(M) * F;
    T *again = parts == 2 ? s + Md : nullptr;
    const T *w_1 = param(0), *w_2 = param(2), *w_x = param(4), *w_tau = w_x + d, *w_h = w_x + 2 * d;
    const T *w_out = param(4 * layers + 4), *b_out = param(4 * layers + 5);

    // τ, by way of F columns, and the table of row biases: M rows
    SFR_TRY(sfr_sinusoid(f.times, s, dtype, M, d, f.time_scale, stream));
    if (again != nullptr) SFR_TRY(sfr_sinusoid(f.times, again, dtype, M, d, f.time_scale, stream));
    SFR_TRY(mm(false, true, M, F, d, 1.0f, s, d, w_1, d, 0.0f, z, F));
    SFR_TRY(add_bias(z, param(1), silu, parts == 2 ? silu + MF : nullptr, M, F, stream));
    SFR_TRY(mm(false, true, M, d, F, 1.0f, silu, F, w_2, F, 0.0f, tau, d));
    SFR_TRY(add_bias<T, T>(tau, param(3), nullptr, parts == 2 ? tau + Md : nullptr, M, d, stream));
    SFR_TRY(mm(false, true, M, D, d, 1.0f, tau, d, w_tau, ld, 0.0f, table, D));
    SFR_TRY((add_bias<float, T>(table, param(5), nullptr, nullptr, M, D, stream)));

    SFR_TRY(sfr_flow_path(x_t, dtype, f.targets, f.targets_dtype, f.target_stride, f.times, f.noise_id, f.anchor,
                          f.time_index, f.seed, f.target_scale, f.source_std, n, d, stream));
    const auto layer = [&](int l) {
        void *const *w = f.work + 12 + 4 * l;
        const void *const *p = f.params + 4 + 4 * l;
        return Layer<T>{static_cast<T *>(w[0]), static_cast<T *>(w[1]), static_cast<float *>(w[2]),
                        static_cast<float *>(w[3]), static_cast<const T *>(p[0]), static_cast<const T *>(p[1]),
                        p[2], p[3], f.vectors == nullptr ? nullptr : static_cast<T *>(f.matrices[2 + l])};
    };
    for (int l = 0; l < layers; ++l) {
        const Layer<T> k = layer(l);
        if (l == 0) {
            SFR_TRY(mm(false, true, n, D, H, f.hidden_scale, static_cast<const T *>(f.h), H, w_h, ld, 0.0f, k.y, D));
            SFR_TRY(mm(false, true, n, D, d, 1.0f, x_t, d, w_x, ld, 1.0f, k.y, D));
        } else {
            SFR_TRY(fill_rows(k.y, k.bias, n, D, stream));
            SFR_TRY(mm(false, true, n, D, D, 1.0f, layer(l - 1).a, D, k.weight, D, 1.0f, k.y, D));
        }
        SFR_TRY(sfr_norm_act(k.y, dtype, D, 1, k.gamma, k.beta, G, l ? nullptr : table, l ? nullptr : f.time_index,
                             l ? layer(l - 1).a : nullptr, D, 1, k.a, k.mean, k.rstd, n, D, f.eps, f.act_threads,
                             stream));
    }
    T *a = layer(layers - 1).a;
    SFR_TRY(fill_rows(v, b_out, n, d, stream));
    SFR_TRY(mm(false, true, n, d, D, 1.0f, a, D, w_out, D, 1.0f, v, d));
    SFR_TRY(sfr_flow_mse(v, dtype, d, 1, f.coefficient, f.loss, partial, f.targets, f.targets_dtype, f.target_stride,
                         f.noise_id, f.anchor, f.seed, f.target_scale, f.source_std, n, d, f.parts, f.rows,
                         f.mse_threads, stream));

    // v holds dv; the gradient of the last activation takes that activation's place
    const bool need = f.vectors != nullptr;
    float *layer_vectors = need ? f.vectors + F + d : nullptr; // after those of b_1 and b_2
    if (need) {
        float *tail = layer_vectors + 3 * static_cast<int64_t>(D) * layers;
        SFR_TRY(sfr_column_sum(partial, FLOAT32, tail, 1, f.parts, d, stream));
        SFR_TRY(mm(true, false, d, D, n, 1.0f, v, d, a, D, 0.0f, static_cast<T *>(f.matrices[2 + layers]), D));
    }
    T *da = a;
    SFR_TRY(mm(false, false, n, D, d, 1.0f, v, d, w_out, D, 0.0f, da, D));
    for (int l = layers - 1; l >= 0; --l) {
        const Layer<T> k = layer(l);
        SFR_TRY(sfr_norm_act_backward(da, dtype, D, 1, k.y, D, 1, k.gamma, k.beta, G, k.mean, k.rstd, moments, k.y, D, 1,
                                      partial, l > 0, n, D, f.parts, f.rows, f.back_threads, stream));
        if (need) {
            float *to = layer_vectors + 3 * static_cast<int64_t>(D) * l; // Σ dy, dγ, dβ
            SFR_TRY(sfr_column_sum(partial, FLOAT32, to + D, 2, f.parts, D, stream));
            if (l > 0) SFR_TRY(sfr_column_sum(partial + 2LL * f.parts * D, FLOAT32, to, 1, f.parts, D, stream));
        }
        if (l == 0) break;
        if (need)
            SFR_TRY(mm(true, false, D, D, n, 1.0f, k.y, D, layer(l - 1).a, D, 0.0f, k.d_weight, D));
        SFR_TRY(mm(false, false, n, D, D, 1.0f, k.y, D, k.weight, D, 1.0f, da, D));
    }
    const T *dy = layer(0).y;
    if (need) {
        T *d_x = static_cast<T *>(f.matrices[2]), *d_tau = d_x + d, *d_h = d_x + 2 * d;
        SFR_TRY(mm(true, false, D, d, n, 1.0f, dy, D, x_t, d, 0.0f, d_x, ld));
        SFR_TRY(mm(true, false, D, H, n, f.hidden_scale, dy, D, static_cast<const T *>(f.h), H, 0.0f, d_h, ld));
        // a sum over many rows goes on in two parts of 16 bit, or in float32
        float *dtable = table, *wide = static_cast<float *>(f.work[9]);
        int32_t *order = static_cast<int32_t *>(f.work[10]);
        T *split = at(11);
        const int64_t rows = static_cast<int64_t>(parts) * M;
        SFR_TRY(sfr_sum_by_index(dy, dtype, D, 1, f.time_index, order, order + n, dtable, static_cast<int>(n), D, M,
                                 stream));
        SFR_TRY(sfr_column_sum(dtable, FLOAT32, layer_vectors, 1, M, D, stream));
        SFR_TRY(sfr_split(dtable, nullptr, split, dtype, static_cast<int64_t>(M) * D, 0, stream));
        SFR_TRY(mm(true, false, D, d, rows, 1.0f, split, D, tau, d, 0.0f, d_tau, ld));
        SFR_TRY(mm(false, false, rows, d, D, 1.0f, split, D, w_tau, ld, 0.0f, wide, d));
        SFR_TRY(sfr_column_sum(wide, FLOAT32, f.vectors + F, 1, rows, d, stream));
        SFR_TRY(sfr_split(wide, nullptr, split, dtype, Md, parts == 2, stream));
        SFR_TRY(mm(true, false, d, F, rows, 1.0f, split, d, silu, F, 0.0f, static_cast<T *>(f.matrices[1]), F));
        SFR_TRY(mm(false, false, rows, F, d, 1.0f, split, d, w_2, F, 0.0f, wide, F));
        SFR_TRY(sfr_split(wide, z, split, dtype, MF, parts == 2, stream));
        SFR_TRY(mm(true, false, F, d, rows, 1.0f, split, F, s, d, 0.0f, static_cast<T *>(f.matrices[0]), d));
        SFR_TRY(sfr_column_sum(split, dtype, f.vectors, 1, rows, F, stream));
    }
    if (f.dh != nullptr)
        SFR_TRY(mm(false, false, n, H, D, f.hidden_scale, dy, D, w_h, ld, f.add_to_dh ? 1.0f : 0.0f,
                   static_cast<T *>(f.dh), H));
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
