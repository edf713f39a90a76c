// The CPU kernels, compiled once per instruction set and chosen at run time.
//
// core/cpu/isa_*.cpp each compile the same kernel sources (ops/*/*_cpu.h) for one instruction set and export a table of
// entry points. cpu_kernels() picks the best one this CPU has; DNL_EXT_CPU_CAPABILITY (generic; avx2, avx512,
// avx512_bf16, avx512_amx; neon, neon_bf16) forces a lesser one, for tests.
#pragma once

#include <vector>

#include "core/errors.h"
#include "core/types.h"
#include "ops/pairwise/pairwise.h"
#include "ops/unary/unary.h"
#include "ops/whiten/whiten.h"

namespace dnl {

struct CpuKernels {
  const char* name;
  bool (*supported)();
  bool bf16_products;  // multiplies bf16 by bf16 into fp32; otherwise halves are widened to fp32 first
  // Multiply-adds on registers alone, for cpu_peak(): how many it ran, of the type in which `dtype` is multiplied.
  int64_t (*multiply_adds)(DType dtype, int64_t steps);

  int64_t (*standardise_workspace)(const StandardiseArgs&);  // in doubles
  void (*standardise)(const StandardiseArgs&, double* workspace, const Executor&);
  void (*softmax)(const SoftmaxArgs&, const Executor&);
  void (*softmax_backward)(const SoftmaxArgs&, const Executor&);
  void (*unary_forward)(const UnaryArgs&, const Executor&);
  void (*unary_backward)(const UnaryArgs&, const Executor&);
  // Workspace sizes in bytes; the operator allocates once per call.
  size_t (*pairwise_forward_workspace)(const PairwiseArgs&, const Executor&);
  void (*pairwise_forward)(const PairwiseArgs&, void* workspace, const Executor&);
  size_t (*pairwise_backward_workspace)(const PairwiseArgs&, const Executor&);
  void (*pairwise_backward)(const PairwiseArgs&, void* workspace, const Executor&);
};

// Every table that was built, best last.
DNL_EXPORT const std::vector<const CpuKernels*>& all_cpu_kernels();
// What came of AMX here: "in use", or why it is not.
DNL_EXPORT const char* amx_state();
// The table in use.
DNL_EXPORT const CpuKernels& cpu_kernels();
// Floating-point operations per second (two for a multiply-add) of `threads` threads whose operands never leave the
// registers: what no kernel of this instruction set can exceed here. Runs for about a tenth of a second.
DNL_EXPORT double cpu_peak(const CpuKernels& kernels, DType dtype, int threads);

}  // namespace dnl
