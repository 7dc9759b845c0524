// Philox4x32-10 and Box–Muller noise.
//
// key = the 64-bit seed; counter = (block, identity low, identity high, stream)
// streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
//
// Files that use the noise are compiled without contraction (--fmad=false): its bits are Triton's.
#pragma once

#include "device.cuh"
#include <stdint.h>
#include <string.h>

namespace sfr {

struct Words {
    uint32_t w[4];
};

__device__ inline Words philox(uint64_t seed, uint64_t identity, uint32_t block, uint32_t stream) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = block, c1 = static_cast<uint32_t>(identity), c2 = static_cast<uint32_t>(identity >> 32), c3 = stream;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
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

__device__ inline float of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}
__device__ inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// √(−2 ln u) of u = uniform(word), 0 where that is 1. No division, no root and no library call, whose bits differ from
// one machine to the next: u = 2^e m with m in [√½, √2), −4 ln u = N / D by a minimax rational function of m − 1, and
// √(N / 2D) = N / √(2 N D), that root's reciprocal by a guess on the bits and two steps of third and second order.
__device__ inline float radius(uint32_t word) {
    const int32_t bits = bits_of(uniform(word));
    const int32_t exponent = (bits - 0x3F3504F3) & ~0x7FFFFF; // 2^23 e
    const float g = of_bits(bits - exponent) - 1.0f;
    const float denominator = (g + 3.99667946f) * g + 3.32525532f;
    const float numerator = static_cast<float>(exponent) * -3.3051833e-07f * denominator + // −4 ln 2 · 2⁻²³
                            g * ((-0.44024708f * g - 9.3363455f) * g - 13.30102624f);
    const float x = numerator * denominator;
    float z = of_bits(0x5F1FF800 - (bits_of(x) >> 1));
    const float t = x * z * z; // in this order, which stays finite where x = 0 and z is huge
    z = z * ((0.46930116f * t - 1.24577161f) * t + 1.48683098f);
    z = z * (1.5f - x * z * z);
    return numerator * z;
}

// r cos 2πu and r sin 2πu of u = (word + ½) · 2⁻³², all bits of it: u = (h + ½ + y) / 2 with h its first bit and
// |y| ≤ ½, and minimax polynomials of half the angle πy.
__device__ inline void circle(float r, uint32_t word, float *cosine, float *sine) {
    const float y = static_cast<float>(static_cast<int32_t>(2u * word + 0x80000001u)) * 2.3283064365386963e-10f;
    const float q = y * y;
    const float s = y * (((0.00650772f * q - 0.11268458f) * q + 0.91353029f) * q - 2.22144146f); // −√2 sin
    const float c = ((-0.02886174f * q + 0.35864263f) * q - 1.74471105f) * q + 1.41421352f;      // √2 cos
    r = of_bits(bits_of(r) ^ static_cast<int32_t>(word & 0x80000000u)); // half a turn
    *cosine = r * (s * c);
    *sine = r * (1.0f - s * s);
}

// std · ε of the four coordinates of a block: lanes (0, 1) and (2, 3) are Box–Muller pairs.
__device__ inline void gaussian(uint64_t seed, uint64_t identity, uint32_t block, float std, float *out) {
    const Words words = philox(seed, identity, block, 0);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
        circle(radius(words.w[2 * pair]) * std, words.w[2 * pair + 1], out + 2 * pair, out + 2 * pair + 1);
}

} // namespace sfr
