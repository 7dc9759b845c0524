// Sums of rows in a fixed order, with no atomics: the same call gives the same bits.
//
//     column_sum:    (S, P, D) → (S, D), the second half of a sum over rows whose first half a kernel left as P partial
//                    sums
//     group:         the rows in the order of an index, those of each value in their own order: a counting sort
//     sum_by_index:  out[m] = Σ_{index = m} x over rows so ordered. A block of them has whole groups, which it adds up,
//                    and at its ends pieces of some, which it leaves for a second kernel: all rows are read once.

#include "launchers.h"
#include "reduce.cuh"
#include "types.cuh"

namespace sfr {

constexpr int COLUMNS = 32;                  // side by side: a line of 128 bytes, and the lanes of a warp
constexpr int SUM_ROWS = 32;                 // added at a time by column_sum
constexpr int JOIN_ROWS = 8, JOIN_LINES = 4; // and by the second kernel of sum_by_index, of so many lines
static_assert(SUM_ROWS * COLUMNS == 1024 && JOIN_ROWS * COLUMNS == 256, "as their launch bounds say");

// out = Σ value(p, column) of EACH · COLUMNS columns from `first` on: ROWS · EACH lines in flight.
template <int ROWS, int EACH, typename F>
__device__ inline void tile_sum(int64_t begin, int64_t end, int first, int width, float *out, F &&value) {
    static_assert(EACH <= ROWS, "a row of threads adds up one line");
    __shared__ float tile[ROWS][EACH][COLUMNS];
    static_assert(sizeof(tile) <= MOST_STATIC_SHARED, "what a block may declare");
    const int lane = threadIdx.x % COLUMNS, part = threadIdx.x / COLUMNS;
    float sum[EACH] = {};
    for (int64_t p = begin + part; p < end; p += ROWS) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int column = first + i * COLUMNS + lane;
            if (column < width) sum[i] += value(p, column);
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) tile[part][i][lane] = sum[i];
    __syncthreads();
    if (part >= EACH) return;
    float total = 0.0f;
    for (int r = 0; r < ROWS; ++r) total += tile[r][part][lane];
    const int column = first + part * COLUMNS + lane;
    if (column < width) out[column] = total;
}

template <typename T>
__global__ void __launch_bounds__(1024)
    column_sum_kernel(const T *partial, int64_t row, float *out, int64_t num_blocks, int width) {
    const T *at = partial + blockIdx.y * num_blocks * row;
    tile_sum<SUM_ROWS, 1>(0, num_blocks, blockIdx.x * COLUMNS, width, out + blockIdx.y * static_cast<int64_t>(width),
                          [&](int64_t p, int column) { return to_float(at[p * row + column]); });
}

constexpr int CHUNK = 256;        // rows that a block of the sort looks at
constexpr int MOST_GROUPS = 1024; // values of an index that it sorts by
static_assert(CHUNK % 32 == 0 && CHUNK <= 1024, "whole warps");
static_assert((MOST_GROUPS + CHUNK / 32) * sizeof(int32_t) <= MOST_STATIC_SHARED, "what place_kernel declares");

// rank: of a row among those of its value in its chunk; counts (chunks, size): of each value in each chunk.
__global__ void __launch_bounds__(CHUNK)
    count_kernel(const int32_t *index, int32_t *rank, int32_t *counts, int n, int size) {
    __shared__ int32_t all[CHUNK];
    const int row = blockIdx.x * CHUNK + threadIdx.x, mine = row < n ? index[row] : -1;
    int32_t *count = counts + static_cast<int64_t>(blockIdx.x) * size;
    all[threadIdx.x] = mine;
    for (int m = threadIdx.x; m < size; m += CHUNK) count[m] = 0;
    __syncthreads();
    int before = 0, same = 0;
#pragma unroll 16
    for (int i = 0; i < CHUNK; ++i) {
        same += all[i] == mine;
        before += all[i] == mine && i < static_cast<int>(threadIdx.x);
    }
    if (row >= n) return;
    rank[row] = before;
    if (before + 1 == same) count[mine] = same; // the last of them
}

// order: the rows by value; bounds (size + 1): where those of each begin. rank and counts as above.
__global__ void __launch_bounds__(CHUNK)
    place_kernel(const int32_t *index, const int32_t *rank, const int32_t *counts, int32_t *order, int32_t *bounds,
                 int n, int size) {
    __shared__ int32_t start[MOST_GROUPS];
    __shared__ int32_t warps[CHUNK / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = gridDim.x;
    int carry = 0;
    for (int first = 0; first < size; first += CHUNK) {
        const int m = first + threadIdx.x;
        int total = 0, before = 0; // of this value, in all chunks and in those before
        if (m < size)
#pragma unroll 8
            for (int c = 0; c < chunks; ++c) {
                const int count = counts[static_cast<int64_t>(c) * size + m];
                total += count;
                before += c < static_cast<int>(blockIdx.x) ? count : 0;
            }
        int upto = total; // of the values up to this one
        for (int offset = 1; offset < 32; offset <<= 1) {
            const int below = __shfl_sync(0xFFFFFFFFu, upto, lane >= offset ? lane - offset : lane);
            if (lane >= offset) upto += below;
        }
        if (lane == 31) warps[warp] = upto;
        __syncthreads();
        int all = 0;
        for (int w = 0; w < CHUNK / 32; ++w) {
            if (w < warp) upto += warps[w];
            all += warps[w];
        }
        __syncthreads(); // before they are written anew
        if (m < size) {
            start[m] = carry + upto - total + before;
            if (blockIdx.x == 0) bounds[m] = carry + upto - total;
        }
        carry += all;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) bounds[size] = n;
    __syncthreads();
    const int row = blockIdx.x * CHUNK + threadIdx.x;
    if (row < n) order[start[index[row]] + rank[row]] = row;
}

template <typename T> struct Groups {
    Matrix<const T> x;
    const int32_t *index, *order;
    float *pieces; // (2 · row blocks, D): what a block has of its first group, and of its last
    float *out;    // (size, D)
    int n, width, rows;
};

template <typename T, int VECTOR, bool ALIGNED>
__global__ void __launch_bounds__(256) part_kernel(Groups<T> a) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    if (first >= a.width) return;
    const int begin = blockIdx.x * a.rows, end = begin + a.rows < a.n ? begin + a.rows : a.n;
    float sum[VECTOR] = {};
    int next = a.order[begin], m = a.index[next], open = 0; // groups that have ended
    const auto fetch = [&](int row) { return fetch_columns<VECTOR, ALIGNED>(a.x.at(row), a.x.col, first, a.width); };
    Columns<VECTOR, T> x = fetch(next);
    for (int k = begin; k < end; ++k) {
        float value[VECTOR];
        x.unpack(value);
        int following = m;
        if (k + 1 < end) { // on its way while this row is added
            next = a.order[k + 1];
            following = a.index[next];
            x = fetch(next);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[i] += value[i];
        const bool last = k + 1 == end;
        if (!last && following == m) continue;
        const int64_t piece = 2 * static_cast<int64_t>(blockIdx.x) + (open > 0);
        float *to = open == 0 || last ? a.pieces + piece * a.width : a.out + static_cast<int64_t>(m) * a.width;
        if (ALIGNED && a.width % 4 == 0) {
            store_columns<VECTOR, true>(to, 1, first, a.width, sum);
        } else {
            store_columns<VECTOR, false>(to, 1, first, a.width, sum);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) sum[i] = 0.0f;
        m = following;
        ++open;
    }
}

__global__ void __launch_bounds__(256)
    join_kernel(const float *pieces, const int32_t *bounds, float *out, int n, int width, int rows) {
    const int64_t m = blockIdx.x;
    const int start = bounds[m], stop = bounds[m + 1], first = start / rows; // the first block that has some of it
    const int end = (first + 1) * rows < n ? (first + 1) * rows : n;
    if (start < stop && start > first * rows && stop < end) return; // and had it whole, between two others
    const int last = start < stop ? (stop - 1) / rows : first - 1;
    tile_sum<JOIN_ROWS, JOIN_LINES>(first, last + 1, blockIdx.y * JOIN_LINES * COLUMNS, width, out + m * width,
                                    [&](int64_t block, int column) {
                                        return pieces[(2 * block + (block * rows < start)) * width + column];
                                    });
}

} // namespace sfr

SFR_API sfr_column_sum(const void *partial, int dtype, int64_t row, float *out, int sums, int64_t num_blocks, int width,
                       void *stream) {
    const dim3 grid((width + sfr::COLUMNS - 1) / sfr::COLUMNS, sums);
    SFR_DISPATCH(dtype, T,
                 return SFR_LAUNCH((sfr::column_sum_kernel<T>), grid, sfr::SUM_ROWS * sfr::COLUMNS, 0, stream,
                                   static_cast<const T *>(partial), row, out, num_blocks, width))
    return cudaErrorInvalidValue;
}

// order (n,) and bounds (size + 1,); at most MOST_GROUPS values. To work in: n + size · ⌈n / CHUNK⌉ int32, one chunk at
// least.
SFR_API sfr_group(const int32_t *index, int32_t *order, int32_t *bounds, int32_t *rank_and_counts, int n, int size,
                  void *stream) {
    if (size > sfr::MOST_GROUPS) return cudaErrorInvalidValue;
    const dim3 grid(n > 0 ? (n + sfr::CHUNK - 1) / sfr::CHUNK : 1);
    int32_t *rank = rank_and_counts, *counts = rank + n;
    const int error = SFR_LAUNCH(sfr::count_kernel, grid, sfr::CHUNK, 0, stream, index, rank, counts, n, size);
    if (error != cudaSuccess) return error;
    return SFR_LAUNCH(sfr::place_kernel, grid, sfr::CHUNK, 0, stream, index, rank, counts, order, bounds, n, size);
}

SFR_API sfr_sum_by_index(const sfr::SumByIndexArguments &f, int dtype, void *stream) {
    SFR_DISPATCH(dtype, T, {
        constexpr int VECTOR = 16 / sizeof(T);
        sfr::Groups<T> a;
        a.x = {static_cast<const T *>(f.x), f.x_row, f.x_col};
        a.index = f.index;
        a.order = f.order;
        a.pieces = f.pieces;
        a.out = f.out;
        a.n = f.n;
        a.width = f.width;
        a.rows = f.rows;
        const dim3 grid(f.num_blocks, (f.width + f.threads * VECTOR - 1) / (f.threads * VECTOR));
        const bool vectors = sfr::aligned(a.x) && sfr::aligned(f.pieces, 16, 16) && sfr::aligned(f.out, 16, 16);
        int error = cudaSuccess;
        if (f.n > 0)
            error = vectors ? SFR_LAUNCH((sfr::part_kernel<T, VECTOR, true>), grid, f.threads, 0, stream, a)
                            : SFR_LAUNCH((sfr::part_kernel<T, VECTOR, false>), grid, f.threads, 0, stream, a);
        if (error != cudaSuccess) return error;
    })
    constexpr int TILE = sfr::JOIN_LINES * sfr::COLUMNS;
    const dim3 tiles(f.size, (f.width + TILE - 1) / TILE);
    return SFR_LAUNCH(sfr::join_kernel, tiles, sfr::JOIN_ROWS * sfr::COLUMNS, 0, stream, f.pieces, f.bounds, f.out, f.n,
                      f.width, f.rows);
}
