// Hopper's kernels and what launches them: compiled for 9.0a alone, beside the other files (setup.py).
#include "core/cuda/launch.h"
#include "ops/pairwise/hopper/backward_map.cuh"

namespace dnl {

#define DNL_BACKWARD_MAP(T)                                                                                            \
  template void hopper_backward_map<T, CudaDevice>(CudaDevice&, const SoftmaxBackwardStep<T>&, const Matrix<const T>&, \
                                                   const Matrix<const T>&, const Matrix<const T>&,                     \
                                                   const Matrix<const T>&, float*, int64_t, int64_t, int64_t, int)
DNL_BACKWARD_MAP(__nv_bfloat16);
DNL_BACKWARD_MAP(__half);
#undef DNL_BACKWARD_MAP

}  // namespace dnl
