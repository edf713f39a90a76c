// Pairwise attention: the CUDA route.
#include "core/cuda/launch.h"
#include "core/tf32.h"
#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/pairwise/fused/forward.cuh"
#include "ops/pairwise/pairwise_op.h"
#include "ops/pairwise/path_choice.h"

namespace dnl {

using PairwiseForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using PairwiseBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> unary_forward_on_cuda(const Tensor& mask_logits, const Tensor& value);

template <class T>
PairwisePlan plan_of(const PairwiseArgs& args, const Tensor& query, const Gpu& gpu, bool backward) {
  return choose_path({query.get_device_index(), backward, gpu, shape_of<T>(args)}, &tf32_allowed);
}

static void run_forward(const PairwiseCall& call, const Tensor& query) {
  if (call.empty()) return;
  CudaDevice device(query);
  dispatch_element(call.args.dtype, [&](auto type) {
    using T = decltype(type);
    const PairwisePlan plan = plan_of<T>(call.args, query, device.gpu(), false);
    with_workspace(device, [&](auto& on) {
      if constexpr (kHalf<T>)
        if (plan.hopper) return pairwise_hopper_forward_cuda<T>(call.args, on, plan.forward);
      if constexpr (!std::is_same_v<T, double>)
        if (plan.fused) return pairwise_fused_forward_cuda<FusedOf<T>>(call.args, on, plan.forward);
      pairwise_forward_cuda<T>(call.args, on);
    });
  });
}

static void run_backward(PairwiseCall& call, const Tensor& query) {
  if (call.empty()) return call.clear_gradients();
  CudaDevice device(query);
  dispatch_element(call.args.dtype, [&](auto type) {
    using T = decltype(type);
    const PairwisePlan plan = plan_of<T>(call.args, query, device.gpu(), true);
    const BackwardMap map{plan.hopper  ? BackwardMap::hopper
                          : plan.fused ? BackwardMap::fused
                                       : BackwardMap::products,
                          device.gpu().multiprocessors};
    with_workspace(device, [&](auto& on) { pairwise_backward_cuda<T>(call.args, on, {}, map); });
  });
}

PairwiseForwardResult pairwise_forward_on_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                               const std::optional<Tensor>& mask_logits, double scale,
                                               const std::optional<std::string>& whiten, bool save_residual) {
  PairwiseCall call(query, key, value, mask_logits, scale, whiten, save_residual);
  if (mask_logits) {
    const auto [pooled, mask_lse] = unary_forward_on_cuda(*mask_logits, value);
    call.set_unary(pooled, mask_lse);
  }
  run_forward(call, query);
  return {call.output, call.stats, call.residual, call.pooled, call.mask_lse};
}

PairwiseBackwardResult pairwise_backward_on_cuda(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                                 const Tensor& value, const std::optional<Tensor>& mask_logits,
                                                 const Tensor& output, const Tensor& softmax_stats,
                                                 const Tensor& residual, const Tensor& pooled, const Tensor& mask_lse,
                                                 double scale, const std::optional<std::string>& whiten,
                                                 bool need_query, bool need_key, bool need_value, bool need_mask) {
  PairwiseCall call(grad_output, query, key, value, mask_logits, output, softmax_stats, residual, pooled, mask_lse,
                    scale, whiten, need_query, need_key, need_value, need_mask);
  run_backward(call, query);
  return {call.grad_query, call.grad_key, call.grad_value, call.grad_mask};
}

PairwiseCall::PartForward pairwise_part_forward_on_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                                        double scale, bool save_residual) {
  PairwiseCall call(query, key, value, scale, save_residual);
  run_forward(call, query);
  return {call.output, call.stats, call.residual};
}

PairwiseCall::PartBackward pairwise_part_backward_on_cuda(const Tensor& grad_output, const Tensor& query,
                                                          const Tensor& key, const Tensor& value,
                                                          const Tensor& softmax_stats, const Tensor& delta,
                                                          double scale, bool need_query, bool need_key,
                                                          bool need_value) {
  PairwiseCall call(grad_output, query, key, value, softmax_stats, delta, scale, need_query, need_key, need_value);
  run_backward(call, query);
  return {call.grad_query, call.grad_key, call.grad_value};
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CUDA, m) {
  m.impl("pairwise_forward", DNL_BOX(&dnl::pairwise_forward_on_cuda));
  m.impl("pairwise_backward", DNL_BOX(&dnl::pairwise_backward_on_cuda));
  m.impl("pairwise_part_forward", DNL_BOX(&dnl::pairwise_part_forward_on_cuda));
  m.impl("pairwise_part_backward", DNL_BOX(&dnl::pairwise_part_backward_on_cuda));
}
