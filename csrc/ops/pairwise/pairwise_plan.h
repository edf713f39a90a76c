// Which CUDA path a call of pairwise attention takes, with which tiles, and why: host code that needs no GPU.
//
//   path    for
//   chain   every size and type
//   fused   16-bit types, and float where TF32 is allowed; forward with Dqk <= 256 and tiles that fit
//   hopper  16-bit types on compute capability 9.0; forward with Dqk <= 256 (hopper_plan.h)
//
// All need sm_80: the chain for its products of bfloat16 with float results, the fused one for mma.sync in its types.
// The path is that of DNL_EXT_CUDA_PATH, else what this GPU was found to prefer (path_choice.h), else the chain.
//
// Tiles of the fused forward, in order of preference. The first that serves all channels in one slice is taken, else
// the one with the fewest slices; slices shrink until they fit.
//
//   queries x keys   channels of a slice   KiB with Dqk = 256 and a full slice: rows, channel-first
//                                          16-bit types      TF32, which has one order
//   128 x 64         at most 256           152, 160          299
//   64 x 64          at most 512           142, 155          285
//   64 x 32          at most 512           89, 103           181
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string>

#include "core/errors.h"
#include "core/types.h"
#include "ops/pairwise/hopper/hopper_plan.h"

namespace dnl {

// Shared memory a block can have on an architecture (CUDA C++ programming guide, table of technical specifications).
inline int shared_bytes_of(int capability) {
  if (capability < 80) return 48 << 10;
  if (capability == 80 || capability == 87) return 163 << 10;
  if (capability < 90 || capability >= 120) return 99 << 10;
  return 227 << 10;
}

struct PairwiseShape {
  DType dtype = DType::bf16;
  bool tf32 = false;  // products of float may round their operands to TF32
  int64_t batches = 1, queries = 1, keys = 1, width = 1, channels = 1;
  bool query_channel_first = false, key_channel_first = false, value_channel_first = false;

  // The order in which the fused kernels read all operands: that of most of them.
  bool channel_first() const { return query_channel_first + key_channel_first + value_channel_first >= 2; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Tiles of the fused forward
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kFusedWidth = 256;  // most Dqk of the fused forward: a whole tile of queries stays in shared memory

struct ForwardTile {
  int queries, keys, channels;
};
constexpr ForwardTile kForwardTiles[] = {{128, 64, 256}, {64, 64, 512}, {64, 32, 512}};

// Where things lie in a block's shared memory, in bytes from its start.
struct ForwardShared {
  int query, key, value, probability, statistics, bytes;
};
constexpr int kStatisticsBytes = 2048;          // two floats per query and column group of warps
constexpr int kStagingBytes = 8 * 32 * 33 * 4;  // of results on their way out, in place of the tiles

struct ForwardPlan {
  int tile = 0;   // index into kForwardTiles
  int width = 0;  // Dqk, padded
  bool channel_first = false;
  int slices = 0;          // passes over the keys, each for slice_channels of the values
  int slice_channels = 0;  // a multiple of 16 per column group of warps
  int splits = 1;          // blocks that share the keys of a tile of queries
  ForwardShared shared{};
};

// Eight warps, each with 32 queries and 128 channels of the output.
constexpr int column_groups_of(const ForwardTile& tile) { return 8 * 32 / tile.queries; }

// Tiles hold elements of 2 bytes or, for TF32, of 4. What products sum over is padded to whole steps.
constexpr int kLine = 16, kDepthStepBytes = 128;
constexpr int element_bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Bytes of a tile of `outer` rows of `inner` elements each, and of a line that each row is longer: with an odd number
// of lines to a row, the eight rows that ldmatrix reads together lie in different banks.
constexpr int tile_bytes(int outer, int inner, int element) { return outer * (inner * element + kLine); }

// The fused backward makes tiles of the map, kMapTile x kMapTile, from kMapDepth channels at a time in kMapStages
// buffers or, where those do not fit, in two.
constexpr int kMapTile = 128, kMapDepth = 64, kMapStages = 4;
constexpr int kMapOperandBytes = std::max(tile_bytes(kMapTile, kMapDepth, 2), tile_bytes(kMapDepth, kMapTile, 2));
constexpr int kMapSumsBytes = 8 * kMapTile * 4;  // of rows and columns
constexpr int map_shared_bytes(int stages) { return 2 * stages * kMapOperandBytes + kMapSumsBytes; }
inline int map_stages(const Gpu& gpu) { return gpu.shared_bytes >= map_shared_bytes(kMapStages) ? kMapStages : 2; }

// Of Tf32, queries and keys lie by rows and values channel-first (fused/tile.cuh).
inline ForwardShared forward_shared(const ForwardTile& tile, int width, int slice_channels, int element,
                                    bool channel_first) {
  const auto operand = [&](int positions, int channels, bool first) {
    return first ? tile_bytes(channels, positions, element) : tile_bytes(positions, channels, element);
  };
  const bool logits_first = element == 2 && channel_first, value_first = element == 4 || channel_first;
  ForwardShared shared{};
  shared.query = 0;
  shared.key = shared.query + operand(tile.queries, width, logits_first);
  shared.value = shared.key + operand(tile.keys, width, logits_first);
  shared.probability = shared.value + operand(tile.keys, slice_channels, value_first);
  shared.statistics = shared.probability + tile_bytes(tile.queries, tile.keys, element);
  shared.bytes = std::max(shared.statistics + kStatisticsBytes, kStagingBytes);
  return shared;
}

// Blocks that share the keys of one tile of queries: whole waves of the chip, counted in tiles of keys that one
// multiprocessor passes, where a split costs about as much as kSplitCost tiles for its prologue and its part of the
// merge.
constexpr int kMaxSplits = 8, kSplitCost = 4;
inline int forward_splits(int64_t blocks, int64_t key_tiles, int multiprocessors) {
  int best = 1;
  int64_t best_cost = 0;
  for (int splits = 1; splits <= kMaxSplits && splits <= key_tiles; ++splits) {
    const int64_t waves = (blocks * splits + multiprocessors - 1) / multiprocessors;
    const int64_t cost = waves * ((key_tiles + splits - 1) / splits + (splits > 1 ? kSplitCost : 0));
    if (splits == 1 || cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

inline ForwardPlan plan_fused_forward(const PairwiseShape& shape, const Gpu& gpu) {
  ForwardPlan best;
  const int element = element_bytes_of(shape.dtype), step_depth = kDepthStepBytes / element;
  const int width = static_cast<int>((shape.width + step_depth - 1) / step_depth * step_depth);
  const bool channel_first = shape.channel_first();
  for (int index = 0; index < int(std::size(kForwardTiles)); ++index) {
    const ForwardTile& tile = kForwardTiles[index];
    const int step = 16 * column_groups_of(tile);
    int most = tile.channels;
    while (most > 0 && forward_shared(tile, width, most, element, channel_first).bytes > gpu.shared_bytes) most -= step;
    if (most <= 0) continue;
    const int64_t slices = (shape.channels + most - 1) / most;
    if (best.slices && slices >= best.slices) continue;
    best.tile = index;
    best.width = width;
    best.channel_first = channel_first;
    best.slices = static_cast<int>(slices);
    best.slice_channels = static_cast<int>(((shape.channels + slices - 1) / slices + step - 1) / step * step);
  }
  if (best.slices == 0) return best;  // nothing fits
  const ForwardTile& tile = kForwardTiles[best.tile];
  best.shared = forward_shared(tile, width, best.slice_channels, element, channel_first);
  const int64_t blocks = shape.batches * ((shape.queries + tile.queries - 1) / tile.queries);
  best.splits = forward_splits(blocks, (shape.keys + tile.keys - 1) / tile.keys, gpu.multiprocessors);
  return best;
}

// Hopper's forward: tiles of kForwardTiles[kHopperForwardTile], slices of all its channels, side by side.
inline ForwardPlan plan_hopper_forward(const PairwiseShape& shape, const Gpu& gpu) {
  const ForwardTile& tile = kForwardTiles[kHopperForwardTile];
  ForwardPlan plan;
  plan.tile = kHopperForwardTile;
  plan.slices = static_cast<int>((shape.channels + tile.channels - 1) / tile.channels);
  plan.slice_channels = tile.channels;
  const int64_t blocks = shape.batches * ((shape.queries + tile.queries - 1) / tile.queries) * plan.slices;
  plan.splits = forward_splits(blocks, (shape.keys + tile.keys - 1) / tile.keys, gpu.multiprocessors);
  plan.shared.bytes = kHopperForwardBytes;
  return plan;
}

// ---------------------------------------------------------------------------------------------------------------------
// The choice
// ---------------------------------------------------------------------------------------------------------------------

enum class CudaPath { by_default, chain, fused, hopper };

struct NamedPath {
  const char* name;
  CudaPath path;
};
constexpr NamedPath kCudaPaths[] = {
    {"chain", CudaPath::chain}, {"fused", CudaPath::fused}, {"hopper", CudaPath::hopper}};

inline const char* name_of(CudaPath path) {
  for (const NamedPath& known : kCudaPaths)
    if (known.path == path) return known.name;
  return "";
}

// The path of a name, by_default for none; `source` said it.
inline CudaPath path_named(const std::string& name, const char* source) {
  if (name.empty()) return CudaPath::by_default;
  std::string expected;
  for (const NamedPath& known : kCudaPaths) {
    if (name == known.name) return known.path;
    expected += message(expected.empty() ? "'" : ", '", known.name, "'");
  }
  throw ValueError(message(source, ": expected one of ", expected, ", got '", name, "'"));
}

// What DNL_EXT_CUDA_PATH asks for.
inline CudaPath path_of_environment() {
  const char* value = std::getenv("DNL_EXT_CUDA_PATH");
  return path_named(value ? value : "", "DNL_EXT_CUDA_PATH");
}

constexpr int kOldestCapability = 80;

struct PairwisePlan {
  bool fused = false, hopper = false;  // neither: the chain
  bool advised = false;                // it is what was advised
  std::string why;
  ForwardPlan forward{};  // of a fused forward
};

// Whether any path but the chain may take calls of this kind.
inline bool has_choice(const PairwiseShape& shape, const Gpu& gpu, bool backward) {
  return gpu.capability >= kOldestCapability && shape.dtype != DType::f64 && !(shape.dtype == DType::f32 && backward);
}

// Whether the path depends on shape.tf32: only then need torch be asked. `wanted`: what is requested or advised.
inline bool tf32_matters(const PairwiseShape& shape, const Gpu& gpu, CudaPath wanted, bool backward) {
  const bool other = wanted != CudaPath::by_default && wanted != CudaPath::chain;
  return shape.dtype == DType::f32 && other && has_choice(shape, gpu, backward);
}

// Why the fused path cannot take a call; empty where it can.
inline std::string fused_obstacle(const PairwiseShape& shape, const Gpu& gpu, bool backward) {
  if (shape.dtype == DType::f64 || (shape.dtype == DType::f32 && !shape.tf32))
    return message("the fused path takes bfloat16 and float16, and float32 where TF32 is allowed; got ",
                   shape.dtype == DType::f32 ? "float32 without TF32" : "float64");
  if (shape.channels == 0) return "the fused path needs value channels, got none";
  if (!backward && shape.width > kFusedWidth)
    return message("the fused forward takes at most ", kFusedWidth, " query channels, got ", shape.width);
  if (backward && gpu.shared_bytes < map_shared_bytes(2))
    return message("the fused backward needs ", map_shared_bytes(2), " bytes of shared memory, the GPU has ",
                   gpu.shared_bytes);
  return "";
}

// `request`: what the call must take; where it leaves the choice, `advised` is taken if it can run.
inline PairwisePlan plan_pairwise(const PairwiseShape& shape, const Gpu& gpu, CudaPath request, bool backward,
                                  CudaPath advised = CudaPath::by_default, bool hopper_built = kHopperBuilt) {
  if (gpu.capability < kOldestCapability)
    throw NotImplementedError(message("attention on CUDA needs compute capability 8.0 or later, got ",
                                      gpu.capability / 10, ".", gpu.capability % 10));
  PairwisePlan plan;
  const bool asked = request != CudaPath::by_default;
  const CudaPath wanted = asked ? request : advised;
  if (wanted != CudaPath::hopper && shape.dtype == DType::f32 && backward) {
    plan.why = "the backward of float32 makes its softmax again, which the chain does";
    return plan;
  }
  std::string obstacle;
  if (wanted == CudaPath::hopper) {
    obstacle = hopper_obstacle(shape, gpu, backward, kFusedWidth, hopper_built);
    if (obstacle.empty() && !backward) plan.forward = plan_hopper_forward(shape, gpu);
  } else {
    obstacle = fused_obstacle(shape, gpu, backward);
    if (obstacle.empty() && !backward) {
      plan.forward = plan_fused_forward(shape, gpu);
      if (plan.forward.slices == 0) obstacle = "no tile of the fused forward fits into the GPU's shared memory";
    }
  }
  const bool other = wanted == CudaPath::fused || wanted == CudaPath::hopper;  // than the chain, which can always
  const bool can = !other || obstacle.empty();
  if (asked && !can) throw NotImplementedError(message("DNL_EXT_CUDA_PATH=", name_of(request), ": ", obstacle));
  plan.fused = wanted == CudaPath::fused && can;
  plan.hopper = wanted == CudaPath::hopper && can;
  plan.advised = !asked && wanted != CudaPath::by_default && can;
  plan.why = asked               ? message("DNL_EXT_CUDA_PATH=", name_of(request))
             : !obstacle.empty() ? obstacle
             : plan.advised      ? "found to be best on this GPU"
                                 : "the default: nothing has measured the paths on this GPU";
  return plan;
}

}  // namespace dnl
