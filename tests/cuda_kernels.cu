// Every kernel of csrc, instantiated without torch and without a GPU, to look at what the compiler makes of them
// (cuda_budget.py). The drivers run nowhere: they name the kernels that they would launch.
//
// -DDNL_FUSED: the fused kernels alone.
#include <cuda_runtime.h>

#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/pairwise/fused/forward.cuh"
#include "ops/unary/unary_cuda.cuh"
#include "ops/whiten/standardise_cuda.cuh"
#include "ops/whiten/whiten_cuda.cuh"

namespace dnl {

struct NamingDevice {
  template <class T>
  T* allocate(int64_t) {
    return nullptr;
  }
  template <class... Arguments>
  void product(const Arguments&...) const {}
  Gpu gpu() const { return {}; }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Tasks&, const Arguments&...) const {
    cudaFuncAttributes attributes;
    cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const LaunchShape&, const Arguments&... arguments) const {
    launch(kernel, Tasks(0), arguments...);
  }
};

template <class T>
void name_fused(NamingDevice& device) {
  pairwise_fused_forward_cuda<T>(PairwiseArgs{}, device, ForwardPlan{});
  if constexpr (kHalf<T>)
    fused_backward_map<T>(device, SoftmaxBackwardStep<T>{}, FusedOperand<T>{}, FusedOperand<T>{}, FusedOperand<T>{},
                          FusedOperand<T>{}, nullptr, 0);
}

template <class T>
void name_all(NamingDevice& device) {
  whiten_cuda<T>(WhitenArgs{}, device);
  standardise_cuda<T>(StandardiseArgs{}, device);
  softmax_cuda<T>(SoftmaxArgs{}, device);
  softmax_backward_cuda<T>(SoftmaxArgs{}, device);
  unary_forward_cuda<T>(UnaryArgs{}, device);
  unary_backward_cuda<T>(UnaryArgs{}, device);
  pairwise_forward_cuda<T>(PairwiseArgs{}, device);
  pairwise_backward_cuda<T>(PairwiseArgs{}, device);
  if constexpr (!std::is_same_v<T, double>) name_fused<FusedOf<T>>(device);
}

void name_kernels(NamingDevice& device) {
#ifdef DNL_FUSED
  name_fused<__nv_bfloat16>(device);
  name_fused<__half>(device);
  name_fused<Tf32>(device);
#else
  name_all<double>(device);
  name_all<float>(device);
  name_all<__nv_bfloat16>(device);
  name_all<__half>(device);
#endif
}

}  // namespace dnl
