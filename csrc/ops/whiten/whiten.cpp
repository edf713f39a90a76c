// mean_subtract and whiten: checks and the CPU route.
#include "ops/whiten/whiten.h"

#include "core/cpu/kernels.h"
#include "core/operator.h"
#include "ops/whiten/whiten_op.h"

namespace dnl {

template <class Args>
static Executor threads_for(const Args& args) {
  return torch_threads(double(args.batches) * args.positions * args.channels);
}

Tensor mean_subtract_cpu(const Tensor& x, int64_t dim) {
  WhitenCall call(x, dim);
  if (call.empty()) return call.output;
  cpu_kernels().standardise(mean_of_columns(call.args), nullptr, threads_for(call.args));
  return call.output;
}

static void run(const StandardiseCall& call) {
  if (call.empty()) return;
  const Workspace workspace(call.output, cpu_kernels().standardise_workspace(call.args) * sizeof(double));
  cpu_kernels().standardise(call.args, static_cast<double*>(workspace.data()), threads_for(call.args));
}

std::tuple<Tensor, Tensor> whiten_forward_cpu(const Tensor& x, const std::string& name, int64_t apart, double eps) {
  StandardiseCall call(x, name, apart, eps);
  run(call);
  return {call.output, call.rstd};
}

Tensor whiten_backward_cpu(const Tensor& grad_output, const Tensor& output, const Tensor& rstd, const std::string& name,
                           int64_t apart, double eps) {
  StandardiseCall call(grad_output, name, apart, eps, &output, &rstd);
  run(call);
  return call.output;
}

}  // namespace dnl

STABLE_TORCH_LIBRARY_IMPL(dnl_ext, CPU, m) {
  m.impl("mean_subtract", DNL_BOX(&dnl::mean_subtract_cpu));
  m.impl("whiten_forward", DNL_BOX(&dnl::whiten_forward_cpu));
  m.impl("whiten_backward", DNL_BOX(&dnl::whiten_backward_cpu));
}
