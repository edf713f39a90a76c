// Chooses the table of kernels for this CPU, once.
#include "core/cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#include "core/cpu/arm_features.h"
#include "core/errors.h"

namespace dnl {

const CpuKernels& kernels_generic();
#if defined(__x86_64__)
const CpuKernels& kernels_avx2();
const CpuKernels& kernels_avx512();
const CpuKernels& kernels_avx512_bf16();
const CpuKernels& kernels_avx512_amx();
#elif defined(__aarch64__)
const CpuKernels& kernels_neon();
#ifdef DNL_HAS_NEON_BF16
const CpuKernels& kernels_neon_bf16();
#endif
#endif

const std::vector<const CpuKernels*>& all_cpu_kernels() {
  static const std::vector<const CpuKernels*> all = {
      &kernels_generic(),
#if defined(__x86_64__)
      &kernels_avx2(),    &kernels_avx512(), &kernels_avx512_bf16(), &kernels_avx512_amx(),
#elif defined(__aarch64__)
      &kernels_neon(),
#ifdef DNL_HAS_NEON_BF16
      &kernels_neon_bf16(),
#endif
#endif
  };
  return all;
}

static const CpuKernels& choose() {
  const char* wanted = std::getenv("DNL_EXT_CPU_CAPABILITY");
  const CpuKernels* best = nullptr;
  for (const CpuKernels* kernels : all_cpu_kernels()) {
    if (!kernels->supported()) continue;
    best = kernels;
    if (wanted && !std::strcmp(wanted, kernels->name)) return *best;
  }
  if (wanted && *wanted)
    throw ValueError(message("DNL_EXT_CPU_CAPABILITY: ", wanted, " is not built or not supported by this CPU"));
  return *best;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace dnl
