// Which calls Hopper's kernels take (compute capability 9.0): host code that needs no GPU.
//
// The kernels have code for 9.0a alone, so a build has them only where TORCH_CUDA_ARCH_LIST names it.
#pragma once

#include <cstdint>
#include <string>

#include "core/errors.h"
#include "core/types.h"

namespace dnl {

// DNL_EXT_HOPPER is set by setup.py where the build has code for 9.0a, and by tests that emulate it.
#ifdef DNL_EXT_HOPPER
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

constexpr int kHopperForwardTile = 0;        // of kForwardTiles (pairwise_plan.h)
constexpr int kHopperForwardBytes = 230744;  // of shared memory, for every size (hopper/forward.cuh)

// Why Hopper's kernels cannot take a call; empty where they can. Shape is PairwiseShape (pairwise_plan.h).
template <class Shape>
std::string hopper_obstacle(const Shape& shape, const Gpu& gpu, bool backward, int most_width, bool built) {
  if (shape.dtype != DType::bf16 && shape.dtype != DType::f16)
    return message("the Hopper path takes bfloat16 and float16, got ",
                   shape.dtype == DType::f32 ? "float32" : "float64");
  if (gpu.capability != 90)
    return message("the Hopper path needs compute capability 9.0, got ", gpu.capability / 10, ".", gpu.capability % 10);
  if (!built) return "the Hopper path needs a build with 9.0a in TORCH_CUDA_ARCH_LIST";
  if (shape.width == 0 || shape.channels == 0)
    return message("the Hopper path needs query and value channels, got ", shape.width, " and ", shape.channels);
  if (!backward && shape.width > most_width)
    return message("the Hopper forward takes at most ", most_width, " query channels, got ", shape.width);
  return "";
}

}  // namespace dnl
