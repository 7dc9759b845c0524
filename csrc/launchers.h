// What launchers of many parameters take: a plain structure, filled by name. kernels/*/cuda.py declares each once more
// for ctypes, with the same names in the same order: pointers, then numbers of 64 bits, then those of 32, so that
// nothing is padded but the end. A test compares the two. What is not named there is null or 0.
//
// `x_row` and `x_col` are strides of the matrix x; without an `x_col` the numbers of a row lie side by side. Vectors are
// contiguous. A sum over rows is left in `num_blocks` partial sums, of `rows` rows each.
#pragma once

#include "device.cuh"
#include <stdint.h>

namespace sfr {

struct FlowPathArguments {
    void *x_t, *u;                      // (n, d), rows `row` numbers apart
    const void *targets;                // (A, d)
    const float *times;                 // (M,)
    const int64_t *noise_id;            // (n,)
    const int32_t *anchor, *time_index; // (n,)
    const int64_t *seed;                // (1,)
    int64_t row, target_row, n;
    int d, targets_dtype;
    float target_scale, source_std;
};

struct FlowMseArguments {
    void *v;                  // (n, d), holds dv afterwards if there is a coefficient
    const void *u;            // (n, d)
    const void *bias;         // (d,), or null
    const float *coefficient; // (n,); null: no gradient
    float *loss;              // (n, blocks of columns)
    float *partial;           // (num_blocks, d), of db
    int64_t v_row, v_col, u_row, u_col, partial_row, n;
    int d, num_blocks, rows, threads; // a block has 16 bytes of a row for each of its threads
};

struct NormActArguments {
    void *y;                    // (n, D), replaced by y + row_bias[row_index] where there is one
    const void *bias;           // (D,), or null: the same for all rows
    const void *gamma, *beta;   // (D,)
    const float *row_bias;      // (M, D), or null
    const int32_t *row_index;   // (n,)
    const void *residual;       // (n, D), or null
    void *out;                  // (n, D)
    float *mean, *rstd;         // (n,)
    int64_t y_row, y_col, row_bias_row, residual_row, residual_col, out_row, n;
    int width, vector_dtype, threads; // vector_dtype: of gamma and beta, float32 or that of y
    float eps;
};

struct NormActBackwardArguments {
    const void *dout, *y;      // (n, D), y as forward left it
    const void *bias;          // (D,), or null: what y was left without
    const void *gamma, *beta;  // (D,)
    const float *mean, *rstd;  // (n,)
    float *moments;            // (n, 2), where a row is wider than a block
    void *dy;                  // (n, D)
    float *partial;            // (3 or 2, num_blocks, D): Σ dy if sum_dy, dγ, dβ
    int64_t dout_row, dout_col, y_row, y_col, dy_row, dy_col, partial_row, n;
    int width, vector_dtype, sum_dy, num_blocks, rows, threads;
};

struct SumByIndexArguments {
    const void *x;                 // (n, D)
    const int32_t *index;          // (n,), in [0, M)
    const int32_t *order, *bounds; // (n,) and (M + 1,), as sfr_group leaves them
    float *pieces;                 // (2 · num_blocks, D), to work in
    float *out;                    // (M, D)
    int64_t x_row, x_col;
    int n, width, size, num_blocks, rows, threads; // size: M
};

struct ScatterRowsArguments {
    const void *x;            // (n, H), contiguous
    const float *factor;      // (1,)
    const int32_t *token_row; // (N,)
    void *out;                // (N, H), contiguous
    int64_t tokens;           // N
    int n, width, out_dtype;
};

struct SoftmaxXentArguments {
    void *logits;            // (n, V), holds dlogits afterwards if need_grad
    const int64_t *labels;   // (n,)
    const float *row_weight; // (n,), or null
    float *loss;             // (n,)
    float *lse;              // (n,), null together with predicted and entropy
    int64_t *predicted;      // (n,)
    float *entropy;          // (n,)
    int64_t *claimed;        // (1,), for clusters to work in
    int64_t logits_row, logits_col, n;
    int vocab, need_grad;
    int cluster; // blocks that hold a row on chip between them: 1, 2, 4 or 8, on sm_90 or later; 0: two passes
    float logit_scale, softcap, label_smoothing, z_loss; // softcap 0: none
};

struct SoftmaxPartialsArguments {
    const void *logits;    // (n, V)
    const int64_t *labels; // (n,)
    float *out;            // (7, n): the fields of RowPartials, with Σ (z − top) and the moment always
    int64_t logits_row, logits_col, n;
    int vocab;
    float logit_scale, softcap;
};

struct SoftmaxGradientArguments {
    void *logits;             // (n, V), holds dlogits afterwards
    const int64_t *labels;    // (n,)
    const float *row_weight;  // (n,), or null
    const float *top, *share; // (n,)
    const float *uniform;     // (1,)
    int64_t logits_row, logits_col, n;
    int vocab;
    float logit_scale, softcap, label_smoothing;
};

// cublasGemmEx
using Gemm = int (*)(void *handle, int transa, int transb, int m, int n, int k, const void *alpha, const void *a,
                     int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type,
                     int ldc, int compute, int algorithm);

// A LayerNorm layer of the velocity head: parameters, what forward leaves of it, and the gradient of its matrix.
struct FlowLossLayer {
    const void *weight, *bias, *gamma, *beta;
    void *y, *a;        // (n, D), rows `width_row` apart
    float *mean, *rstd; // (n,)
    void *d_weight;     // null: not needed
};

// Parameters as VelocityHead has them; d: target size, F: inner, D: width. Room to work in is as large as
// kernels/flow/one_call.py says. In 16 bit what is said to be twice there has a second half: a copy, or what rounding
// has lost.
struct FlowLossArguments {
    Gemm gemm;
    void *handle;                              // cuBLAS's
    const void *h;                             // (n, H)
    const float *coefficient;                  // (n,)
    const void *targets;                       // (A, d)
    const float *times;                        // (M,)
    const int64_t *noise_id;                   // (n,)
    const int32_t *anchor, *time_index;        // (n,)
    const int64_t *seed;                       // (1,)
    const void *w_1, *b_1, *w_2, *b_2;         // (F, d), (F,), (d, F), (d,)
    const void *w_out, *b_out;                 // (d, D), (d,)
    const FlowLossLayer *layers;               // on the host
    void *d_w_1, *d_w_2, *d_w_out;             // gradients of matrices
    float *vectors;                            // and of the vectors, side by side; null: of no parameter
    void *dh;                                  // (n, H), may be h; null: not needed
    float *loss;                               // (n, blocks of columns)
    void *x_t, *v, *u;                         // (n, d), rows `d_row` apart; v, then dv
    void *sinusoid, *gate, *silu, *tau;        // (M, d), (M, F), (M, F), (M, d); all but the gate twice
    float *table;                              // (M, D): row biases, then their gradients
    float *partial, *moments;                  // partial sums of rows; moments of rows wider than a block
    float *wide;                               // (M, max(d, F)) twice: products before they are rounded
    int32_t *order, *bounds, *rank_and_counts; // the rows by time
    void *split;                               // (M, max(F, D)) twice: float32 in two parts
    int64_t n, hidden, target_row, h_row, dh_row, d_row, width_row;
    int d, inner, width, num_times, num_layers, vector_dtype, targets_dtype, add_to_dh;
    int mse_threads, mse_blocks, mse_rows, act_threads, back_threads, back_blocks, back_rows;
    float time_scale, hidden_scale, target_scale, source_std, eps;
};

} // namespace sfr

SFR_API sfr_sinusoid(const float *times, void *out, int dtype, int num_times, int copies, int d, double time_scale,
                     void *stream);
SFR_API sfr_flow_path(const sfr::FlowPathArguments &f, int dtype, void *stream);
SFR_API sfr_norm_act(const sfr::NormActArguments &f, int dtype, void *stream);
SFR_API sfr_norm_act_backward(const sfr::NormActBackwardArguments &f, int dtype, void *stream);
SFR_API sfr_flow_mse(const sfr::FlowMseArguments &f, int dtype, void *stream);
SFR_API sfr_column_sum(const void *partial, int dtype, int64_t row, float *out, int sums, int64_t num_blocks, int width,
                       void *stream);
SFR_API sfr_group(const int32_t *index, int32_t *order, int32_t *bounds, int32_t *rank_and_counts, int n, int size,
                  void *stream);
SFR_API sfr_sum_by_index(const sfr::SumByIndexArguments &f, int dtype, void *stream);
SFR_API sfr_split(const float *x, const void *z, void *out, int dtype, int64_t numel, int two_parts, void *stream);
