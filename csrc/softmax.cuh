// The two passes of a softmax cross-entropy over a row of logits, for one block of threads a row, or one cluster.
#pragma once

#include "types.cuh"

namespace sfr {

constexpr float LOG2_E = 1.4426950408889634f, LOWEST = -3.4028234663852886e38f;

__device__ inline float exp_of(float x) { return exp2f(LOG2_E * x); }

// tanh x and its derivative, to a few units in the last place also where either is small.
__device__ inline float tanh_of(float x, float *derivative) {
    const float size = fabsf(x), w = x * x;
    float series = 62.0f / 2835.0f + w * (-1382.0f / 155925.0f + w * (21844.0f / 6081075.0f));
    series = w * (-1.0f / 3.0f + w * (2.0f / 15.0f + w * (-17.0f / 315.0f + w * series)));
    const float e = exp2f(-2.0f * LOG2_E * size), far = (1.0f - e) / (1.0f + e);
    *derivative = 4.0f * e / ((1.0f + e) * (1.0f + e));
    return size < 0.4f ? x + x * series : copysignf(far, x);
}

struct Squash {
    float rate, softcap; // z = softcap · tanh(rate · x), or rate · x where softcap is 0
};

template <bool SOFTCAP> __device__ inline float squash(float x, const Squash &s, float *bend) {
    if (!SOFTCAP) return x * s.rate;
    return s.softcap * tanh_of(x * s.rate, bend);
}

// Of the columns that a thread, a warp, a block or a cluster has seen.
struct Sums {
    float top = LOWEST; // max z; finite, so that z = −∞ leaves exp(z − top) = 0
    float total = 0.0f; // Σ exp(z − top)
    float moment = 0.0f; // Σ exp(z − top) (z − top)
    float rest = 0.0f;   // Σ (z − pivot)
    int best = 0;        // the first column where z = top
};

// The moment once the top has risen by −below, which may be infinite; carry = exp(below).
__device__ inline float moved(const Sums &s, float below, float carry) {
    return carry > 0.0f ? (s.moment + s.total * below) * carry : 0.0f;
}

// The same bits whichever of the two is `a`.
template <bool EXTRA> __device__ inline Sums merge(const Sums &a, const Sums &b) {
    Sums out;
    out.top = fmaxf(a.top, b.top);
    const float below_a = a.top - out.top, below_b = b.top - out.top;
    const float carry_a = exp_of(below_a), carry_b = exp_of(below_b);
    out.total = a.total * carry_a + b.total * carry_b;
    if (EXTRA) {
        out.moment = moved(a, below_a, carry_a) + moved(b, below_b, carry_b);
        out.rest = a.rest + b.rest;
        out.best = a.top == b.top ? (a.best < b.best ? a.best : b.best) : a.top > b.top ? a.best : b.best;
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
            other.best = __shfl_xor_sync(0xFFFFFFFFu, s.best, offset);
        }
        s = merge<EXTRA>(s, other);
    }
    return s;
}

// Adds N neighbouring logits, from column `first` on, to what a thread has seen.
template <int N, bool SOFTCAP, bool EXTRA, bool WHOLE>
__device__ inline void add(Sums &s, const float (&x)[N], int first, int width, const Squash &how, float pivot) {
    float z[N], high = s.top, bend;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        z[i] = WHOLE || first + i < width ? squash<SOFTCAP>(x[i], how, &bend) : -INFINITY;
        if (EXTRA && z[i] > high) s.best = first + i;
        high = fmaxf(high, z[i]);
    }
    const float below = s.top - high, carry = exp_of(below);
    float sum = 0.0f, moment = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float d = z[i] - high, e = exp_of(d);
        sum += e;
        if (EXTRA) {
            moment += e > 0.0f ? e * d : 0.0f;
            if (WHOLE || first + i < width) s.rest += z[i] - pivot;
        }
    }
    if (EXTRA) s.moment = moved(s, below, carry) + moment;
    s.total = s.total * carry + sum;
    s.top = high;
}

// What a row's gradient needs: (share · exp(z − top) − label_share · onehot − uniform) · dz/dx.
struct Slopes {
    float top, share, label_share, uniform;
};

template <int N, bool SOFTCAP>
__device__ inline void gradient(float (&x)[N], int first, int64_t label, const Squash &how, const Slopes &s) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float bend = 1.0f;
        const float z = squash<SOFTCAP>(x[i], how, &bend);
        x[i] = exp_of(z - s.top) * s.share - s.uniform;
        if (first + i == label) x[i] -= s.label_share; // in float32, before anything is rounded
        if (SOFTCAP) x[i] *= bend;
    }
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

// Writes the results of a row if `write`, and returns what its gradient needs.
__device__ inline Slopes finish(const Loss &a, int64_t row, const Sums &s, float z_label, float pivot, int64_t vocab,
                                bool write) {
    const float log_total = logf(s.total), lse = s.top + log_total;
    const float weight = a.row_weight == nullptr ? 1.0f : a.row_weight[row];
    float loss = log_total - (1.0f - a.label_smoothing) * (z_label - s.top);
    if (a.label_smoothing != 0.0f) loss -= a.label_smoothing * (pivot - s.top + s.rest / vocab);
    if (a.z_loss != 0.0f) loss += a.z_loss * lse * lse;
    if (write) {
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

} // namespace sfr
