// A batch of products as BLAS takes it: column-major matrices, each with a leading dimension and a batch stride. Host
// code that knows neither CUDA nor a library, so that a test without a GPU holds it to the definition.
#pragma once

#include "core/cuda/device.cuh"

namespace dnl {

// C = op(A) op(B), with op(A) (m, k), op(B) (k, n) and C (m, n). Element (i, j) of op(A) is a[i + j * lda], of a
// transposed one a[j + i * lda]; likewise B; element (i, j) of C is c[i + j * ldc].
template <class T, class Out>
struct Gemm {
  int64_t batches, m, n, k;
  bool transpose_a, transpose_b;
  const T *a, *b;
  Out* c;
  int64_t lda, ldb, ldc;                 // leading dimensions, in elements
  int64_t stride_a, stride_b, stride_c;  // between batch elements
};

// c = a b for every batch element: a (batches, m, k), b (batches, k, n), c (batches, m, n), each with one dimension
// dense and at most one batch stride. To BLAS a matrix by rows is its transpose, and so the factors of a result by rows
// change places: c^T = b^T a^T.
template <class T, class Out>
Gemm<T, Out> gemm_of(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches,
                     int64_t m, int64_t n, int64_t k) {
  if (c.channel == 1 && c.position != 1)
    return gemm_of(b.transposed(), a.transposed(), c.transposed(), batches, n, m, k);
  const auto by_rows = [](const auto& x) { return x.position != 1; };
  const auto leading = [&](const auto& x) { return by_rows(x) ? x.position : x.channel; };
  const auto stride = [](const auto& x) { return x.batch.dims ? x.batch.stride[0] : 0; };
  return {batches,      m,          n,          k,          by_rows(a), by_rows(b), a.element(0), b.element(0),
          c.element(0), leading(a), leading(b), leading(c), stride(a),  stride(b),  stride(c)};
}

}  // namespace dnl
