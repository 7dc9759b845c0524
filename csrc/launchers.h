// What flow_loss.cu calls of the other files, and what it is called with.
#pragma once

#include "device.cuh"
#include <stdint.h>

namespace sfr {

// cublasGemmEx
using Gemm = int (*)(void *handle, int transa, int transb, int m, int n, int k, const void *alpha, const void *a,
                     int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type,
                     int ldc, int compute, int algorithm);

// As `Arguments` in kernels/flow_loss/cuda.py. Matrices are contiguous but h and dh, and those of n rows in `work`,
// whose rows are so far apart as is said here. Parameters in the order of VelocityHead.
struct FlowLoss {
    Gemm gemm;
    void *handle, *stream;
    const void *h;                 // (n, H)
    const float *coefficient;      // (n,)
    const void *targets;           // (A, d)
    const float *times;            // (M,)
    const int64_t *noise_id;       // (n,)
    const int32_t *anchor;         // (n,)
    const int32_t *time_index;     // (n,)
    const int64_t *seed;           // (1,)
    const void *const *params;     // on the host
    void *const *matrices;         // on the host: their gradients, w_1, w_2, w_in, blocks, w_out
    void *const *work;             // on the host: room, as kernels/flow_loss/cuda.py lays it out
    float *vectors;                // gradients of the vectors; null: of no parameter
    void *dh;                      // (n, H), may be h; null: not needed
    float *loss;                   // (n, blocks of columns)
    int64_t n, hidden, target_row, h_row, dh_row, d_row, width_row; // d_row: of (n, d); width_row: of (n, D)
    int d, inner, width, num_times, layers, gain_dtype, targets_dtype, add_to_dh;
    int mse_threads, mse_parts, mse_rows, act_threads, back_threads, back_parts, back_rows;
    float time_scale, hidden_scale, target_scale, source_std, eps;
};

} // namespace sfr

SFR_API sfr_sinusoid(const float *times, void *out, int dtype, int num_times, int copies, int d, double time_scale,
                     void *stream);
SFR_API sfr_flow_path(void *x_t, void *u, int dtype, int64_t row, const void *targets, int targets_dtype,
                      int64_t target_row, const float *times, const int64_t *noise_id, const int32_t *anchor,
                      const int32_t *time_index, const int64_t *seed, float target_scale, float source_std, int64_t n,
                      int d, void *stream);
SFR_API sfr_norm_act(void *y, int dtype, int64_t y_row, int64_t y_col, const void *bias, const void *gamma,
                     const void *beta, int vector_dtype, const float *row_bias, int64_t bias_row,
                     const int32_t *row_index, const void *residual, int64_t residual_row, int64_t residual_col,
                     void *out, int64_t out_row, float *mean, float *rstd, int64_t n, int width, float eps, int threads,
                     void *stream);
SFR_API sfr_norm_act_backward(const void *dout, int dtype, int64_t dout_row, int64_t dout_col, const void *y,
                              int64_t y_row, int64_t y_col, const void *bias, const void *gamma, const void *beta,
                              int vector_dtype, const float *mean, const float *rstd, float *moments, void *dy,
                              int64_t dy_row, int64_t dy_col, float *partial, int64_t partial_row, int sum_dy,
                              int64_t n, int width, int parts, int rows, int threads, void *stream);
SFR_API sfr_flow_mse(void *v, int dtype, int64_t v_row, int64_t v_col, const void *u, int64_t u_row, int64_t u_col,
                     const void *bias, const float *coefficient, float *loss, float *partial, int64_t partial_row,
                     int64_t n, int d, int parts, int rows, int threads, void *stream);
SFR_API sfr_column_sum(const void *partial, int dtype, int64_t row, float *out, int sums, int64_t parts, int width,
                       void *stream);
SFR_API sfr_group(const int32_t *index, int32_t *order, int32_t *bounds, int32_t *room, int n, int size, void *stream);
SFR_API sfr_sum_by_index(const void *x, int dtype, int64_t x_row, int64_t x_col, const int32_t *index,
                         const int32_t *order, const int32_t *bounds, float *pieces, float *out, int n, int width,
                         int size, int parts, int rows, int threads, void *stream);
SFR_API sfr_split(const float *x, const void *z, void *out, int dtype, int64_t numel, int two_parts, void *stream);
