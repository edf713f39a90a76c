// What an Arm CPU has beyond NEON, and whether this compiler can use it.
#pragma once

// Before version 16, clang declares the functions of BF16 only where the whole file is compiled for it.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define DNL_HAS_NEON_BF16
#endif

#ifdef DNL_HAS_NEON_BF16
#if defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dnl {

inline bool cpu_has_bf16() {
#if defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#elif defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;
#ifdef HWCAP2_BF16  // older C libraries do not name it
  static_assert(kBf16 == HWCAP2_BF16, "bit of AT_HWCAP2");
#endif
  return getauxval(AT_HWCAP2) & kBf16;
#else
  return false;
#endif
}

}  // namespace dnl
#endif
