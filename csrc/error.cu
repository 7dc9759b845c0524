// What an error code means.

#include "device.cuh"

#ifdef SFR_EMULATION
SFR_API sfr_emulated() { return 1; }
#endif

extern "C" __attribute__((visibility("default"))) const char *sfr_error(int code) {
#ifdef SFR_EMULATION
    if (code == cudaErrorLaunchTimeout) return "the threads of a block wait for each other";
    if (code == cudaErrorMisalignedAddress) return "an access was not aligned";
    return code == cudaErrorIllegalAddress ? "a block that is not there was reached" : "a launch was refused";
#else
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}
