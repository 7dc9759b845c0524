// σ(z) by the approximate instructions, a few units in the last place off: two of the special function unit, which for
// e^x and a quotient as IEEE has it would have eight others beside them.
#pragma once

#include "device.cuh"
#include <math.h>

namespace sfr {

#ifdef SFR_EMULATION
inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_rsqrt(float x) { return 1.0f / sqrtf(x); }
#else
__device__ inline float fast_exp2(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ inline float fast_reciprocal(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ inline float fast_rsqrt(float x) {
    asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
#endif

__device__ inline float sigmoid(float z) { return fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z)); }

} // namespace sfr
