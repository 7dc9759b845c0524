// Sums of rows in a fixed order, with no atomics: the same call gives the same bits.
//
//     column_sum: (S, P, D) → (S, D), the second half of a sum over rows whose first half a kernel left in P parts
//     index_sum:  out[m] = Σ_{index = m} x, after a counting sort without a counter: the block of m counts the rows of
//                 smaller m, which is where its own begin, and lists them

#include "reduce.cuh"
#include "types.cuh"

namespace sfr {

constexpr int COLUMNS = 32, ROWS = 8; // of a tile: a line of 128 bytes, eight of them in flight

template <typename T>
__global__ void __launch_bounds__(COLUMNS *ROWS)
    column_sum_kernel(const T *partial, float *out, int64_t parts, int width) {
    __shared__ float tile[ROWS][COLUMNS];
    const int lane = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS;
    const int column = blockIdx.x * COLUMNS + lane;
    const T *at = partial + blockIdx.y * parts * width;
    float sum = 0.0f;
    if (column < width)
        for (int64_t p = part; p < parts; p += ROWS) sum += to_float(at[p * width + column]);
    tile[part][lane] = sum;
    __syncthreads();
    if (part != 0 || column >= width) return;
    for (int r = 1; r < ROWS; ++r) sum += tile[r][lane];
    out[blockIdx.y * static_cast<int64_t>(width) + column] = sum;
}

// order[start[m] … stop[m]] = the rows of m, ascending.
__global__ void __launch_bounds__(256) group_kernel(const int32_t *index, int32_t *order, int32_t *bounds, int n) {
    __shared__ int counts[8];
    const int m = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int smaller = 0;
    for (int row = threadIdx.x; row < n; row += blockDim.x) smaller += index[row] < m;
    for (int offset = 16; offset > 0; offset >>= 1) smaller += __shfl_xor_sync(0xFFFFFFFFu, smaller, offset);
    if (lane == 0) counts[warp] = smaller;
    __syncthreads();
    int place = 0;
    for (int w = 0; w < 8; ++w) place += counts[w];
    if (threadIdx.x == 0) bounds[2 * m] = place;
    for (int first = 0; first < n; first += blockDim.x) {
        const int row = first + threadIdx.x, mine = row < n && index[row] == m;
        int upto = mine; // of the lanes up to this one
        for (int offset = 1; offset < 32; offset <<= 1) {
            const int below = __shfl_sync(0xFFFFFFFFu, upto, lane >= offset ? lane - offset : lane);
            if (lane >= offset) upto += below;
        }
        __syncthreads(); // the counts of the last round, or of those before, are read
        if (lane == 31) counts[warp] = upto;
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < 8; ++w) {
            if (w < warp) before += counts[w];
            all += counts[w];
        }
        if (mine) order[place + before + upto - 1] = row;
        place += all;
    }
    if (threadIdx.x == 0) bounds[2 * m + 1] = place;
}

template <typename T>
__global__ void __launch_bounds__(COLUMNS *ROWS)
    group_sum_kernel(const T *x, int64_t x_row, int64_t x_col, const int32_t *order, const int32_t *bounds, float *out,
                     int width) {
    __shared__ float tile[ROWS][COLUMNS];
    const int lane = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS;
    const int column = blockIdx.y * COLUMNS + lane;
    const int64_t m = blockIdx.x;
    float sum = 0.0f;
    if (column < width)
        for (int k = bounds[2 * m] + part; k < bounds[2 * m + 1]; k += ROWS)
            sum += to_float(x[order[k] * x_row + column * x_col]);
    tile[part][lane] = sum;
    __syncthreads();
    if (part != 0 || column >= width) return;
    for (int r = 1; r < ROWS; ++r) sum += tile[r][lane];
    out[m * width + column] = sum;
}

} // namespace sfr

SFR_API sfr_column_sum(const void *partial, int dtype, float *out, int sums, int64_t parts, int width, void *stream) {
    const dim3 grid((width + sfr::COLUMNS - 1) / sfr::COLUMNS, sums);
    SFR_DISPATCH(dtype, T,
                 return SFR_LAUNCH((sfr::column_sum_kernel<T>), grid, sfr::COLUMNS * sfr::ROWS, 0, stream,
                                   static_cast<const T *>(partial), out, parts, width))
    return cudaErrorInvalidValue;
}

// order (n,) and bounds (size, 2) int32 are room to work in.
SFR_API sfr_sum_by_index(const void *x, int dtype, int64_t x_row, int64_t x_col, const int32_t *index, int32_t *order,
                         int32_t *bounds, float *out, int n, int width, int size, void *stream) {
    const int error = SFR_LAUNCH(sfr::group_kernel, dim3(size), 256, 0, stream, index, order, bounds, n);
    if (error != cudaSuccess) return error;
    const dim3 grid(size, (width + sfr::COLUMNS - 1) / sfr::COLUMNS);
    SFR_DISPATCH(dtype, T,
                 return SFR_LAUNCH((sfr::group_sum_kernel<T>), grid, sfr::COLUMNS * sfr::ROWS, 0, stream,
                                   static_cast<const T *>(x), x_row, x_col, order, bounds, out, width))
    return cudaErrorInvalidValue;
}
