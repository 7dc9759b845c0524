// What an error code means.

#include "device.cuh"

extern "C" __attribute__((visibility("default"))) const char *sfr_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
