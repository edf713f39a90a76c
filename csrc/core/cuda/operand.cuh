// From the operators' View (a host list of batch offsets) to the Matrix that kernels take by value: sizes and strides
// of up to kMaxBatchDims leading dimensions, so that nothing is copied to the device (and a CUDA graph can be
// captured).
#pragma once

#include "core/cuda/device.cuh"
#include "core/errors.h"

namespace dnl {

template <class T>
Matrix<T> matrix_of(const char* name, const View& view, int64_t batches) {
  Matrix<T> matrix;
  matrix.data = static_cast<T*>(view.data);
  matrix.position = view.position;
  matrix.channel = view.channel;
  if (view.data && !batch_of_offsets(view.batch, batches, matrix.batch))
    throw NotImplementedError(message(name, ": expected at most ", kMaxBatchDims,
                                      " leading dimensions that cannot be merged into one another, got more"));
  return matrix;
}

}  // namespace dnl
