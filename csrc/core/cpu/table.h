// The table of one instruction set. DNL_TABLE must come after the target's end, because every CPU runs the code that
// fills it in.
#pragma once

#include "core/cpu/kernels.h"
#include "core/cpu/peak.h"
#include "ops/pairwise/cpu/backward.h"
#include "ops/pairwise/cpu/forward.h"
#include "ops/unary/unary_cpu.h"
#include "ops/whiten/whiten_cpu.h"

#ifdef DNL_BF16_PRODUCTS
#define DNL_HAS_BF16_PRODUCTS true
#else
#define DNL_HAS_BF16_PRODUCTS false
#endif

// clang-format off
#define DNL_TABLE(isa, supported)                                                                                \
  namespace dnl {                                                                                                \
  const CpuKernels& kernels_##isa() {                                                                            \
    static const CpuKernels kernels = {#isa, supported, DNL_HAS_BF16_PRODUCTS,                                   \
                                       isa::multiply_adds_of,                                                    \
                                       isa::standardise_workspace, isa::standardise,                             \
                                       isa::softmax, isa::softmax_backward,                                      \
                                       isa::unary_forward, isa::unary_backward,                                  \
                                       isa::pairwise_forward_workspace, isa::pairwise_forward,                   \
                                       isa::pairwise_backward_workspace, isa::pairwise_backward};                \
    return kernels;                                                                                              \
  }                                                                                                              \
  }
// clang-format on
