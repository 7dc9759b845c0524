// Philox4x32-10 and Box–Muller noise (DESIGN section 1).
//
// key = the 64-bit seed; counter = (block, identity low, identity high, stream)
// streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
//
// Files that use the noise are compiled without contraction (--fmad=false): its bits are those of the other backends.
#pragma once

#include "device.cuh"
#include <math.h>
#include <stdint.h>

namespace sfr {

struct Words {
    uint32_t w[4];
};

__device__ inline Words philox(uint64_t seed, uint64_t identity, uint32_t block, uint32_t stream) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = block, c1 = static_cast<uint32_t>(identity), c2 = static_cast<uint32_t>(identity >> 32), c3 = stream;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// (w + ½) · 2⁻³²
__device__ inline float uniform(uint32_t word) { return (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f; }

// ln x for normal, positive x: x = 2^e m with m in (0.7, 1.42), ln m = 2 artanh((m − 1) / (m + 1)); Taylor's series.
__device__ inline float log_of(float x) {
    union {
        float f;
        int32_t i;
    } bits;
    bits.f = x;
    const int32_t raw = bits.i;
    bits.i = (raw & 0x7FFFFF) | 0x3F800000;
    float m = bits.f;
    const bool upper = m > 1.41421356f;
    m = upper ? m * 0.5f : m;
    const float e = static_cast<float>((raw >> 23) - 127 + (upper ? 1 : 0));
    const float f = m - 1.0f;
    const float s = f / (2.0f + f);
    const float w = s * s;
    const float series = w * (2.0f / 3.0f + w * (2.0f / 5.0f + w * (2.0f / 7.0f + w * (2.0f / 9.0f))));
    return e * 0.693359375f + (2.0f * s + (s * series - e * 2.12194440e-4f));
}

// sin 2πr and cos 2πr for |r| ≤ 1; the reduction to an eighth of a turn is exact.
__device__ inline void sincos_turns(float r, float *sine, float *cosine) {
    const float quadrant = floorf(4.0f * r + 0.5f);
    const float x = (r - 0.25f * quadrant) * 6.283185307179586f;
    const float w = x * x;
    const float s = x + x * w * (-1.0f / 6.0f + w * (1.0f / 120.0f + w * (-1.0f / 5040.0f + w * (1.0f / 362880.0f))));
    const float c = 1.0f - 0.5f * w +
                    w * w * (1.0f / 24.0f + w * (-1.0f / 720.0f + w * (1.0f / 40320.0f + w * (-1.0f / 3628800.0f))));
    const int q = static_cast<int>(quadrant) & 3;
    const float a = (q & 1) ? c : s, b = (q & 1) ? s : c;
    *sine = q >= 2 ? -a : a;
    *cosine = (q == 1 || q == 2) ? -b : b;
}

// ε of the four coordinates of a block: lanes (0, 1) and (2, 3) are Box–Muller pairs.
__device__ inline void gaussian(uint64_t seed, uint64_t identity, uint32_t block, float (&out)[4]) {
    const Words words = philox(seed, identity, block, 0);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        const float radius = sqrtf(-2.0f * log_of(uniform(words.w[2 * pair])));
        float sine, cosine;
        sincos_turns(uniform(words.w[2 * pair + 1]), &sine, &cosine);
        out[2 * pair] = radius * cosine;
        out[2 * pair + 1] = radius * sine;
    }
}

} // namespace sfr
