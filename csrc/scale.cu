// What backward does with the gradients that forward left, and the split of float32 into two parts of 16 bit:
//
//     scale: out = factor · x      scale in place: nothing is read where the factor is 1
//     scatter: out[token] = factor · x[token_row[token]], zero where there is no such row
//     split: x ← Σ parts of x (· SiLU'(z))      hi = round(x)      lo = round(x − hi)

#include "launchers.h"
#include "sigmoid.cuh"
#include "types.cuh"

namespace sfr {

constexpr int THREADS = 256, VECTOR = 8;
static_assert(THREADS % 32 == 0 && VECTOR * 2 == 16, "whole warps; 16 bytes of the smallest type");

template <typename T, typename O, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) scale_kernel(const T *x, const float *factor, O *out, int64_t numel) {
    const float f = *factor;
    if (static_cast<const void *>(x) == static_cast<const void *>(out) && f == 1.0f) return;
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS * VECTOR;
    for (int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR; first < numel;
         first += step) {
        float v[VECTOR];
        const int left = numel - first < VECTOR ? static_cast<int>(numel - first) : VECTOR;
        if (ALIGNED && left == VECTOR) {
            load_columns<VECTOR, true>(x + first, 1, 0, VECTOR, v);
        } else {
            load_columns<VECTOR, false>(x + first, 1, 0, left, v);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) v[i] *= f;
        if (ALIGNED && left == VECTOR) {
            store_columns<VECTOR, true>(out + first, 1, 0, VECTOR, v);
        } else {
            store_columns<VECTOR, false>(out + first, 1, 0, left, v);
        }
    }
}

template <typename T, typename O, bool WHOLE>
__global__ void __launch_bounds__(THREADS)
    scatter_rows_kernel(const T *x, const float *factor, const int32_t *token_row, O *out, int n, int width) {
    const int64_t token = blockIdx.x;
    const int row = token_row[token];
    const bool here = row >= 0 && row < n;
    const float f = here ? *factor : 0.0f;
    for (int first = threadIdx.x * VECTOR; first < width; first += THREADS * VECTOR) {
        float v[VECTOR] = {};
        if (here) load_columns<VECTOR, WHOLE>(x + static_cast<int64_t>(row) * width, 1, first, width, v);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) v[i] = here ? v[i] * f : 0.0f;
        store_columns<VECTOR, WHOLE>(out + token * width, 1, first, width, v);
    }
}

template <typename T, bool SPLIT>
__global__ void __launch_bounds__(THREADS)
    split_kernel(const float *x, const T *z, T *out, int64_t numel, bool two_parts) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= numel) return;
    float value = x[i];
    if (two_parts) value += x[numel + i];
    if (z != nullptr) {
        const float gate = to_float(z[i]), sigma = sigmoid(gate);
        value *= sigma * (1.0f + gate * (1.0f - sigma));
    }
    const T hi = from_float<T>(value);
    out[i] = hi;
    if (SPLIT) out[numel + i] = from_float<T>(value - to_float(hi));
}

} // namespace sfr

// x and out contiguous; out may be x. At most `blocks` blocks.
SFR_API sfr_scale(const void *x, int dtype, const float *factor, void *out, int out_dtype, int64_t numel, int blocks,
                  void *stream) {
    if (numel == 0) return cudaSuccess;
    const int64_t chunk = sfr::THREADS * sfr::VECTOR, wanted = (numel + chunk - 1) / chunk;
    const dim3 grid(static_cast<unsigned>(wanted < blocks ? wanted : blocks));
    SFR_DISPATCH(dtype, T, SFR_DISPATCH(out_dtype, O, {
                     const T *from = static_cast<const T *>(x);
                     O *to = static_cast<O *>(out);
                     SFR_BOOL((sfr::aligned(x, 16, 16) && sfr::aligned(out, 16, 16)), ALIGNED,
                              return SFR_LAUNCH((sfr::scale_kernel<T, O, ALIGNED>), grid, sfr::THREADS, 0, stream,
                                                from, factor, to, numel))
                 }))
    return cudaErrorInvalidValue;
}

SFR_API sfr_scatter_rows(const sfr::ScatterRowsArguments &f, int dtype, void *stream) {
    if (f.tokens == 0 || f.width == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(f.tokens));
    const bool whole = f.width % sfr::VECTOR == 0 && sfr::aligned(f.x, 16, 16) && sfr::aligned(f.out, 16, 16);
    SFR_DISPATCH(dtype, T, SFR_DISPATCH(f.out_dtype, O, {
                     const T *from = static_cast<const T *>(f.x);
                     O *to = static_cast<O *>(f.out);
                     SFR_BOOL(whole, WHOLE,
                              return SFR_LAUNCH((sfr::scatter_rows_kernel<T, O, WHOLE>), grid, sfr::THREADS, 0, stream,
                                                from, f.factor, f.token_row, to, f.n, f.width))
                 }))
    return cudaErrorInvalidValue;
}

SFR_API sfr_split(const float *x, const void *z, void *out, int dtype, int64_t numel, int two_parts, void *stream) {
    if (numel == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>((numel + sfr::THREADS - 1) / sfr::THREADS));
    SFR_DISPATCH(dtype, T,
                 return SFR_LAUNCH((sfr::split_kernel<T, sizeof(T) == 2>), grid, sfr::THREADS, 0, stream, x,
                                   static_cast<const T *>(z), static_cast<T *>(out), numel, two_parts != 0))
    return cudaErrorInvalidValue;
}
