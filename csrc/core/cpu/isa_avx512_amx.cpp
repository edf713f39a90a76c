// The CPU kernels for AVX-512 with AMX tiles: attention of bfloat16. All else is what isa_avx512_bf16.cpp has.
#if defined(__x86_64__)
#define DNL_AMX
#define DNL_BF16_PRODUCTS
#define DNL_ISA avx512_amx
#define DNL_VECTOR_BYTES 64
#define DNL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"
#include "core/cpu/target_begin.h"
// clang-format off
#include "ops/pairwise/cpu/backward.h"
#include "ops/pairwise/cpu/forward.h"
// clang-format on

namespace dnl {
namespace DNL_ISA {

// Whether tiles compute what they should: 23 x 64 sums over 96 products of small integers, which are exact.
static bool tiles_are_right() {
  constexpr int64_t kRows = 23, kDepth = 96;
  const auto left = [](int64_t r, int64_t k) { return static_cast<int>((r * 7 + k * 3) % 11) - 5; };
  const auto right = [](int64_t k, int64_t lane) { return static_cast<int>((k * 5 + lane) % 13) - 6; };
  std::vector<bf16> a(kRows * kDepth), b(kDepth * kPanelLanes);
  std::vector<float> c(kRows * kPanelLanes, 1.0f);
  for (int64_t k = 0; k < kDepth; ++k) {
    for (int64_t r = 0; r < kRows; ++r) a[r * kDepth + k] = narrow<bf16>(float(left(r, k)));
    for (int64_t lane = 0; lane < kPanelLanes; ++lane)
      b[k / 2 * 2 * kPanelLanes + 2 * lane + k % 2] = narrow<bf16>(float(right(k, lane)));
  }
  tile_product(kRows, 1, kDepth, RowOperand<bf16>{a.data(), kDepth, kDepth, 0}, PanelOperand<bf16>{b.data(), 0},
               PanelResult<float>{c.data(), 0}, false);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
      int sum = 1;
      for (int64_t k = 0; k < kDepth; ++k) sum += left(r, k) * right(k, lane);
      if (c[r * kPanelLanes + lane] != float(sum)) return false;
    }
  return true;
}

// As multiply_adds of core/cpu/peak.h: the four products of a block, without its loads.
static int64_t tile_multiply_adds(int64_t steps) {
  Tiles tiles;
  tiles.configure(TileConfig(kTileRows, kTileRows));
  tiles.zero<kSum>(), tiles.zero<kSum + 1>(), tiles.zero<kSum + 2>(), tiles.zero<kSum + 3>();
  tiles.zero<kLeft>(), tiles.zero<kLeft + 1>(), tiles.zero<kRight>(), tiles.zero<kRight + 1>();
  for (int64_t s = 0; s < steps; ++s) {
    tiles.multiply<kSum, kLeft, kRight>();
    tiles.multiply<kSum + 1, kLeft, kRight + 1>();
    tiles.multiply<kSum + 2, kLeft + 1, kRight>();
    tiles.multiply<kSum + 3, kLeft + 1, kRight + 1>();
  }
  tiles.release();
  return steps * 4 * kTileRows * kTileLanes * kTileDepth;
}

}  // namespace DNL_ISA
}  // namespace dnl

#include "core/cpu/amx_permission.h"
#include "core/cpu/target_end.h"

namespace dnl {

const CpuKernels& kernels_avx512_bf16();

const char* amx_state() {
  static const char* const state = [] {
    if (!kernels_avx512_bf16().supported() || !cpu_has_amx()) return "none";
    if (!request_amx()) return "refused by the operating system";
    return avx512_amx::tiles_are_right() ? "in use" : "left out: a product came out wrong";
  }();
  return state;
}

const CpuKernels& kernels_avx512_amx() {
  static const CpuKernels kernels = [] {
    CpuKernels k = kernels_avx512_bf16();
    k.name = "avx512_amx";
    k.supported = [] { return !std::strcmp(amx_state(), "in use"); };
    k.multiply_adds = [](DType dtype, int64_t steps) {
      if (dtype == DType::bf16) return avx512_amx::tile_multiply_adds(steps);
      return kernels_avx512_bf16().multiply_adds(dtype, steps);
    };
    k.pairwise_forward_workspace = [](const PairwiseArgs& args, const Executor& executor) {
      if (args.dtype == DType::bf16) return avx512_amx::pairwise_forward_workspace(args, executor);
      return kernels_avx512_bf16().pairwise_forward_workspace(args, executor);
    };
    k.pairwise_forward = [](const PairwiseArgs& args, void* workspace, const Executor& executor) {
      if (args.dtype == DType::bf16) return avx512_amx::pairwise_forward(args, workspace, executor);
      kernels_avx512_bf16().pairwise_forward(args, workspace, executor);
    };
    k.pairwise_backward_workspace = [](const PairwiseArgs& args, const Executor& executor) {
      if (args.dtype == DType::bf16) return avx512_amx::pairwise_backward_workspace(args, executor);
      return kernels_avx512_bf16().pairwise_backward_workspace(args, executor);
    };
    k.pairwise_backward = [](const PairwiseArgs& args, void* workspace, const Executor& executor) {
      if (args.dtype == DType::bf16) return avx512_amx::pairwise_backward(args, workspace, executor);
      kernels_avx512_bf16().pairwise_backward(args, workspace, executor);
    };
    return k;
  }();
  return kernels;
}

}  // namespace dnl
#else
namespace dnl {
const char* amx_state() { return "none"; }
}  // namespace dnl
#endif
