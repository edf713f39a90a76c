// mean_subtract: schema, checks and the CPU route.
#include "ops/whiten/whiten.h"

#include "core/cpu/kernels.h"
#include "core/operator.h"
#include "ops/whiten/whiten_op.h"

namespace dnl {

Tensor mean_subtract_cpu(const Tensor& x, int64_t dim) {
  WhitenCall call(x, dim);
  if (call.empty()) return call.output;
  cpu_kernels().whiten(call.args, torch_threads());
  return call.output;
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_FRAGMENT(dnl_ext, m) { m.def("mean_subtract(Tensor x, int dim) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CPU, m) { m.impl("mean_subtract", TORCH_BOX(&dnl::mean_subtract_cpu)); }
