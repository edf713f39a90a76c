// The emulator itself: every feature with a kernel that passes, and a wrong twin (twins.h) that must be found.
// tests/kernels/test_emulator.py builds this program in all the ways that show faults.
#include <cmath>
#include <limits>

// clang-format off
#include "twins.h"
#include "twin_test.h"
// clang-format on

namespace {

using namespace dnl;
using namespace twins;
using emulator::Turns;

using Kernel = void (*)(float*, const float*);
using Want = float (*)(int index);

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What a kernel makes of `count` values `before`.
std::vector<float> outputs(Kernel kernel, const LaunchShape& shape, int count, float before = kNaN) {
  static const std::vector<float4> memory = [] {  // aligned to 16
    std::vector<float4> input(kTiles * kBlock);
    for (int i = 0; i < int(input.size() * 4); ++i) reinterpret_cast<float*>(input.data())[i] = float(i);
    return input;
  }();
  std::vector<float> out(count, before);
  const auto* in = reinterpret_cast<const float*>(memory.data());
  emulator::Launcher().launch(kernel, shape, out.data(), in);
  return out;
}

bool same(const std::vector<float>& got, Want want) {
  for (size_t i = 0; i < got.size(); ++i)
    if (!(got[i] == want(int(i)))) return false;
  return true;
}

struct KernelPair {
  const char* name;
  Kernel right, wrong;
  LaunchShape shape;
  int count;
  Want want;
  By by;
  const char* text = "";  // of the message
  float before = kNaN;
};

const Want identity = [](int i) { return float(i); };
const Want reversed = [](int i) { return float(i / kBlock * kBlock + kBlock - 1 - i % kBlock); };
const Want tiles = [](int i) { return float((i / kBlock * kBlock + kBlock - 1 - i % kBlock) * kVector); };
const Want neighbour = [](int i) { return float(i ^ 1); };
const Want other_warp = [](int i) { return float(i ^ kWarp); };
const Want pair_sum = [](int i) { return float(i + (i ^ 1)); };
const Want zero = [](int) { return 0.0f; };

constexpr int64_t kFloat = sizeof(float);
const LaunchShape kWarpShape{1, kWarp, kWarp * 16};
const LaunchShape kPipelineShape{1, kBlock, 2 * kTile* kFloat};

const KernelPair kPairs[] = {
    {"missing barrier",
     &missing_barrier<false>,
     &missing_barrier<true>,
     {4, kBlock, kBlock* kFloat},
     4 * kBlock,
     reversed,
     By::values_or_race},
    {"missing barrier, static",
     &missing_barrier_static<false>,
     &missing_barrier_static<true>,
     {4, kBlock},
     4 * kBlock,
     reversed,
     By::values_or_race},
    {"tile overwritten early",
     &overwritten_early<false>,
     &overwritten_early<true>,
     {1, kBlock, kBlock* kFloat},
     kTiles* kBlock,
     reversed,
     By::values_or_race},
    {"divergent barrier",
     &divergent_barrier<false>,
     &divergent_barrier<true>,
     {1, kBlock},
     kBlock,
     identity,
     By::message,
     "__syncthreads, while other threads are at __syncthreads"},
    {"skipped barrier",
     &skipped_barrier<false>,
     &skipped_barrier<true>,
     {1, kBlock},
     kBlock,
     identity,
     By::message,
     "passed fewer barriers"},
    {"named barrier, too many",
     &named_barriers<0>,
     &named_barriers<1>,
     {1, 128, 128 * kFloat},
     128,
     other_warp,
     By::message,
     "at barrier 1 for 96 threads, 64 came"},
    {"named barrier, apart",
     &named_barriers<0>,
     &named_barriers<2>,
     {1, 128, 128 * kFloat},
     128,
     other_warp,
     By::message,
     "threads 0-31 wait at barrier 1 for 64 threads, 32 came"},
    {"named barrier, part of a warp",
     &named_barriers<0>,
     &named_barriers<3>,
     {1, 128, 128 * kFloat},
     128,
     other_warp,
     By::message,
     "not whole warps"},
    {"named barrier, number",
     &named_barriers<0>,
     &named_barriers<4>,
     {1, 128, 128 * kFloat},
     128,
     other_warp,
     By::message,
     "a block has barriers 0 to 15"},
    {"named barrier, two counts",
     &named_barriers<0>,
     &named_barriers<5>,
     {1, 128, 128 * kFloat},
     128,
     other_warp,
     By::message,
     "where others came to it for"},
    {"half a warp shuffles", &collectives<0>, &collectives<1>, kWarpShape, kWarp, pair_sum, By::message,
     "threads 0-15 wait in __shfl_xor_sync of lanes 0-31 without lanes 16-31"},
    {"two lines", &collectives<0>, &collectives<2>, kWarpShape, kWarp, pair_sum, By::message, "are in __shfl_xor_sync"},
    {"two collectives", &collectives<0>, &collectives<3>, kWarpShape, kWarp, pair_sum, By::message, "are in __"},
    {"not in its own mask", &collectives<0>, &collectives<4>, kWarpShape, kWarp, pair_sum, By::message,
     "of lanes 0-15 by lane"},
    {"from an absent lane", &collectives<0>, &collectives<5>, kWarpShape, kWarp, pair_sum, By::values},
    {"missing syncwarp", &missing_syncwarp<false>, &missing_syncwarp<true>, kWarpShape, kWarp, neighbour, By::race},
    {"half a warp multiplies", &partial_product<false>, &partial_product<true>, kWarpShape, kWarp, zero, By::message,
     "mma_m16n8k16 of lanes 0-31 without lanes 16-31"},
    {"wait one group short", &pipeline<kNone>, &pipeline<kWaitOneShort>, kPipelineShape, kTiles* kBlock, tiles,
     By::values},
    {"read before the wait", &pipeline<kNone>, &pipeline<kReadBeforeWait>, kPipelineShape, kTiles* kBlock, tiles,
     By::values},
    {"no barrier after the wait", &pipeline<kNone>, &pipeline<kNoBarrier>, kPipelineShape, kTiles* kBlock, tiles,
     By::values_or_race},
    {"stage refilled early", &pipeline<kNone>, &pipeline<kRefilledEarly>, kPipelineShape, kTiles* kBlock, tiles,
     By::values_or_race},
    {"no wait at the end", &pipeline<kNone>, &pipeline<kNoWaitAtEnd>, kPipelineShape, kTiles* kBlock, tiles,
     By::message, "returned before a cp.async had landed"},
    {"copy to a misaligned address", &copy_addresses<kGood>, &copy_addresses<kSharedMisaligned>, kWarpShape, kWarp,
     [](int i) { return float(i * kVector); }, By::message, "of shared memory is not a multiple of 16"},
    {"copy beyond shared memory", &copy_addresses<kGood>, &copy_addresses<kSharedBeyond>, kWarpShape, kWarp,
     [](int i) { return float(i * kVector); }, By::message, "cp.async: bytes 512 to 527 are not in the block's 512"},
    {"copy before shared memory", &copy_addresses<kGood>, &copy_addresses<kSharedBefore>, kWarpShape, kWarp,
     [](int i) { return float(i * kVector); }, By::message, "cp.async: bytes -16 to -1 are not"},
    {"copy from a misaligned address", &copy_addresses<kGood>, &copy_addresses<kGlobalMisaligned>, kWarpShape, kWarp,
     [](int i) { return float(i * kVector); }, By::message, "the global address is not a multiple of 16"},
    {"copy to global memory", &copy_addresses<kGood>, &copy_addresses<kNotShared>, kWarpShape, kWarp,
     [](int i) { return float(i * kVector); }, By::message, "dynamic shared memory"},
    {"matrix at a misaligned address", &matrix_addresses<kGood>, &matrix_addresses<kSharedMisaligned>, kWarpShape,
     kWarp, zero, By::message, "of shared memory is not a multiple of 16"},
    {"matrix beyond shared memory", &matrix_addresses<kGood>, &matrix_addresses<kSharedBeyond>, kWarpShape, kWarp, zero,
     By::message, "ldmatrix: bytes 512 to 527"},
    {"beyond shared memory",
     &beyond_shared<false>,
     &beyond_shared<true>,
     {1, kWarp, kWarp* kFloat},
     kWarp,
     identity,
     By::bounds},
    {"beyond static shared memory",
     &beyond_static_shared<false>,
     &beyond_static_shared<true>,
     {1, kWarp},
     kWarp,
     identity,
     By::bounds},
    {"beyond the output", &beyond_global<false>, &beyond_global<true>, {1, kWarp}, kWarp, identity, By::bounds},
    {"misaligned vector",
     &misaligned_vector<false>,
     &misaligned_vector<true>,
     {1, kWarp},
     kVector,
     identity,
     By::bounds},
    {"blocks race",
     &racing_blocks<false>,
     &racing_blocks<true>,
     {4, kBlock},
     1,
     [](int) { return 4.0f * kBlock; },
     By::race,
     "",
     0},
    {"blocks in order",
     &ordered_blocks<false>,
     &ordered_blocks<true>,
     {4, kBlock},
     4,
     [](int i) { return float(i + 1); },
     By::values_or_race},
};

}  // namespace

#include "test_machine.h"

int main(int argc, char** argv) {
  std::vector<Twin> list;
  for (const KernelPair& pair : kPairs) {
    const auto run = [&pair](Kernel kernel) {
      return [&pair, kernel] { return same(outputs(kernel, pair.shape, pair.count, pair.before), pair.want); };
    };
    list.push_back({pair.name, run(pair.right), run(pair.wrong), pair.by, pair.text});
  }
  return test_twins(list, argc, argv, &test_machine);
}
