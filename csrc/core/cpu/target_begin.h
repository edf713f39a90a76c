// Compiles what follows for DNL_TARGET. Standard headers must be included before: the linker keeps one copy of each of
// their inline functions, and a copy compiled for AVX-512 would end the program on other CPUs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/cpu/kernels.h"

#ifdef DNL_TARGET
#if defined(__clang__)
#define DNL_PRAGMA_(x) _Pragma(#x)
#define DNL_PRAGMA(x) DNL_PRAGMA_(x)
DNL_PRAGMA(clang attribute push(__attribute__((target(DNL_TARGET))), apply_to = function))
#else
#pragma GCC push_options
#define DNL_PRAGMA_(x) _Pragma(#x)
#define DNL_PRAGMA(x) DNL_PRAGMA_(x)
DNL_PRAGMA(GCC target(DNL_TARGET))
#if DNL_VECTOR_BYTES == 64  // clang knows no such target, and would leave out all of one that names it
#pragma GCC target("prefer-vector-width=512")
#endif
#endif
#endif
