// Sums over the threads of a block, in an order that depends on its size alone.
#pragma once

#include "device.cuh"

namespace sfr {

constexpr int MOST_WARPS = 32; // of a block
constexpr int PADDED_WARPS = MOST_WARPS + 4; // so that the last warp can fill up four sums, which are read at once
static_assert(PADDED_WARPS % 4 == 0 && PADDED_WARPS >= MOST_WARPS + 3, "rows of whole float4");

// Every thread gets the sums. All threads of the block must call it; a block is whole warps, at most 32 of them. Calls
// that follow each other take turns, 0 and 1: the sums of one are then read before those of the next but one are
// written.
template <int N> __device__ inline void block_sum(float (&value)[N], int turn) {
    __shared__ __align__(16) float parts[2][N][PADDED_WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] += __shfl_xor_sync(0xFFFFFFFFu, value[i], offset);
    }
    if (warps == 1) return;
    // the last warp fills up the last four with zeros
    if (lane < (warp + 1 < warps ? 1 : 4)) {
#pragma unroll
        for (int i = 0; i < N; ++i) parts[turn][i][warp + lane] = lane == 0 ? value[i] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
        value[i] = 0.0f;
#pragma unroll 1
        for (int w = 0; w < warps; w += 4) {
            const float4 four = *reinterpret_cast<const float4 *>(&parts[turn][i][w]);
            value[i] += (four.x + four.y) + (four.z + four.w);
        }
    }
}

} // namespace sfr
