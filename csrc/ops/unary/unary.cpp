// softmax and unary pooling: the CPU route.
#include "core/cpu/kernels.h"
#include "ops/unary/unary_op.h"

namespace dnl {

// An exponential takes as long as four elements.
static Executor threads_for(const SoftmaxArgs& args) { return torch_threads(4.0 * args.rows * args.columns); }
static Executor threads_for(const UnaryArgs& args) {
  return torch_threads(double(args.batches) * args.keys * (4 + args.channels));
}

Tensor softmax_cpu(const Tensor& x) {
  SoftmaxCall call("x", x);
  if (!call.empty()) cpu_kernels().softmax(call.args, threads_for(call.args));
  return call.output;
}

Tensor softmax_backward_cpu(const Tensor& grad_output, const Tensor& output) {
  SoftmaxCall call("grad_output", grad_output, &output);
  if (!call.empty()) cpu_kernels().softmax_backward(call.args, threads_for(call.args));
  return call.output;
}

std::tuple<Tensor, Tensor> unary_forward_cpu(const Tensor& mask_logits, const Tensor& value) {
  UnaryCall call(mask_logits, value);
  if (!call.empty()) cpu_kernels().unary_forward(call.args, threads_for(call.args));
  return {call.pooled, call.lse};
}

std::tuple<Tensor, Tensor> unary_backward_cpu(const Tensor& grad_pooled, const Tensor& mask_logits, const Tensor& value,
                                              const Tensor& pooled, const Tensor& lse, bool need_mask,
                                              bool need_value) {
  UnaryCall call(grad_pooled, mask_logits, value, pooled, lse, need_mask, need_value);
  if (!call.empty()) cpu_kernels().unary_backward(call.args, threads_for(call.args));
  return {call.grad_mask, call.grad_value};
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CPU, m) {
  m.impl("softmax", DNL_BOX(&dnl::softmax_cpu));
  m.impl("softmax_backward", DNL_BOX(&dnl::softmax_backward_cpu));
  m.impl("unary_forward", DNL_BOX(&dnl::unary_forward_cpu));
  m.impl("unary_backward", DNL_BOX(&dnl::unary_backward_cpu));
}
