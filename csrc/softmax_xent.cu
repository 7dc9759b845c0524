// Cross-entropy of rows of logits, and its gradient written over them:
//
//     z = cap · tanh(s x / cap)      lse = log Σ_j exp z_j
//     ℓ = lse − (1 − ε) z_y − ε mean(z) + λ_z lse²
//     dz = p (1 + 2 λ_z lse) − (1 − ε) onehot(y) − ε / V      dx = w s (1 − (z / cap)²) dz
//
// Everywhere: one block a row, two passes, the second from the end, where caches still hold the row. On sm_90 and later
// a cluster of blocks keeps the row in its shared memory: one read and one write a logit, and the next row is on its way
// into a second buffer while this one is worked on. Every thread works on the numbers that it has copied itself, so
// that no block waits for its own copies; once a row the blocks of a cluster exchange their sums.

#include "softmax.cuh"
#include "types.cuh"

namespace sfr {

constexpr int WARPS = 32; // at most

template <bool EXTRA> __device__ inline Sums block_merge(Sums s, Sums *parts) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    s = warp_merge<EXTRA>(s);
    if (lane == 0) parts[warp] = s;
    __syncthreads();
    s = lane < warps ? parts[lane] : Sums{};
    return warp_merge<EXTRA>(s);
}

template <typename T, int VECTOR, bool WHOLE, bool SOFTCAP, bool EXTRA>
__device__ inline Sums row_sums(const T *x, int64_t col, int vocab, const Squash &how, float pivot) {
    __shared__ Sums parts[WARPS];
    Sums s;
    for (int first = threadIdx.x * VECTOR; first < vocab; first += blockDim.x * VECTOR) {
        float v[VECTOR];
        load_columns<VECTOR, WHOLE>(x, col, first, vocab, v);
        add<VECTOR, SOFTCAP, EXTRA, WHOLE>(s, v, first, vocab, how, pivot);
    }
    return block_merge<EXTRA>(s, parts);
}

template <typename T, int VECTOR, bool WHOLE, bool SOFTCAP>
__device__ inline void write_gradient(T *x, int64_t col, int vocab, int64_t label, const Squash &how, const Slopes &s) {
    const int step = blockDim.x * VECTOR;
    for (int base = (vocab - 1) / step * step; base >= 0; base -= step) {
        const int first = base + threadIdx.x * VECTOR;
        if (first >= vocab) continue;
        float v[VECTOR];
        load_columns<VECTOR, WHOLE>(x, col, first, vocab, v);
        gradient<VECTOR, SOFTCAP>(v, first, label, how, s);
        store_columns<VECTOR, WHOLE>(x, col, first, vocab, v);
    }
}

// z of the label, NaN for a label that is no class, and 0 or the like of it as a pivot for Σ (z − pivot).
template <bool SOFTCAP, typename T>
__device__ inline float label_logit(const T *x, int64_t col, int64_t vocab, int64_t label, const Squash &how,
                                    float *pivot) {
    float bend;
    const bool valid = label >= 0 && label < vocab;
    const float z = valid ? squash<SOFTCAP>(to_float(x[label * col]), how, &bend) : NAN;
    *pivot = z > -INFINITY ? z : 0.0f;
    return z;
}

template <typename T, int VECTOR, bool WHOLE, bool SOFTCAP, bool EXTRA>
__global__ void __launch_bounds__(1024)
    softmax_xent_kernel(T *logits, int64_t row_stride, int64_t col, int vocab, Squash how, Loss a, bool need_grad) {
    const int64_t row = blockIdx.x, label = a.labels[row];
    T *x = logits + row * row_stride;
    float pivot;
    const float z_label = label_logit<SOFTCAP>(x, col, vocab, label, how, &pivot);
    const Sums s = row_sums<T, VECTOR, WHOLE, SOFTCAP, EXTRA>(x, col, vocab, how, pivot);
    const Slopes slopes = finish(a, row, s, z_label, pivot, vocab, threadIdx.x == 0);
    // z_label was read by all before row_sums let anybody go on
    if (need_grad) write_gradient<T, VECTOR, WHOLE, SOFTCAP>(x, col, vocab, label, how, slopes);
}

template <typename T, int VECTOR, bool WHOLE, bool SOFTCAP>
__global__ void __launch_bounds__(1024) partials_kernel(const T *logits, int64_t row_stride, int64_t col, int vocab,
                                                        Squash how, const int64_t *labels, float *out, int64_t n) {
    const int64_t row = blockIdx.x, label = labels[row];
    const T *x = logits + row * row_stride;
    float pivot, bend;
    const float first = squash<SOFTCAP>(to_float(x[0]), how, &bend);
    pivot = first > -INFINITY ? first : 0.0f;
    const bool owned = label >= 0 && label < vocab;
    const Sums s = row_sums<T, VECTOR, WHOLE, SOFTCAP, true>(x, col, vocab, how, pivot);
    if (threadIdx.x != 0) return;
    out[row] = s.top;
    out[n + row] = s.total;
    out[2 * n + row] = owned ? squash<SOFTCAP>(to_float(x[label * col]), how, &bend) : 0.0f;
    out[3 * n + row] = owned ? 1.0f : 0.0f;
    out[4 * n + row] = s.rest + vocab * (pivot - s.top);
    out[5 * n + row] = s.moment;
    out[6 * n + row] = static_cast<float>(s.best);
}

template <typename T, int VECTOR, bool WHOLE, bool SOFTCAP>
__global__ void __launch_bounds__(1024)
    gradient_kernel(T *logits, int64_t row_stride, int64_t col, int vocab, Squash how, const int64_t *labels,
                    const float *row_weight, const float *top, const float *share, const float *uniform,
                    float logit_scale, float label_smoothing) {
    const int64_t row = blockIdx.x;
    const float slope = logit_scale * (row_weight == nullptr ? 1.0f : row_weight[row]);
    const Slopes s{top[row], slope * share[row], slope * (1.0f - label_smoothing), slope * *uniform};
    write_gradient<T, VECTOR, WHOLE, SOFTCAP>(logits + row * row_stride, col, vocab, labels[row], how, s);
}

template <typename T, int VECTOR, bool SOFTCAP, bool EXTRA>
__global__ void __launch_bounds__(512)
    cluster_kernel(T *logits, int64_t row_stride, int64_t n, int vocab, int slice, Squash how, Loss a, bool need_grad) {
#if defined(SFR_EMULATION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
    SFR_DYNAMIC_SHARED(shared); // two buffers of a slice; sums of the warps; sums of the blocks, of two rows
    T *buffers = reinterpret_cast<T *>(shared);
    Sums *warps = reinterpret_cast<Sums *>(buffers + 2 * slice), *blocks = warps + WARPS;
    const int rank = cluster_rank(), size = cluster_size();
    const int64_t clusters = gridDim.x / size;
    const int begin = rank * slice, end = begin + slice < vocab ? begin + slice : vocab;
    const int step = blockDim.x * VECTOR, mine = threadIdx.x * VECTOR;
    const auto fetch = [&](int64_t row, T *to) {
        if (row < n)
            for (int at = mine; begin + at < end; at += step)
                copy_async(to + at, logits + row * row_stride + begin + at);
        commit_copies();
    };
    int64_t row = blockIdx.x / size;
    fetch(row, buffers);
    cluster_sync(); // nobody writes into the memory of a block that has not begun
    for (int parity = 0; row < n; row += clusters, parity ^= 1) {
        T *x = logits + row * row_stride, *buffer = buffers + parity * slice;
        fetch(row + clusters, buffers + (parity ^ 1) * slice);
        const int64_t label = a.labels[row];
        float pivot;
        const float z_label = label_logit<SOFTCAP>(x, 1, vocab, label, how, &pivot);
        wait_for_all_copies_but_the_last();
        Sums s;
        for (int at = mine; begin + at < end; at += step) {
            float v[VECTOR];
            load<VECTOR>(buffer + at, v);
            add<VECTOR, SOFTCAP, EXTRA, true>(s, v, begin + at, vocab, how, pivot);
        }
        s = block_merge<EXTRA>(s, warps);
        if (static_cast<int>(threadIdx.x) < size) remote(blocks + parity * 16, threadIdx.x)[rank] = s;
        cluster_sync(); // all sums are there; all have read z_label, and the sums of the row before
        s = blocks[parity * 16];
        for (int other = 1; other < size; ++other) s = merge<EXTRA>(s, blocks[parity * 16 + other]);
        const Slopes slopes = finish(a, row, s, z_label, pivot, vocab, rank == 0 && threadIdx.x == 0);
        if (!need_grad) continue;
        for (int at = mine; begin + at < end; at += step) {
            float v[VECTOR];
            load<VECTOR>(buffer + at, v);
            gradient<VECTOR, SOFTCAP>(v, begin + at, label, how, slopes);
            store<VECTOR>(x + begin + at, v);
        }
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

template <typename T> bool whole_rows(const T *at, int64_t row, int64_t col, int vocab) {
    return col == 1 && vocab % (16 / sizeof(T)) == 0 && aligned(at, row * sizeof(T), 16);
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
        constexpr int VECTOR = 16 / sizeof(T);
        T *x = static_cast<T *>(logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_rows(x, row_stride, col, vocab), WHOLE,
                 SFR_BOOL(softcap != 0.0f, SOFTCAP,
                          SFR_BOOL(lse != nullptr || label_smoothing != 0.0f, EXTRA,
                                   return SFR_LAUNCH((sfr::softmax_xent_kernel<T, VECTOR, WHOLE, SOFTCAP, EXTRA>), grid,
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

// As sfr_softmax_xent, rows of 16-byte multiples held on chip by clusters of `cluster` blocks (1, 2, 4 or 8); sm_90 on.
SFR_API sfr_softmax_xent_cluster(void *logits, int dtype, int64_t row_stride, const int64_t *labels,
                                 const float *row_weight, float *loss, float *lse, int64_t *predicted, float *entropy,
                                 int64_t n, int vocab, float logit_scale, float softcap, float label_smoothing,
                                 float z_loss, int need_grad, int cluster, int blocks, void *stream) {
    if (n == 0) return cudaSuccess;
    const sfr::Squash how = sfr::squash_of(logit_scale, softcap);
    const sfr::Loss a{labels, row_weight, loss, lse, entropy, predicted, logit_scale, label_smoothing, z_loss};
    SFR_DISPATCH(dtype, T, {
        constexpr int VECTOR = 16 / sizeof(T);
        T *x = static_cast<T *>(logits);
        if (!sfr::whole_rows(x, row_stride, 1, vocab)) return cudaErrorInvalidValue;
        const int packs = vocab / VECTOR, slice = (packs + cluster - 1) / cluster * VECTOR;
        const size_t shared = 2 * slice * sizeof(T) + (sfr::WARPS + 32) * sizeof(sfr::Sums);
        const dim3 grid(blocks / cluster * cluster);
        SFR_BOOL(softcap != 0.0f, SOFTCAP,
                 SFR_BOOL(lse != nullptr || label_smoothing != 0.0f, EXTRA,
                          return SFR_LAUNCH_CLUSTER((sfr::cluster_kernel<T, VECTOR, SOFTCAP, EXTRA>), grid, 512, shared,
                                                    cluster, stream, x, row_stride, n, vocab, slice, how, a,
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
        constexpr int VECTOR = 16 / sizeof(T);
        const T *x = static_cast<const T *>(logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_rows(x, row_stride, col, vocab), WHOLE,
                 SFR_BOOL(softcap != 0.0f, SOFTCAP,
                          return SFR_LAUNCH((sfr::partials_kernel<T, VECTOR, WHOLE, SOFTCAP>), grid, threads, 0, stream,
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
        constexpr int VECTOR = 16 / sizeof(T);
        T *x = static_cast<T *>(logits);
        const int threads = sfr::threads_for(static_cast<int64_t>(vocab) * sizeof(T));
        SFR_BOOL(sfr::whole_rows(x, row_stride, col, vocab), WHOLE,
                 SFR_BOOL(softcap != 0.0f, SOFTCAP,
                          return SFR_LAUNCH((sfr::gradient_kernel<T, VECTOR, WHOLE, SOFTCAP>), grid, threads, 0, stream,
                                            x, row_stride, col, vocab, how, labels, row_weight, top, share, uniform,
                                            logit_scale, label_smoothing)))
    })
    return cudaErrorInvalidValue;
}
