// mean_subtract and whiten: the CUDA route.
#include "core/cuda/launch.h"
#include "ops/whiten/standardise_cuda.cuh"
#include "ops/whiten/whiten_cuda.cuh"
#include "ops/whiten/whiten_op.h"

namespace dnl {

Tensor mean_subtract_cuda(const Tensor& x, int64_t dim) {
  WhitenCall call(x, dim);
  if (call.empty()) return call.output;
  CudaDevice device(x);
  dispatch_element(call.args.dtype, [&](auto type) {
    with_workspace(device, [&](auto& on) { whiten_cuda<decltype(type)>(call.args, on); });
  });
  return call.output;
}

static void run_on_cuda(const StandardiseCall& call) {
  if (call.empty()) return;
  CudaDevice device(call.output);
  dispatch_element(call.args.dtype, [&](auto type) {
    with_workspace(device, [&](auto& on) { standardise_cuda<decltype(type)>(call.args, on); });
  });
}

std::tuple<Tensor, Tensor> whiten_forward_on_cuda(const Tensor& x, const std::string& name, int64_t apart, double eps) {
  StandardiseCall call(x, name, apart, eps);
  run_on_cuda(call);
  return {call.output, call.rstd};
}

Tensor whiten_backward_on_cuda(const Tensor& grad_output, const Tensor& output, const Tensor& rstd,
                               const std::string& name, int64_t apart, double eps) {
  StandardiseCall call(grad_output, name, apart, eps, &output, &rstd);
  run_on_cuda(call);
  return call.output;
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CUDA, m) {
  m.impl("mean_subtract", DNL_BOX(&dnl::mean_subtract_cuda));
  m.impl("whiten_forward", DNL_BOX(&dnl::whiten_forward_on_cuda));
  m.impl("whiten_backward", DNL_BOX(&dnl::whiten_backward_on_cuda));
}
