// The two passes of a softmax cross-entropy over a row of logits, for one block of threads a row, or one cluster.
#pragma once

#include "types.cuh"

namespace sfr {

constexpr float LOG2_E = 1.4426950408889634f, LOWEST = -3.4028234663852886e38f;

__device__ inline float exp_of(float x) { return exp2_fast(LOG2_E * x); }

// tanh x and its derivative, to a few units in the last place also where either is small.
__device__ inline float tanh_of(float x, float *derivative) {
    const float size = fabsf(x), w = x * x;
    float series = 62.0f / 2835.0f + w * (-1382.0f / 155925.0f + w * (21844.0f / 6081075.0f));
    series = w * (-1.0f / 3.0f + w * (2.0f / 15.0f + w * (-17.0f / 315.0f + w * series)));
    const float e = exp_of(-2.0f * size), inverse = reciprocal(1.0f + e);
    *derivative = 4.0f * e * inverse * inverse;
    return size < 0.4f ? x + x * series : copysignf((1.0f - e) * inverse, x);
}

struct LogitScale {
    float rate, softcap; // z = softcap · tanh(rate · x), or rate · x where softcap is 0
};

template <bool SOFTCAP> __device__ inline float z_of(float x, const LogitScale &s, float *tanh_slope) {
    if (!SOFTCAP) return x * s.rate;
    return s.softcap * tanh_of(x * s.rate, tanh_slope);
}

// Of the columns that a thread, a warp, a block or a cluster has seen.
struct Sums {
    float top = LOWEST; // max z; finite, so that z = −∞ leaves exp(z − top) = 0
    float total = 0.0f; // Σ exp(z − top)
    float moment = 0.0f; // Σ exp(z − top) (z − top)
    float rest = 0.0f;   // Σ (z − top)
    int count = 0;       // Σ 1
    int best = 0;        // the first column where z = top
};

// The moment, and the rest, once the top has risen by −below, which may be infinite; carry = exp(below).
__device__ inline float moved(const Sums &s, float below, float carry) {
    return carry > 0.0f ? (s.moment + s.total * below) * carry : 0.0f;
}
__device__ inline float moved_rest(const Sums &s, float below) {
    return s.count > 0 ? s.rest + static_cast<float>(s.count) * below : 0.0f;
}

// The same bits whichever of the two is `a`: products are rounded with the sum on one side alone.
template <bool EXTRA> __device__ inline Sums merge(const Sums &a, const Sums &b) {
    const bool swap = a.top < b.top;
    const Sums high = swap ? b : a, low = swap ? a : b;
    const float below = low.top - high.top, carry = exp_of(below);
    Sums out;
    out.top = high.top;
    out.total = high.total + low.total * carry;
    if (EXTRA) {
        out.moment = high.moment + moved(low, below, carry);
        out.rest = high.rest + moved_rest(low, below);
        out.count = high.count + low.count;
        out.best = below == 0.0f && low.best < high.best ? low.best : high.best;
    }
    return out;
}

template <bool EXTRA> __device__ inline Sums warp_merge(Sums s) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        Sums other;
        other.top = __shfl_xor_sync(0xFFFFFFFFu, s.top, offset);
        other.total = __shfl_xor_sync(0xFFFFFFFFu, s.total, offset);
        if (EXTRA) {
            other.moment = __shfl_xor_sync(0xFFFFFFFFu, s.moment, offset);
            other.rest = __shfl_xor_sync(0xFFFFFFFFu, s.rest, offset);
            other.count = __shfl_xor_sync(0xFFFFFFFFu, s.count, offset);
            other.best = __shfl_xor_sync(0xFFFFFFFFu, s.best, offset);
        }
        s = merge<EXTRA>(s, other);
    }
    return s;
}

// Adds N neighbouring logits, from column `first` on, to what a thread has seen; only `count` of them are there.
template <int N, bool SOFTCAP, bool EXTRA>
__device__ inline void add(Sums &s, const float (&x)[N], int first, int count, const LogitScale &how) {
    static_assert((N & (N - 1)) == 0, "added by halves");
    float z[N], part[N], tanh_slope;
#pragma unroll
    for (int i = 0; i < N; ++i) part[i] = z[i] = i < count ? z_of<SOFTCAP>(x[i], how, &tanh_slope) : -INFINITY;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) part[i] = fmaxf(part[i], part[i + half]);
    }
    const float high = fmaxf(s.top, part[0]), below = s.top - high, carry = exp_of(below);
    float moment = 0.0f, rest = 0.0f;
    if (EXTRA && high > s.top) {
#pragma unroll
        for (int i = N - 1; i >= 0; --i)
            if (z[i] == high) s.best = first + i;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float d = z[i] - high;
        part[i] = exp_of(d);
        if (EXTRA) {
            moment += part[i] > 0.0f ? part[i] * d : 0.0f;
            if (i < count) rest += d;
        }
    }
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    if (EXTRA) {
        s.moment = moved(s, below, carry) + moment;
        s.rest = moved_rest(s, below) + rest;
        s.count += count;
    }
    s.total = s.total * carry + part[0];
    s.top = high;
}

// What a row's gradient needs: (share · exp(z − top) − label_share · onehot − uniform) · dz/dx.
struct Slopes {
    float top, share, label_share, uniform;
};

// Of N neighbouring logits, of which number `label` is the label's, if there is one.
template <int N, bool SOFTCAP>
__device__ inline void gradient(float (&x)[N], int label, const LogitScale &how, const Slopes &s) {
    float tanh_slope[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float z = z_of<SOFTCAP>(x[i], how, &tanh_slope[i]);
        x[i] = exp_of(z - s.top) * s.share - s.uniform;
    }
    if (static_cast<unsigned>(label) < N) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i == label) x[i] -= s.label_share; // in float32, before anything is rounded
    }
#pragma unroll
    for (int i = 0; SOFTCAP && i < N; ++i) x[i] *= tanh_slope[i];
}

// Loads a thread's vectors of a row of `width` columns, LOADS of them before the first is used, so that their latencies
// overlap, and calls use(v, first, count) for each: columns `first` to first + count. Only the last vector of a row may
// lack some. WHOLE: vectors are aligned, and their numbers side by side. Vectors go to the threads in turn.
template <int LOADS, bool WHOLE, bool BACKWARD, typename T, typename Use>
__device__ inline void for_vectors(const T *x, int64_t col, int width, int threads, const Use &use) {
    constexpr int VECTOR = 16 / sizeof(T), GROUP = WHOLE ? LOADS : 1;
    const int step = threads * VECTOR, group = GROUP * step, mine = static_cast<int>(threadIdx.x) * VECTOR;
    const int last = width > 0 ? (width - 1) / group * group : 0;
    for (int at = 0; at <= last; at += group) {
        const int base = (BACKWARD ? last - at : at) + mine;
        Packed<VECTOR, T> packed[GROUP];
#pragma unroll
        for (int j = 0; WHOLE && j < GROUP; ++j) {
            const int first = base + j * step;
            if (width - first >= VECTOR) packed[j] = load_packed<VECTOR>(x + first);
        }
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            const int first = base + j * step, left = width - first;
            if (left < (WHOLE ? VECTOR : 1)) continue;
            float v[VECTOR];
            if (WHOLE)
                unpack<T>(packed[j], v);
            else
                load_columns<VECTOR, false>(x, col, first, width, v);
            use(v, first, left < VECTOR ? left : VECTOR);
        }
    }
    const int end = width / VECTOR * VECTOR;
    if (WHOLE && end < width && end % step == mine) {
        float v[VECTOR];
        load_columns<VECTOR, false>(x, 1, end, width, v);
        use(v, end, width - end);
    }
}

template <int LOADS, bool WHOLE, bool SOFTCAP, bool EXTRA, typename T>
__device__ inline Sums thread_sums(const T *x, int64_t col, int width, int threads, int start, const LogitScale &how) {
    constexpr int VECTOR = 16 / sizeof(T);
    Sums s;
    for_vectors<LOADS, WHOLE, false>(x, col, width, threads, [&](const float (&v)[VECTOR], int first, int count) {
        add<VECTOR, SOFTCAP, EXTRA>(s, v, start + first, count, how);
    });
    return s;
}

// From the end: caches still hold it, of a row that was read from the front.
template <int LOADS, bool WHOLE, bool SOFTCAP, typename T>
__device__ inline void write_gradient(const T *from, T *to, int64_t col, int width, int threads, int label,
                                      const LogitScale &how, const Slopes &s) {
    constexpr int VECTOR = 16 / sizeof(T);
    for_vectors<LOADS, WHOLE, true>(from, col, width, threads, [&](float (&v)[VECTOR], int first, int) {
        gradient<VECTOR, SOFTCAP>(v, label - first, how, s);
        store_columns<VECTOR, WHOLE>(to, col, first, width, v);
    });
}

// Which of the `width` columns from `begin` on is the label's; −1: none.
__device__ inline int column_of(int64_t label, int begin, int width) {
    return label >= begin && label < begin + width ? static_cast<int>(label) - begin : -1;
}

// How a row's sums become its loss.
struct Loss {
    const int64_t *labels;   // (n,)
    const float *row_weight; // (n,), or null
    float *loss;             // (n,)
    float *lse, *entropy;    // (n,), or null
    int64_t *predicted;      // (n,), or null
    float logit_scale, label_smoothing, z_loss;
};

// Writes the results of a row if `write`, which alone needs z of its label, and returns what its gradient needs.
__device__ inline Slopes finish(const Loss &a, int64_t row, const Sums &s, float z_label, float weight, int vocab,
                                bool write) {
    const float log_total = logf(s.total), lse = s.top + log_total;
    if (write) {
        float loss = log_total - (1.0f - a.label_smoothing) * (z_label - s.top);
        if (a.label_smoothing != 0.0f) loss -= a.label_smoothing * (s.rest / vocab);
        if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
        a.loss[row] = loss * weight;
        if (a.lse != nullptr) {
            a.lse[row] = lse;
            a.predicted[row] = s.best;
            a.entropy[row] = log_total - s.moment / s.total;
        }
    }
    const float slope = weight * a.logit_scale;
    const float share = slope / s.total * (1.0f + 2.0f * a.z_loss * lse);
    return {s.top, share, slope * (1.0f - a.label_smoothing), slope * (a.label_smoothing / vocab)};
}

__device__ inline float weight_of(const float *row_weight, int64_t row) {
    return row_weight == nullptr ? 1.0f : row_weight[row];
}

} // namespace sfr
