// The matching loss of each row and its gradient, in one read of v and of the target velocity u:
//
//     e = v (+ b) − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
//
// A block takes some rows and some columns: ℓ comes as a partial sum of each block of columns, db as one of each
// block of rows (sums.cu adds those up).

#include "launchers.h"
#include "reduce.cuh"
#include "types.cuh"

namespace sfr {

template <typename T> struct FlowMse {
    Matrix<T> v;
    Matrix<const T> u;
    const T *bias;            // (d,), or null
    const float *coefficient; // (n,); null: no gradient
    float *loss;              // (n, blocks of columns)
    float *partial;           // (row blocks, d), rows `partial_row` apart
    int64_t partial_row, n;
    int d, rows;
    float over_d; // 1 / d
};

template <typename T, int VECTOR, bool ALIGNED>
__global__ void __launch_bounds__(256, 2) flow_mse_kernel(FlowMse<T> a) {
    const int first = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.rows;
    const int64_t end = begin + a.rows < a.n ? begin + a.rows : a.n;
    float db[VECTOR] = {}, bias[VECTOR] = {};
    if (a.bias != nullptr) load_columns<VECTOR, ALIGNED>(a.bias, 1, first, a.d, bias);
    const auto fetch_v = [&](int64_t row) { return fetch_columns<VECTOR, ALIGNED>(a.v.at(row), a.v.col, first, a.d); };
    const auto fetch_u = [&](int64_t row) { return fetch_columns<VECTOR, ALIGNED>(a.u.at(row), a.u.col, first, a.d); };
    Columns<VECTOR, T> v = fetch_v(begin), u = fetch_u(begin);
    for (int64_t row = begin; row < end; ++row) {
        float e[VECTOR], wanted[VECTOR], square[1] = {0.0f};
        v.unpack(e);
        u.unpack(wanted);
        if (row + 1 < end) { // on its way while this row is added up
            v = fetch_v(row + 1);
            u = fetch_u(row + 1);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            e[i] = e[i] + bias[i] - wanted[i];
            square[0] += e[i] * e[i];
        }
        if (a.coefficient != nullptr) {
            const float scale = 2.0f * a.over_d * a.coefficient[row];
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                e[i] *= scale;
                db[i] += e[i];
            }
            store_columns<VECTOR, ALIGNED>(a.v.at(row), a.v.col, first, a.d, e);
        }
        block_sum(square, row & 1);
        if (threadIdx.x == 0) a.loss[row * gridDim.y + blockIdx.y] = square[0] * a.over_d;
    }
    if (a.coefficient != nullptr)
        store_columns<VECTOR, ALIGNED>(a.partial + blockIdx.x * a.partial_row, 1, first, a.d, db);
}

} // namespace sfr

SFR_API sfr_flow_mse(const sfr::FlowMseArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    SFR_DISPATCH(dtype, T, {
        constexpr int VECTOR = 16 / sizeof(T);
        sfr::FlowMse<T> a;
        a.v = {static_cast<T *>(f.v), f.v_row, f.v_col};
        a.u = {static_cast<const T *>(f.u), f.u_row, f.u_col};
        a.bias = static_cast<const T *>(f.bias);
        a.coefficient = f.coefficient;
        a.loss = f.loss;
        a.partial = f.partial;
        a.partial_row = f.partial_row;
        a.n = f.n;
        a.d = f.d;
        a.rows = f.rows;
        a.over_d = 1.0f / f.d;
        const dim3 grid(f.num_blocks, (f.d + f.threads * VECTOR - 1) / (f.threads * VECTOR));
        const bool vectors = sfr::aligned(a.v) && sfr::aligned(a.u) && sfr::aligned(f.bias, 16, 16) &&
                             sfr::aligned(f.partial, f.partial_row * sizeof(float), 16);
        SFR_BOOL(vectors, ALIGNED,
                 return SFR_LAUNCH((sfr::flow_mse_kernel<T, VECTOR, ALIGNED>), grid, f.threads, 0, stream, a))
    })
    return cudaErrorInvalidValue;
}
