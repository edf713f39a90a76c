// What the rest of the library calls of Hopper's kernels. They are compiled in a file of their own (hopper_cuda.cu),
// for 9.0a alone; where a build leaves it out, nothing of them is linked, and no plan asks for them (hopper_plan.h).
#pragma once

#include <stdexcept>

#include "core/cuda/workspace.h"
#include "ops/pairwise/chain/backward_map.cuh"
#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

// Whether a device runs what it is given: a WorkspaceSize has no memory that a tensor map could describe.
template <class Device>
constexpr bool kRuns = !std::is_same_v<Device, WorkspaceSize>;

// P', dS' and the sums of dS' of a chunk, as step asks; step.logits and step.grad_probability are not read. Operands
// are what product_operand() leaves. `multiprocessors`: as many blocks are launched.
template <class T, class Device>
void hopper_backward_map(Device& device, const SoftmaxBackwardStep<T>& step,
                         const Matrix<const T>& key,    // (group, rows, width)
                         const Matrix<const T>& query,  // (group, columns, width)
                         const Matrix<const T>& value,  // (group, rows, channels)
                         const Matrix<const T>& grad,   // (group, columns, channels)
                         float* row_part,               // (group, rows, tiles of columns), or null as step.row_sum is
                         int64_t group, int64_t width, int64_t channels, int multiprocessors)
#ifdef DNL_EXT_HOPPER
    ;
#else
{
  throw std::logic_error("dnl_ext: built without kernels for 9.0a");
}
#endif

// Forward of halves; the plan is that of a Hopper path.
template <class T, class Device>
void pairwise_hopper_forward_cuda(const PairwiseArgs& args, Device& device, const ForwardPlan& plan)
#ifdef DNL_EXT_HOPPER
    ;
#else
{
  throw std::logic_error("dnl_ext: built without kernels for 9.0a");
}
#endif

}  // namespace dnl
