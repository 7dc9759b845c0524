// Cross-entropy of rows of logits, and its gradient written over them:
//
//     z = cap · tanh(s x / cap)      lse = log Σ_j exp z_j
//     ℓ = lse − (1 − ε) z_y − ε mean(z) + λ_z lse²
//     dz = p (1 + 2 λ_z lse) − (1 − ε) onehot(y) − ε / V      dx = w s (1 − (z / cap)²) dz
//
// Everywhere: one block a row, two passes, the second from the end, where caches still hold the row. On sm_90 and
// later a cluster of blocks keeps the row in its shared memory: one read and one write a logit, and the next row is on
// its way into a second buffer while this one is worked on. Every thread works on the numbers that it has copied
// itself, so that no block waits for its own copies; once a row the warps of a cluster send each other their sums.
//
// Clusters claim their rows as they go. A row's result does not depend on who has claimed it, nor on when.

#include "launchers.h"
#include "softmax.cuh"
#include "types.cuh"
#include <stddef.h>

namespace sfr {

constexpr int WARPS = 32; // at most
static_assert(WARPS <= 32, "the lanes of one warp merge the sums of all");
// Vectors of global memory that a thread waits for at once; a softcap takes long to compute, and many registers.
template <bool SOFTCAP> constexpr int LOADS = SOFTCAP ? 2 : 4;

template <bool EXTRA> __device__ inline Sums block_merge(Sums s) {
    __shared__ Sums parts[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    s = warp_merge<EXTRA>(s);
    if (lane == 0) parts[warp] = s;
    __syncthreads();
    s = lane < warps ? parts[lane] : Sums{};
    return warp_merge<EXTRA>(s);
}

// A block has an SM to itself: the rows that are worked on then stay in the L2 cache for the second pass.
template <typename T, bool WHOLE, bool SOFTCAP, bool EXTRA>
__global__ void __launch_bounds__(1024, 1)
    softmax_xent_kernel(T *logits, int64_t row_stride, int64_t col, int vocab, LogitScale how, Loss a, bool need_grad) {
    const int64_t row = blockIdx.x, label = a.labels[row];
    const float weight = weight_of(a.row_weight, row);
    const int at = column_of(label, 0, vocab), threads = blockDim.x;
    T *x = logits + row * row_stride;
    Sums s = thread_sums<LOADS<SOFTCAP>, WHOLE, SOFTCAP, EXTRA>(x, col, vocab, threads, 0, how);
    float tanh_slope;
    const float z_label = threadIdx.x == 0 && at >= 0 ? z_of<SOFTCAP>(to_float(x[at * col]), how, &tanh_slope) : NAN;
    s = block_merge<EXTRA>(s); // nobody writes before z_label has been read
    const Slopes slopes = finish(a, row, s, z_label, weight, vocab, threadIdx.x == 0);
    if (need_grad) write_gradient<LOADS<SOFTCAP>, WHOLE, SOFTCAP>(x, x, col, vocab, threads, at, how, slopes);
}

template <typename T, bool WHOLE, bool SOFTCAP>
__global__ void __launch_bounds__(1024, 1) partials_kernel(const T *logits, int64_t row_stride, int64_t col, int vocab,
                                                           LogitScale how, const int64_t *labels, float *out,
                                                           int64_t n) {
    const int64_t row = blockIdx.x, label = labels[row];
    const T *x = logits + row * row_stride;
    Sums s = thread_sums<LOADS<SOFTCAP>, WHOLE, SOFTCAP, true>(x, col, vocab, blockDim.x, 0, how);
    const int at = column_of(label, 0, vocab);
    float tanh_slope;
    const float z_label = threadIdx.x == 0 && at >= 0 ? z_of<SOFTCAP>(to_float(x[at * col]), how, &tanh_slope) : 0.0f;
    s = block_merge<true>(s);
    if (threadIdx.x != 0) return;
    out[row] = s.top;
    out[n + row] = s.total;
    out[2 * n + row] = z_label;
    out[3 * n + row] = at >= 0 ? 1.0f : 0.0f;
    out[4 * n + row] = s.rest;
    out[5 * n + row] = s.moment;
    out[6 * n + row] = static_cast<float>(s.best);
}

template <typename T, bool WHOLE, bool SOFTCAP>
__global__ void __launch_bounds__(1024, 1)
    gradient_kernel(T *logits, int64_t row_stride, int64_t col, int vocab, LogitScale how, const int64_t *labels,
                    const float *row_weight, const float *top, const float *share, const float *uniform,
                    float logit_scale, float label_smoothing) {
    const int64_t row = blockIdx.x;
    const float slope = logit_scale * weight_of(row_weight, row);
    const Slopes s{top[row], slope * share[row], slope * (1.0f - label_smoothing), slope * *uniform};
    T *x = logits + row * row_stride;
    const int at = column_of(labels[row], 0, vocab);
    write_gradient<LOADS<SOFTCAP>, WHOLE, SOFTCAP>(x, x, col, vocab, blockDim.x, at, how, s);
}

constexpr int CLUSTER_THREADS = 512, CLUSTER_WARPS = CLUSTER_THREADS / 32, MOST_BLOCKS = 8;

// What the blocks of a cluster send each other about a row.
struct alignas(16) Message {
    Sums sums[MOST_BLOCKS * CLUSTER_WARPS]; // of every warp of the cluster
    int64_t before;                         // how many rows were claimed before the cluster's row after the next
    float label;                            // the logit of the label, to the first block alone
};

// At the start of a block's shared memory; two buffers of a slice of a row follow.
struct alignas(16) Mailbox {
    Message messages[2]; // about rows of either parity
    uint64_t arrived[2];
};
constexpr int MAILBOX_BYTES = 8192; // the room that kernels/softmax_xent/cuda.py leaves
static_assert(sizeof(Mailbox) <= MAILBOX_BYTES, "the mailbox and two buffers fill a block's shared memory");
static_assert(sizeof(Mailbox) % 16 == 0 && sizeof(Message) % 16 == 0, "the buffers behind begin on whole vectors");
static_assert(sizeof(Sums) == 24 && offsetof(Sums, moment) == 8, "three words of 8 bytes, top and total in the first");
static_assert(CLUSTER_THREADS % 32 == 0 && CLUSTER_THREADS <= 1024, "whole warps");
static_assert(MOST_BLOCKS <= 8 && (MOST_BLOCKS & (MOST_BLOCKS - 1)) == 0, "clusters that every chip allows");

// Two of each are enough: a warp sends about a row once all warps have sent it theirs about the row before, which they
// did after they had read about the row before that. A block may end while others go on: all that they send it about its
// last row has come before it goes on with that.
template <typename T, int VECTOR, bool SOFTCAP, bool EXTRA>
__global__ void __launch_bounds__(CLUSTER_THREADS, 1)
    cluster_kernel(T *logits, int64_t row_stride, int64_t n, int vocab, int slice, int64_t *claimed, LogitScale how,
                   Loss a, bool need_grad) {
#ifdef SFR_CLUSTERS
    static_assert(VECTOR * sizeof(T) == 16, "an asynchronous copy");
    SFR_DYNAMIC_SHARED(shared);
    Mailbox &mailbox = *reinterpret_cast<Mailbox *>(shared);
    T *buffers = reinterpret_cast<T *>(shared + sizeof(Mailbox));
    const int rank = cluster_rank(), size = cluster_size();
    const int64_t clusters = gridDim.x / size;
    const int begin = rank * slice, width = vocab - begin < slice ? vocab - begin : slice; // may be negative
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const bool leads = rank == 0 && threadIdx.x == 0;
    const int bytes = size * CLUSTER_WARPS * (EXTRA ? 24 : 8) + 8 + (rank == 0 ? 4 : 0); // received about a row
    const auto fetch = [&](int64_t row, T *to) {
        constexpr int STEP = CLUSTER_THREADS * VECTOR;
        const int first = threadIdx.x * VECTOR;
        const T *from = logits + row * row_stride + begin + first;
        to += first;
        for (int left = row < n ? width - first : 0; left > 0; left -= STEP, from += STEP, to += STEP)
            copy_async(to, from, (left < VECTOR ? left : VECTOR) * static_cast<int>(sizeof(T)));
        commit_copies();
    };
    int64_t row = blockIdx.x / size, next = row + clusters, label = a.labels[row];
    float weight = weight_of(a.row_weight, row);
    fetch(row, buffers);
    if (threadIdx.x < 2) start_barrier(&mailbox.arrived[threadIdx.x]);
    cluster_sync(); // nobody writes into the memory of a block that has not begun
    for (int turn = 0; row < n; ++turn) {
        const int parity = turn & 1;
        Message &message = mailbox.messages[parity];
        uint64_t *arrived = &mailbox.arrived[parity];
        T *x = logits + row * row_stride + begin, *buffer = buffers + parity * slice;
        int64_t before = 0;
        if (threadIdx.x == 0) {
            expect_bytes(arrived, bytes);
            if (rank == 0) before = claim(claimed);
        }
        fetch(next, buffers + (parity ^ 1) * slice);
        const int64_t next_label = next < n ? a.labels[next] : 0;
        const float next_weight = next < n ? weight_of(a.row_weight, next) : 0.0f;

        wait_for_all_copies_but_the_last();
        Sums s = thread_sums<2, true, SOFTCAP, EXTRA>(buffer, 1, width, CLUSTER_THREADS, begin, how);
        s = warp_merge<EXTRA>(s);
        if (lane < size) {
            uint64_t words[3];
            memcpy(words, &s, sizeof(words));
            uint64_t *to = reinterpret_cast<uint64_t *>(&message.sums[rank * CLUSTER_WARPS + warp]);
#pragma unroll
            for (int i = 0; i < (EXTRA ? 3 : 1); ++i) send(to + i, lane, words[i], arrived);
        }
        const int at = column_of(label, begin, width);
        if (at >= 0 && at / VECTOR % CLUSTER_THREADS == static_cast<int>(threadIdx.x))
            send(&message.label, 0, to_float(buffer[at]), arrived);
        if (leads) {
            if (label < 0 || label >= vocab) send(&message.label, 0, NAN, arrived);
            for (int other = 0; other < size; ++other) send(&message.before, other, before, arrived);
        }

        wait_for_bytes(arrived, turn >> 1 & 1);
        s = Sums{};
        for (int i = lane; i < size * CLUSTER_WARPS; i += 32) s = merge<EXTRA>(s, message.sums[i]);
        s = warp_merge<EXTRA>(s);
        float tanh_slope;
        const float z_label = leads ? z_of<SOFTCAP>(message.label, how, &tanh_slope) : 0.0f;
        const Slopes slopes = finish(a, row, s, z_label, weight, vocab, leads);
        row = next, next = 2 * clusters + message.before; // nobody claims its first two
        label = next_label, weight = next_weight;
        if (need_grad)
            write_gradient<2, true, SOFTCAP>(buffer, x, 1, width, CLUSTER_THREADS, at, how, slopes);
    }
#else
    __trap(); // sfr_cluster_code tells who would come here
#endif
}

inline LogitScale logit_scale_of(float logit_scale, float softcap) {
    return softcap == 0.0f ? LogitScale{logit_scale, 0.0f} : LogitScale{logit_scale / softcap, softcap};
}

// Threads for a row: 256 bytes each, whole warps.
inline int threads_for(int64_t bytes) {
    const int64_t warps = (bytes + 32 * 256 - 1) / (32 * 256);
    return 32 * static_cast<int>(warps < 1 ? 1 : warps > WARPS ? WARPS : warps);
}

template <typename T> bool whole_vectors(const T *at, int64_t row, int64_t col) {
    return col == 1 && aligned(at, row * sizeof(T), 16);
}

} // namespace sfr

// The architecture that the cluster kernel was compiled for, of what runs on the current device; 0: none.
SFR_API sfr_cluster_code() { return sfr::code_of(sfr::cluster_kernel<float, 4, false, false>); }

SFR_API sfr_softmax_xent(const sfr::SoftmaxXentArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    const sfr::LogitScale how = sfr::logit_scale_of(f.logit_scale, f.softcap);
    sfr::Loss a;
    a.labels = f.labels;
    a.row_weight = f.row_weight;
    a.loss = f.loss;
    a.lse = f.lse;
    a.entropy = f.entropy;
    a.predicted = f.predicted;
    a.logit_scale = f.logit_scale;
    a.label_smoothing = f.label_smoothing;
    a.z_loss = f.z_loss;
    const bool extra = f.lse != nullptr || f.label_smoothing != 0.0f, need_grad = f.need_grad != 0;
    SFR_DISPATCH(dtype, T, {
        T *x = static_cast<T *>(f.logits);
        const bool whole = sfr::whole_vectors(x, f.logits_row, f.logits_col);
        if (f.cluster == 0) {
            const dim3 grid(static_cast<unsigned>(f.n));
            const int threads = sfr::threads_for(static_cast<int64_t>(f.vocab) * sizeof(T));
            SFR_BOOL(whole, WHOLE,
                     SFR_BOOL(f.softcap != 0.0f, SOFTCAP,
                              SFR_BOOL(extra, EXTRA,
                                       return SFR_LAUNCH((sfr::softmax_xent_kernel<T, WHOLE, SOFTCAP, EXTRA>), grid,
                                                         threads, 0, stream, x, f.logits_row, f.logits_col, f.vocab,
                                                         how, a, need_grad))))
        }
        constexpr int VECTOR = 16 / sizeof(T);
        const int packs = (f.vocab + VECTOR - 1) / VECTOR, slice = (packs + f.cluster - 1) / f.cluster * VECTOR;
        const size_t shared = sizeof(sfr::Mailbox) + 2 * slice * sizeof(T);
        const bool power = f.cluster > 0 && (f.cluster & (f.cluster - 1)) == 0;
        if (!whole || !power || f.cluster > sfr::MOST_BLOCKS || shared > sfr::MOST_SHARED) return cudaErrorInvalidValue;
        if (const int error = sfr::clear(f.claimed, 8, stream)) return error;
        SFR_BOOL(f.softcap != 0.0f, SOFTCAP,
                 SFR_BOOL(extra, EXTRA,
                          return SFR_LAUNCH_CLUSTER((sfr::cluster_kernel<T, VECTOR, SOFTCAP, EXTRA>), f.n,
                                                    sfr::CLUSTER_THREADS, shared, f.cluster, stream, x, f.logits_row,
                                                    f.n, f.vocab, slice, f.claimed, how, a, need_grad)))
    })
    return cudaErrorInvalidValue;
}

SFR_API sfr_softmax_partials(const sfr::SoftmaxPartialsArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    const sfr::LogitScale how = sfr::logit_scale_of(f.logit_scale, f.softcap);
    const dim3 grid(static_cast<unsigned>(f.n));
    SFR_DISPATCH(dtype, T, {
        const T *x = static_cast<const T *>(f.logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(f.vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_vectors(x, f.logits_row, f.logits_col), WHOLE,
                 SFR_BOOL(f.softcap != 0.0f, SOFTCAP,
                          return SFR_LAUNCH((sfr::partials_kernel<T, WHOLE, SOFTCAP>), grid, threads, 0, stream, x,
                                            f.logits_row, f.logits_col, f.vocab, how, f.labels, f.out, f.n)))
    })
    return cudaErrorInvalidValue;
}

SFR_API sfr_softmax_gradient(const sfr::SoftmaxGradientArguments &f, int dtype, void *stream) {
    if (f.n == 0) return cudaSuccess;
    const sfr::LogitScale how = sfr::logit_scale_of(f.logit_scale, f.softcap);
    const dim3 grid(static_cast<unsigned>(f.n));
    SFR_DISPATCH(dtype, T, {
        T *x = static_cast<T *>(f.logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(f.vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_vectors(x, f.logits_row, f.logits_col), WHOLE,
                 SFR_BOOL(f.softcap != 0.0f, SOFTCAP,
                          return SFR_LAUNCH((sfr::gradient_kernel<T, WHOLE, SOFTCAP>), grid, threads, 0, stream, x,
                                            f.logits_row, f.logits_col, f.vocab, how, f.labels, f.row_weight, f.top,
                                            f.share, f.uniform, f.logit_scale, f.label_smoothing)))
    })
    return cudaErrorInvalidValue;
}
