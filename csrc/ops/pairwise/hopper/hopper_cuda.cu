// Hopper's kernels and what launches them: compiled for 9.0a alone, beside the other files (setup.py).
#include "core/cuda/launch.h"
#include "ops/pairwise/hopper/backward_map.cuh"
#include "ops/pairwise/hopper/forward.cuh"

namespace dnl {

#define DNL_HOPPER_KERNELS(T, Device)                                                                                  \
  template void pairwise_hopper_forward_cuda<T, Device>(const PairwiseArgs&, Device&, const ForwardPlan&);             \
  template void hopper_backward_map<T, Device>(Device&, const SoftmaxBackwardStep<T>&, const Matrix<const T>&,         \
                                               const Matrix<const T>&, const Matrix<const T>&, const Matrix<const T>&, \
                                               float*, int64_t, int64_t, int64_t, int)
DNL_HOPPER_KERNELS(__nv_bfloat16, CudaDevice);
DNL_HOPPER_KERNELS(__half, CudaDevice);
DNL_HOPPER_KERNELS(__nv_bfloat16, WorkspaceSize);
DNL_HOPPER_KERNELS(__half, WorkspaceSize);
#undef DNL_HOPPER_KERNELS

}  // namespace dnl
