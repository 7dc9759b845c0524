// Sums and maxima over the threads of a block, in an order that depends on its size alone.
#pragma once

#include "device.cuh"

namespace sfr {

template <int N> __device__ inline void warp_sum(float (&value)[N]) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] += __shfl_xor_sync(0xFFFFFFFFu, value[i], offset);
    }
}

// Every thread gets the sums. All threads of the block must call it; a block is whole warps, at most 32 of them.
template <int N> __device__ inline void block_sum(float (&value)[N]) {
    __shared__ float parts[N][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    warp_sum(value);
    if (warps == 1) return;
    __syncthreads(); // whoever still reads the parts of the last call
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) parts[i][warp] = value[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = lane < warps ? parts[i][lane] : 0.0f;
    warp_sum(value);
}

} // namespace sfr
