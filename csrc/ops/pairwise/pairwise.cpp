// Pairwise attention: the CPU route.
#include "core/cpu/kernels.h"
#include "ops/pairwise/pairwise_op.h"

namespace dnl {

using PairwiseForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using PairwiseBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> unary_forward_cpu(const Tensor& mask_logits, const Tensor& value);

// Sixteen multiply-adds take as long as reading an element.
static Executor threads_for(const PairwiseArgs& args) {
  return torch_threads(double(args.batches) * args.keys * (args.width + args.channels) * (1 + args.queries / 16.0));
}

static void run_forward(const PairwiseCall& call, const Tensor& query) {
  if (call.empty()) return;
  const Executor executor = threads_for(call.args);
  const Workspace workspace(query, cpu_kernels().pairwise_forward_workspace(call.args, executor));
  cpu_kernels().pairwise_forward(call.args, workspace.data(), executor);
}

static void run_backward(PairwiseCall& call, const Tensor& query) {
  if (call.empty()) return call.clear_gradients();
  const Executor executor = threads_for(call.args);
  const Workspace workspace(query, cpu_kernels().pairwise_backward_workspace(call.args, executor));
  cpu_kernels().pairwise_backward(call.args, workspace.data(), executor);
}

PairwiseForwardResult pairwise_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const std::optional<Tensor>& mask_logits, double scale,
                                           const std::optional<std::string>& whiten, bool save_residual) {
  PairwiseCall call(query, key, value, mask_logits, scale, whiten, save_residual);
  if (mask_logits) {
    const auto [pooled, mask_lse] = unary_forward_cpu(*mask_logits, value);
    call.set_unary(pooled, mask_lse);
  }
  run_forward(call, query);
  return {call.output, call.stats, call.residual, call.pooled, call.mask_lse};
}

PairwiseBackwardResult pairwise_backward_cpu(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                             const Tensor& value, const std::optional<Tensor>& mask_logits,
                                             const Tensor& output, const Tensor& softmax_stats, const Tensor& residual,
                                             const Tensor& pooled, const Tensor& mask_lse, double scale,
                                             const std::optional<std::string>& whiten, bool need_query, bool need_key,
                                             bool need_value, bool need_mask) {
  PairwiseCall call(grad_output, query, key, value, mask_logits, output, softmax_stats, residual, pooled, mask_lse,
                    scale, whiten, need_query, need_key, need_value, need_mask);
  run_backward(call, query);
  return {call.grad_query, call.grad_key, call.grad_value, call.grad_mask};
}

PairwiseCall::PartForward pairwise_part_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    double scale, bool save_residual) {
  PairwiseCall call(query, key, value, scale, save_residual);
  run_forward(call, query);
  return {call.output, call.stats, call.residual};
}

PairwiseCall::PartBackward pairwise_part_backward_cpu(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& softmax_stats,
                                                      const Tensor& delta, double scale, bool need_query, bool need_key,
                                                      bool need_value) {
  PairwiseCall call(grad_output, query, key, value, softmax_stats, delta, scale, need_query, need_key, need_value);
  run_backward(call, query);
  return {call.grad_query, call.grad_key, call.grad_value};
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CPU, m) {
  m.impl("pairwise_forward", DNL_BOX(&dnl::pairwise_forward_cpu));
  m.impl("pairwise_backward", DNL_BOX(&dnl::pairwise_backward_cpu));
  m.impl("pairwise_part_forward", DNL_BOX(&dnl::pairwise_part_forward_cpu));
  m.impl("pairwise_part_backward", DNL_BOX(&dnl::pairwise_part_backward_cpu));
}
