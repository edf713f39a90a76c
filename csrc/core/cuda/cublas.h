// Products by cuBLAS, on the handle that torch keeps for the current thread, device and stream: torch has set its
// stream, its workspace and, by its settings, whether products of float use TF32.
//
// cuBLAS is called directly, not through aten: the stable ABI reaches aten's operators by name alone, makes a tensor of
// every operand and passes no Scalar, so that nothing could be added to a result.
//
// The functions are left undefined in the library of operators. torch's own library needs cuBLAS, and the loader finds
// them there, wherever torch has it from.
#pragma once

#include <cublas_v2.h>

#include <stdexcept>

#include "core/cuda/gemm.h"
#include "core/errors.h"

namespace dnl {

inline void check_cublas(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(message("a product failed in cuBLAS: ", cublasGetStatusString(status)));
}

// C += or = op(A) op(B). Sums are in float, or double for double. A batch of one is a call without batches: cuBLAS
// chooses among more kernels then.
template <class T, class Out>
void cublas_gemm(cublasHandle_t handle, const Gemm<T, Out>& x, bool accumulate) {
  const AccOf<T> alpha = 1, beta = accumulate ? 1 : 0;
  const cublasOperation_t a = x.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, b = x.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  if constexpr (kHalf<T>) {
    static_assert(std::is_same_v<Out, float>, "halves are multiplied to float");
    const cudaDataType_t type = std::is_same_v<T, __half> ? CUDA_R_16F : CUDA_R_16BF;
    check_cublas(x.batches == 1
                     ? cublasGemmEx_64(handle, a, b, x.m, x.n, x.k, &alpha, x.a, type, x.lda, x.b, type, x.ldb, &beta,
                                       x.c, CUDA_R_32F, x.ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT)
                     : cublasGemmStridedBatchedEx_64(handle, a, b, x.m, x.n, x.k, &alpha, x.a, type, x.lda, x.stride_a,
                                                     x.b, type, x.ldb, x.stride_b, &beta, x.c, CUDA_R_32F, x.ldc,
                                                     x.stride_c, x.batches, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  } else if constexpr (std::is_same_v<T, double>) {
    check_cublas(x.batches == 1
                     ? cublasDgemm_64(handle, a, b, x.m, x.n, x.k, &alpha, x.a, x.lda, x.b, x.ldb, &beta, x.c, x.ldc)
                     : cublasDgemmStridedBatched_64(handle, a, b, x.m, x.n, x.k, &alpha, x.a, x.lda, x.stride_a, x.b,
                                                    x.ldb, x.stride_b, &beta, x.c, x.ldc, x.stride_c, x.batches));
  } else {
    check_cublas(x.batches == 1
                     ? cublasSgemm_64(handle, a, b, x.m, x.n, x.k, &alpha, x.a, x.lda, x.b, x.ldb, &beta, x.c, x.ldc)
                     : cublasSgemmStridedBatched_64(handle, a, b, x.m, x.n, x.k, &alpha, x.a, x.lda, x.stride_a, x.b,
                                                    x.ldb, x.stride_b, &beta, x.c, x.ldc, x.stride_c, x.batches));
  }
}

}  // namespace dnl
