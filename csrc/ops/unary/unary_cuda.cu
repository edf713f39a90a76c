// softmax and unary pooling: the CUDA route.
#include "core/cuda/launch.h"
#include "ops/unary/unary_cuda.cuh"
#include "ops/unary/unary_op.h"

namespace dnl {

Tensor softmax_on_cuda(const Tensor& x) {
  SoftmaxCall call("x", x);
  if (call.empty()) return call.output;
  CudaDevice device(x);
  dispatch_element(call.args.dtype, [&](auto type) { softmax_cuda<decltype(type)>(call.args, device); });
  return call.output;
}

Tensor softmax_backward_on_cuda(const Tensor& grad_output, const Tensor& output) {
  SoftmaxCall call("grad_output", grad_output, &output);
  if (call.empty()) return call.output;
  CudaDevice device(grad_output);
  dispatch_element(call.args.dtype, [&](auto type) { softmax_backward_cuda<decltype(type)>(call.args, device); });
  return call.output;
}

std::tuple<Tensor, Tensor> unary_forward_on_cuda(const Tensor& mask_logits, const Tensor& value) {
  UnaryCall call(mask_logits, value);
  if (!call.empty()) {
    CudaDevice device(value);
    dispatch_element(call.args.dtype, [&](auto type) {
      with_workspace(device, [&](auto& on) { unary_forward_cuda<decltype(type)>(call.args, on); });
    });
  }
  return {call.pooled, call.lse};
}

std::tuple<Tensor, Tensor> unary_backward_on_cuda(const Tensor& grad_pooled, const Tensor& mask_logits,
                                                  const Tensor& value, const Tensor& pooled, const Tensor& lse,
                                                  bool need_mask, bool need_value) {
  UnaryCall call(grad_pooled, mask_logits, value, pooled, lse, need_mask, need_value);
  if (!call.empty()) {
    CudaDevice device(value);
    dispatch_element(call.args.dtype, [&](auto type) {
      with_workspace(device, [&](auto& on) { unary_backward_cuda<decltype(type)>(call.args, on); });
    });
  }
  return {call.grad_mask, call.grad_value};
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CUDA, m) {
  m.impl("softmax", DNL_BOX(&dnl::softmax_on_cuda));
  m.impl("softmax_backward", DNL_BOX(&dnl::softmax_backward_on_cuda));
  m.impl("unary_forward", DNL_BOX(&dnl::unary_forward_on_cuda));
  m.impl("unary_backward", DNL_BOX(&dnl::unary_backward_on_cuda));
}
