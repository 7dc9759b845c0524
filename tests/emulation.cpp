// What the emulated kernels have of libraries: CUDA's words for an error, and cuBLAS's product.

#include "device.cuh"
#include <cuda_bf16.h>

extern "C" const char *cudaGetErrorString(cudaError_t code) {
    if (code == cudaErrorLaunchTimeout) return "the threads of a block wait for each other";
    if (code == cudaErrorMisalignedAddress) return "an access was not aligned";
    return code == cudaErrorIllegalAddress ? "a block that is not there was reached" : "a launch was refused";
}

// cublasGemmEx, columns first, for float32 and bfloat16. A library that has it is emulated.
SFR_API sfr_emulated_gemm(void *, int transa, int transb, int m, int n, int k, const void *alpha, const void *a,
                          int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c,
                          int c_type, int ldc, int, int) {
    const auto get = [](const void *at, int type, int64_t i) {
        return type == 0 ? static_cast<const float *>(at)[i]
                         : __bfloat162float(static_cast<const __nv_bfloat16 *>(at)[i]);
    };
    const float scale = *static_cast<const float *>(alpha), add = *static_cast<const float *>(beta);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
            float sum = 0.0f;
            for (int64_t l = 0; l < k; ++l)
                sum += get(a, a_type, transa ? l + i * lda : i + l * lda) *
                       get(b, b_type, transb ? j + l * ldb : l + j * ldb);
            sum *= scale;
            if (add != 0.0f) sum += add * get(c, c_type, i + j * ldc);
            if (c_type == 0)
                static_cast<float *>(c)[i + j * ldc] = sum;
            else
                static_cast<__nv_bfloat16 *>(c)[i + j * ldc] = __float2bfloat16_rn(sum);
        }
    return 0;
}
