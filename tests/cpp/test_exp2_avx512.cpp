// exp2 and vectors of 16 bits by AVX-512's instructions, where the CPU has them.
#include <cmath>
#include <cstdio>
#include <limits>

#include "check.h"

#if defined(__x86_64__)
#define DNL_ISA checked
#define DNL_VECTOR_BYTES 64
#define DNL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "core/cpu/target_begin.h"
// clang-format off
#include "exp2_checks.h"
#include "core/cpu/target_end.h"
// clang-format on

int main() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    test_vectors();
  } else {
    std::puts("this CPU has no AVX-512: nothing was checked");
  }
  return report();
}
#else
int main() { return report(); }
#endif
