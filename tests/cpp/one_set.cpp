// For a program that tests one instruction set: DNL_SET, the function that has its table, is all there is.
#include "core/cpu/kernels.h"

namespace dnl {

const CpuKernels& DNL_SET();

const std::vector<const CpuKernels*>& all_cpu_kernels() {
  static const std::vector<const CpuKernels*> all = {&DNL_SET()};
  return all;
}
const CpuKernels& cpu_kernels() { return DNL_SET(); }

}  // namespace dnl
