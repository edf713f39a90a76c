// Memory of the CUDA operators, through torch: the workspace of a call is one tensor (workspace.h).
#pragma once

#include "core/cuda/workspace.h"
#include "core/operator.h"

namespace dnl {

class TensorMemory {
 public:
  explicit TensorMemory(const Tensor& like) : like_(like), workspace_(like) {}

  // Allocates `bytes` on the device of `like`, freed with this object.
  void reserve(int64_t bytes) {
    if (bytes == 0) return;
    workspace_ = empty(like_, {bytes}, ScalarType::Byte);
    pieces_ = Pieces(workspace_.data_ptr(), bytes);
  }

  // `count` elements of what was reserved. Uninitialised.
  template <class T>
  T* allocate(int64_t count) {
    return pieces_.take<T>(count);
  }

 protected:
  const Tensor& like_;

 private:
  Tensor workspace_;
  Pieces pieces_;
};

}  // namespace dnl
