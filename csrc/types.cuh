// Element types of the kernels: float32, float16 and bfloat16, all computed with in float32, and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "device.cuh"

namespace sfr {

// As `DTYPES` in kernels/cuda.py.
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
    static_assert(sizeof(Packed<N, T>) == N * sizeof(T) && alignof(Packed<N, T>) == N * sizeof(T), "one access");
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
    static_assert(WORDS * EACH == N, "whole words");
    uint32_t words[WORDS];
    memcpy(words, &packed, sizeof(words));
#pragma unroll
    for (int i = 0; i < WORDS; ++i) unpack(words[i], out + i * EACH, T());
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
    static_assert(WORDS * EACH == N, "whole words");
    check_alignment(at, N * sizeof(T));
    uint32_t words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = pack(in + i * EACH, T());
    Packed<N, T> raw;
    memcpy(&raw, words, sizeof(raw));
    store_global(reinterpret_cast<Packed<N, T> *>(at), raw);
}

// N numbers as memory has them, in as few registers.
template <int N, typename T> struct Columns {
    static constexpr int EACH = N * sizeof(T) <= 16 ? N : 16 / sizeof(T); // in one access
    static_assert(N % EACH == 0, "whole accesses");
    Packed<EACH, T> accesses[N / EACH];

    __device__ void unpack(float (&out)[N]) const {
#pragma unroll
        for (int i = 0; i < N / EACH; ++i) {
            float part[EACH];
            sfr::unpack<T>(accesses[i], part);
#pragma unroll
            for (int j = 0; j < EACH; ++j) out[i * EACH + j] = part[j];
        }
    }
};

// N numbers of a row from column `first` on, 0 beyond its end. ALIGNED: they are side by side and the row begins on 16
// bytes, so that only the last few of a row that is no multiple of N are read one by one.
template <int N, bool ALIGNED, typename T>
__device__ inline Columns<N, T> fetch_columns(const T *row, int64_t stride, int first, int width) {
    Columns<N, T> out;
    if (ALIGNED && first + N <= width) {
#pragma unroll
        for (int i = 0; i < N / out.EACH; ++i) out.accesses[i] = load_packed<out.EACH>(row + first + i * out.EACH);
    } else {
        T x[N];
#pragma unroll
        for (int i = 0; i < N; ++i)
            x[i] = first + i < width ? row[(first + i) * (ALIGNED ? 1 : stride)] : from_float<T>(0.0f);
        memcpy(out.accesses, x, sizeof(x));
    }
    return out;
}

template <int N, bool ALIGNED, typename T>
__device__ inline void load_columns(const T *row, int64_t stride, int first, int width, float (&out)[N]) {
    fetch_columns<N, ALIGNED>(row, stride, first, width).unpack(out);
}

template <int N, bool ALIGNED, typename T>
__device__ inline void store_columns(T *row, int64_t stride, int first, int width, const float (&in)[N]) {
    if (ALIGNED && first + N <= width) {
        constexpr int AT_ONCE = Columns<N, T>::EACH;
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
            if (first + i < width) row[(first + i) * (ALIGNED ? 1 : stride)] = from_float<T>(in[i]);
    }
}

template <typename T> struct Matrix {
    T *data;
    int64_t row, col; // strides
    __device__ T *at(int64_t i) const { return data + i * row; }
};

inline bool aligned(const void *at, int64_t stride_bytes, int bytes) {
    return reinterpret_cast<uintptr_t>(at) % bytes == 0 && stride_bytes % bytes == 0;
}

// Blocks for n rows, each taking one after another: as many as the device holds at once, with so many threads on a
// multiprocessor.
inline unsigned resident_blocks(int64_t n, int threads, int on_each) {
    const int64_t most = most_resident(on_each / threads);
    return static_cast<unsigned>(n < most ? n : most);
}

// Whether the rows are for 16-byte accesses.
template <typename T> bool aligned(const Matrix<T> &m) {
    return m.data == nullptr || (m.col == 1 && aligned(m.data, m.row * sizeof(T), 16));
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

// Runs `...` with NAME as the constant that `value` is.
#define SFR_BOOL(value, NAME, ...)                                                                                     \
    if (value) {                                                                                                       \
        constexpr bool NAME = true;                                                                                    \
        __VA_ARGS__;                                                                                                   \
    } else {                                                                                                           \
        constexpr bool NAME = false;                                                                                   \
        __VA_ARGS__;                                                                                                   \
    }
