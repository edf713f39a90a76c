// mean_subtract: the CUDA route.
#include "core/cuda/launch.h"
#include "ops/whiten/whiten_cuda.cuh"
#include "ops/whiten/whiten_op.h"

namespace dnl {

Tensor mean_subtract_cuda(const Tensor& x, int64_t dim) {
  WhitenCall call(x, dim);
  if (call.empty()) return call.output;
  CudaDevice device(x);
  dispatch_element(call.args.dtype, [&](auto type) { whiten_cuda<decltype(type)>(call.args, device); });
  return call.output;
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CUDA, m) { m.impl("mean_subtract", TORCH_BOX(&dnl::mean_subtract_cuda)); }
