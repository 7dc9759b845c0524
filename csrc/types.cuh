// Element types of the kernels: float32, float16 and bfloat16, all computed with in float32, and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "device.cuh"

namespace sfr {

// As `DTYPES` in leaves/cuda/library.py.
enum DType : int { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// What N bytes are moved as: a structure of N / 2 numbers the compiler would feel free to move one by one.
template <int BYTES> struct Raw;
template <> struct Raw<16> { using type = uint4; };
template <> struct Raw<8> { using type = uint2; };
template <> struct Raw<4> { using type = uint32_t; };

// N numbers side by side in global memory (a load may be from shared memory), aligned to all of them, in one access.
template <int N, typename T> using Packed = typename Raw<N * sizeof(T)>::type;
template <int N, typename T> __device__ inline Packed<N, T> load_packed(const T *at) {
    check_alignment(at, N * sizeof(T));
    return *reinterpret_cast<const Packed<N, T> *>(at);
}

// The numbers in 32 bits.
__device__ inline void unpack(uint32_t bits, float *out, float) { memcpy(out, &bits, sizeof(bits)); }
__device__ inline void unpack(uint32_t bits, float *out, __half) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof(bits));
    out[0] = __low2float(pair), out[1] = __high2float(pair);
}
__device__ inline void unpack(uint32_t bits, float *out, __nv_bfloat16) {
    const uint32_t pair[2] = {bits << 16, bits & 0xFFFF0000u}; // the upper halves of their float32
    memcpy(out, pair, sizeof(pair));
}
template <typename T, int N> __device__ inline void unpack(const Packed<N, T> &packed, float (&out)[N]) {
    constexpr int WORDS = N * sizeof(T) / 4, EACH = 4 / sizeof(T);
    uint32_t words[WORDS];
    memcpy(words, &packed, sizeof(words));
#pragma unroll
    for (int i = 0; i < WORDS; ++i) unpack(words[i], out + i * EACH, T());
}

template <int N, typename T> __device__ inline void load(const T *at, float (&out)[N]) {
    unpack<T>(load_packed<N>(at), out);
}

// The bits of as many numbers as fit 32, rounded.
__device__ inline uint32_t pack(const float *x, float) {
    uint32_t bits;
    memcpy(&bits, x, sizeof(bits));
    return bits;
}
__device__ inline uint32_t pack(const float *x, __half) {
    const __half2 pair = __floats2half2_rn(x[0], x[1]);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}
__device__ inline uint32_t pack(const float *x, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

template <int N, typename T> __device__ inline void store(T *at, const float (&in)[N]) {
    constexpr int WORDS = N * sizeof(T) / 4, EACH = 4 / sizeof(T);
    check_alignment(at, N * sizeof(T));
    uint32_t words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = pack(in + i * EACH, T());
    typename Raw<N * sizeof(T)>::type raw;
    memcpy(&raw, words, sizeof(raw));
    store_global(reinterpret_cast<typename Raw<N * sizeof(T)>::type *>(at), raw);
}

// N numbers of a row from column `first` on, 0 beyond its end. WHOLE: they are side by side, aligned, and all there.
template <int N, bool WHOLE, typename T>
__device__ inline void load_columns(const T *row, int64_t stride, int first, int width, float (&out)[N]) {
    if (WHOLE) {
        constexpr int AT_ONCE = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < N; i += AT_ONCE) {
            float part[AT_ONCE];
            load<AT_ONCE>(row + first + i, part);
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) out[i + j] = part[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = first + i < width ? to_float(row[(first + i) * stride]) : 0.0f;
    }
}

template <int N, bool WHOLE, typename T>
__device__ inline void store_columns(T *row, int64_t stride, int first, int width, const float (&in)[N]) {
    if (WHOLE) {
        constexpr int AT_ONCE = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < N; i += AT_ONCE) {
            float part[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; ++j) part[j] = in[i + j];
            store<AT_ONCE>(row + first + i, part);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (first + i < width) row[(first + i) * stride] = from_float<T>(in[i]);
    }
}

inline bool aligned(const void *at, int64_t stride_bytes, int bytes) {
    return reinterpret_cast<uintptr_t>(at) % bytes == 0 && stride_bytes % bytes == 0;
}

} // namespace sfr

// Runs `...` with T as the type of `dtype`; anything else is the caller's bug.
#define SFR_DISPATCH(dtype, T, ...)                                                                                    \
    switch (dtype) {                                                                                                   \
    case sfr::FLOAT32: {                                                                                               \
        using T = float;                                                                                               \
        __VA_ARGS__;                                                                                                   \
        break;                                                                                                         \
    }                                                                                                                  \
    case sfr::FLOAT16: {                                                                                               \
        using T = __half;                                                                                              \
        __VA_ARGS__;                                                                                                   \
        break;                                                                                                         \
    }                                                                                                                  \
    case sfr::BFLOAT16: {                                                                                              \
        using T = __nv_bfloat16;                                                                                       \
        __VA_ARGS__;                                                                                                   \
        break;                                                                                                         \
    }                                                                                                                  \
    default: return cudaErrorInvalidValue;                                                                             \
    }
