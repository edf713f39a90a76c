// The little of cuBLAS that csrc/core/cuda/cublas.h calls, for a host that has none: functions of the same names and
// parameters that multiply by the definition of BLAS, one element after another, with sums in double. Types and
// parameters are those of the real header, which the CUDA build compiles cublas.h against.
#pragma once

#include <cstdint>

#include "core/cuda/ptx.cuh"

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };

struct cublasContext {
  bool tf32 = false;  // the math mode: products of float round their operands
};
using cublasHandle_t = cublasContext*;
using cudaDataType_t = cudaDataType;

inline const char* cublasGetStatusString(cublasStatus_t) { return "the parameters are not valid"; }

namespace reference_blas {

// A leading dimension is at least the number of rows as stored; a matrix that beta = 0 overwrites is not read.
template <class T, class Out, class Scale>
cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t a_op, cublasOperation_t b_op, int64_t m, int64_t n,
                    int64_t k, Scale alpha, const T* a, int64_t lda, int64_t stride_a, const T* b, int64_t ldb,
                    int64_t stride_b, Scale beta, Out* c, int64_t ldc, int64_t stride_c, int64_t batches) {
  if (lda < (a_op == CUBLAS_OP_N ? m : k) || ldb < (b_op == CUBLAS_OP_N ? k : n) || ldc < m)
    return CUBLAS_STATUS_INVALID_VALUE;
  const auto factor = [&](T x) -> double {
    if constexpr (std::is_same_v<T, float>)
      if (handle->tf32) return dnl::wide(dnl::rounded<dnl::Tf32>(x));
    return dnl::wide(x);
  };
  for (int64_t e = 0; e < batches; ++e)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l)
          sum += factor(a[e * stride_a + (a_op == CUBLAS_OP_N ? i + l * lda : l + i * lda)]) *
                 factor(b[e * stride_b + (b_op == CUBLAS_OP_N ? l + j * ldb : j + l * ldb)]);
        Out& to = c[e * stride_c + j * ldc + i];
        to = static_cast<Out>(alpha * sum + (beta == 0 ? 0 : beta * to));
      }
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace reference_blas

#define DNL_REFERENCE_GEMM(T, name, batched_name)                                                                      \
  inline cublasStatus_t batched_name(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,        \
                                     int64_t m, int64_t n, int64_t k, const T* alpha, const T* a, int64_t lda,         \
                                     long long stride_a, const T* b, int64_t ldb, long long stride_b, const T* beta,   \
                                     T* c, int64_t ldc, long long stride_c, int64_t batches) {                         \
    return reference_blas::gemm(handle, transa, transb, m, n, k, *alpha, a, lda, stride_a, b, ldb, stride_b, *beta, c, \
                                ldc, stride_c, batches);                                                               \
  }                                                                                                                    \
  inline cublasStatus_t name(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int64_t m,     \
                             int64_t n, int64_t k, const T* alpha, const T* a, int64_t lda, const T* b, int64_t ldb,   \
                             const T* beta, T* c, int64_t ldc) {                                                       \
    return batched_name(handle, transa, transb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1);             \
  }
DNL_REFERENCE_GEMM(float, cublasSgemm_64, cublasSgemmStridedBatched_64)
DNL_REFERENCE_GEMM(double, cublasDgemm_64, cublasDgemmStridedBatched_64)
#undef DNL_REFERENCE_GEMM

// 16-bit operands of one type, float results.
inline cublasStatus_t cublasGemmStridedBatchedEx_64(cublasHandle_t handle, cublasOperation_t transa,
                                                    cublasOperation_t transb, int64_t m, int64_t n, int64_t k,
                                                    const void* alpha, const void* a, cudaDataType a_type, int64_t lda,
                                                    long long stride_a, const void* b, cudaDataType b_type, int64_t ldb,
                                                    long long stride_b, const void* beta, void* c, cudaDataType c_type,
                                                    int64_t ldc, long long stride_c, int64_t batches,
                                                    cublasComputeType_t compute, cublasGemmAlgo_t) {
  if (a_type != b_type || c_type != CUDA_R_32F || compute != CUBLAS_COMPUTE_32F) return CUBLAS_STATUS_INVALID_VALUE;
  const auto of = [&](auto type) {
    using T = decltype(type);
    return reference_blas::gemm(handle, transa, transb, m, n, k, *static_cast<const float*>(alpha),
                                static_cast<const T*>(a), lda, stride_a, static_cast<const T*>(b), ldb, stride_b,
                                *static_cast<const float*>(beta), static_cast<float*>(c), ldc, stride_c, batches);
  };
  if (a_type == CUDA_R_16F) return of(__half{});
  return a_type == CUDA_R_16BF ? of(__nv_bfloat16{}) : CUBLAS_STATUS_INVALID_VALUE;
}

inline cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                      int64_t m, int64_t n, int64_t k, const void* alpha, const void* a,
                                      cudaDataType a_type, int64_t lda, const void* b, cudaDataType b_type, int64_t ldb,
                                      const void* beta, void* c, cudaDataType c_type, int64_t ldc,
                                      cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
  return cublasGemmStridedBatchedEx_64(handle, transa, transb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0,
                                       beta, c, c_type, ldc, 0, 1, compute, algorithm);
}
