// The logistic function by the approximate instructions, a few units in the last place off: two of the special function
// unit, where e^x and a quotient as IEEE has it would have eight others beside them.
#pragma once

#include "device.cuh"

namespace sfr {

__device__ inline float sigmoid(float z) { return reciprocal(1.0f + exp2_fast(-1.44269504f * z)); }

} // namespace sfr
