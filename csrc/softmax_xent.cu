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

#include "softmax.cuh"
#include "types.cuh"

namespace sfr {

constexpr int WARPS = 32; // at most
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
    softmax_xent_kernel(T *logits, int64_t row_stride, int64_t col, int vocab, Squash how, Loss a, bool need_grad) {
    const int64_t row = blockIdx.x, label = a.labels[row];
    const float weight = weight_of(a.row_weight, row);
    const int at = column_of(label, 0, vocab), threads = blockDim.x;
    T *x = logits + row * row_stride;
    Sums s = thread_sums<LOADS<SOFTCAP>, WHOLE, SOFTCAP, EXTRA>(x, col, vocab, threads, 0, how);
    float bend;
    const float z_label = threadIdx.x == 0 && at >= 0 ? squash<SOFTCAP>(to_float(x[at * col]), how, &bend) : NAN;
    s = block_merge<EXTRA>(s); // nobody writes before z_label has been read
    const Slopes slopes = finish(a, row, s, z_label, weight, vocab, threadIdx.x == 0);
    if (need_grad) write_gradient<LOADS<SOFTCAP>, WHOLE, SOFTCAP>(x, x, col, vocab, threads, at, how, slopes);
}

template <typename T, bool WHOLE, bool SOFTCAP>
__global__ void __launch_bounds__(1024, 1) partials_kernel(const T *logits, int64_t row_stride, int64_t col, int vocab,
                                                           Squash how, const int64_t *labels, float *out, int64_t n) {
    const int64_t row = blockIdx.x, label = labels[row];
    const T *x = logits + row * row_stride;
    Sums s = thread_sums<LOADS<SOFTCAP>, WHOLE, SOFTCAP, true>(x, col, vocab, blockDim.x, 0, how);
    const int at = column_of(label, 0, vocab);
    float bend;
    const float z_label = threadIdx.x == 0 && at >= 0 ? squash<SOFTCAP>(to_float(x[at * col]), how, &bend) : 0.0f;
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
    gradient_kernel(T *logits, int64_t row_stride, int64_t col, int vocab, Squash how, const int64_t *labels,
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

// What a block is told about a row of its cluster.
struct alignas(16) Told {
    Sums sums[MOST_BLOCKS * CLUSTER_WARPS]; // of every warp of the cluster
    int64_t before;                         // how many rows were claimed before the cluster's row after the next
    float label;                            // the logit of the label; the first block alone is told
};

// At the start of a block's shared memory; two buffers of a slice of a row follow.
struct alignas(16) Post {
    Told told[2]; // about rows of either parity
    uint64_t all_told[2];
};
static_assert(sizeof(Post) <= 8192, "leaves/cuda/softmax_xent.py leaves room for so much");

// Two of each are enough: a warp sends about a row once all warps have told it about the row before, which they did
// after they had read about the row before that. A block may end while others go on: all that they send it about its
// last row has come before it goes on with that.
template <typename T, int VECTOR, bool SOFTCAP, bool EXTRA>
__global__ void __launch_bounds__(CLUSTER_THREADS, 1)
    cluster_kernel(T *logits, int64_t row_stride, int64_t n, int vocab, int slice, int64_t *claimed, Squash how, Loss a,
                   bool need_grad) {
#if defined(SFR_EMULATION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
    SFR_DYNAMIC_SHARED(shared);
    Post &post = *reinterpret_cast<Post *>(shared);
    T *buffers = reinterpret_cast<T *>(shared + sizeof(Post));
    const int rank = cluster_rank(), size = cluster_size();
    const int64_t clusters = gridDim.x / size;
    const int begin = rank * slice, width = vocab - begin < slice ? vocab - begin : slice; // may be negative
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const bool leads = rank == 0 && threadIdx.x == 0;
    const int bytes = size * CLUSTER_WARPS * (EXTRA ? 24 : 8) + 8 + (rank == 0 ? 4 : 0); // told about a row
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
    if (threadIdx.x < 2) start_barrier(&post.all_told[threadIdx.x]);
    cluster_sync(); // nobody writes into the memory of a block that has not begun
    for (int turn = 0; row < n; ++turn) {
        const int parity = turn & 1;
        Told &told = post.told[parity];
        uint64_t *all_told = &post.all_told[parity];
        T *x = logits + row * row_stride + begin, *buffer = buffers + parity * slice;
        int64_t before = 0;
        if (threadIdx.x == 0) {
            expect_bytes(all_told, bytes);
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
            uint64_t *to = reinterpret_cast<uint64_t *>(&told.sums[rank * CLUSTER_WARPS + warp]);
#pragma unroll
            for (int i = 0; i < (EXTRA ? 3 : 1); ++i) send(to + i, lane, words[i], all_told);
        }
        const int at = column_of(label, begin, width);
        if (at >= 0 && at / VECTOR % CLUSTER_THREADS == static_cast<int>(threadIdx.x))
            send(&told.label, 0, to_float(buffer[at]), all_told);
        if (leads) {
            if (label < 0 || label >= vocab) send(&told.label, 0, NAN, all_told);
            for (int other = 0; other < size; ++other) send(&told.before, other, before, all_told);
        }

        wait_for_bytes(all_told, turn >> 1 & 1);
        s = Sums{};
        for (int i = lane; i < size * CLUSTER_WARPS; i += 32) s = merge<EXTRA>(s, told.sums[i]);
        s = warp_merge<EXTRA>(s);
        float bend;
        const float z_label = leads ? squash<SOFTCAP>(told.label, how, &bend) : 0.0f;
        const Slopes slopes = finish(a, row, s, z_label, weight, vocab, leads);
        row = next, next = 2 * clusters + told.before; // nobody claims its first two
        label = next_label, weight = next_weight;
        if (need_grad)
            write_gradient<2, true, SOFTCAP>(buffer, x, 1, width, CLUSTER_THREADS, at, how, slopes);
    }
#else
    __trap(); // sfr_cluster_code tells who would come here
#endif
}

inline Squash squash_of(float logit_scale, float softcap) {
    return softcap == 0.0f ? Squash{logit_scale, 0.0f} : Squash{logit_scale / softcap, softcap};
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

#define SFR_BOOL(value, NAME, ...)                                                                                     \
    if (value) {                                                                                                       \
        constexpr bool NAME = true;                                                                                    \
        __VA_ARGS__;                                                                                                   \
    } else {                                                                                                           \
        constexpr bool NAME = false;                                                                                   \
        __VA_ARGS__;                                                                                                   \
    }

// softcap 0: none. lse, predicted and entropy are null together.
SFR_API sfr_softmax_xent(void *logits, int dtype, int64_t row_stride, int64_t col, const int64_t *labels,
                         const float *row_weight, float *loss, float *lse, int64_t *predicted, float *entropy, int64_t n,
                         int vocab, float logit_scale, float softcap, float label_smoothing, float z_loss, int need_grad,
                         void *stream) {
    if (n == 0) return cudaSuccess;
    const sfr::Squash how = sfr::squash_of(logit_scale, softcap);
    const sfr::Loss a{labels, row_weight, loss, lse, entropy, predicted, logit_scale, label_smoothing, z_loss};
    const dim3 grid(static_cast<unsigned>(n));
    SFR_DISPATCH(dtype, T, {
        T *x = static_cast<T *>(logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_vectors(x, row_stride, col), WHOLE,
                 SFR_BOOL(softcap != 0.0f, SOFTCAP,
                          SFR_BOOL(lse != nullptr || label_smoothing != 0.0f, EXTRA,
                                   return SFR_LAUNCH((sfr::softmax_xent_kernel<T, WHOLE, SOFTCAP, EXTRA>), grid,
                                                     threads, 0, stream, x, row_stride, col, vocab, how, a,
                                                     need_grad != 0))))
    })
    return cudaErrorInvalidValue;
}

// The architecture (80, 90, …) that the cluster kernel was compiled for, of what runs on the current device; 0: none.
SFR_API sfr_cluster_code() {
#ifdef SFR_EMULATION
    return 90;
#else
    cudaFuncAttributes found{};
    return cudaFuncGetAttributes(&found, sfr::cluster_kernel<float, 4, false, false>) ? 0 : found.ptxVersion;
#endif
}

// As sfr_softmax_xent, rows aligned to 16 bytes held on chip by clusters of `cluster` blocks (1, 2, 4 or 8); sm_90 on.
// claimed: room for one number.
SFR_API sfr_softmax_xent_cluster(void *logits, int dtype, int64_t row_stride, const int64_t *labels,
                                 const float *row_weight, float *loss, float *lse, int64_t *predicted, float *entropy,
                                 int64_t n, int vocab, float logit_scale, float softcap, float label_smoothing,
                                 float z_loss, int need_grad, int cluster, int64_t *claimed, void *stream) {
    if (n == 0) return cudaSuccess;
    const sfr::Squash how = sfr::squash_of(logit_scale, softcap);
    const sfr::Loss a{labels, row_weight, loss, lse, entropy, predicted, logit_scale, label_smoothing, z_loss};
    SFR_DISPATCH(dtype, T, {
        constexpr int VECTOR = 16 / sizeof(T);
        T *x = static_cast<T *>(logits);
        if (!sfr::whole_vectors(x, row_stride, 1)) return cudaErrorInvalidValue;
        const int packs = (vocab + VECTOR - 1) / VECTOR, slice = (packs + cluster - 1) / cluster * VECTOR;
        const size_t shared = sizeof(sfr::Post) + 2 * slice * sizeof(T);
        if (const int error = sfr::clear(claimed, 8, stream)) return error;
        SFR_BOOL(softcap != 0.0f, SOFTCAP,
                 SFR_BOOL(lse != nullptr || label_smoothing != 0.0f, EXTRA,
                          return SFR_LAUNCH_CLUSTER((sfr::cluster_kernel<T, VECTOR, SOFTCAP, EXTRA>), n,
                                                    sfr::CLUSTER_THREADS, shared, cluster, stream, x, row_stride, n,
                                                    vocab, slice, claimed, how, a,
                                                    need_grad != 0)))
    })
    return cudaErrorInvalidValue;
}

// out (7, n) float32: the fields of RowPartials, with Σ (z − top) and the moment always.
SFR_API sfr_softmax_partials(const void *logits, int dtype, int64_t row_stride, int64_t col, const int64_t *labels,
                             float *out, int64_t n, int vocab, float logit_scale, float softcap, void *stream) {
    if (n == 0) return cudaSuccess;
    const sfr::Squash how = sfr::squash_of(logit_scale, softcap);
    const dim3 grid(static_cast<unsigned>(n));
    SFR_DISPATCH(dtype, T, {
        const T *x = static_cast<const T *>(logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_vectors(x, row_stride, col), WHOLE,
                 SFR_BOOL(softcap != 0.0f, SOFTCAP,
                          return SFR_LAUNCH((sfr::partials_kernel<T, WHOLE, SOFTCAP>), grid, threads, 0, stream,
                                            x, row_stride, col, vocab, how, labels, out, n)))
    })
    return cudaErrorInvalidValue;
}

SFR_API sfr_softmax_gradient(void *logits, int dtype, int64_t row_stride, int64_t col, const int64_t *labels,
                             const float *row_weight, const float *top, const float *share, const float *uniform,
                             int64_t n, int vocab, float logit_scale, float softcap, float label_smoothing,
                             void *stream) {
    if (n == 0) return cudaSuccess;
    const sfr::Squash how = sfr::squash_of(logit_scale, softcap);
    const dim3 grid(static_cast<unsigned>(n));
    SFR_DISPATCH(dtype, T, {
        T *x = static_cast<T *>(logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_vectors(x, row_stride, col), WHOLE,
                 SFR_BOOL(softcap != 0.0f, SOFTCAP,
                          return SFR_LAUNCH((sfr::gradient_kernel<T, WHOLE, SOFTCAP>), grid, threads, 0, stream,
                                            x, row_stride, col, vocab, how, labels, row_weight, top, share, uniform,
                                            logit_scale, label_smoothing)))
    })
    return cudaErrorInvalidValue;
}
