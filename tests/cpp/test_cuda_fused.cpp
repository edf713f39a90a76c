// Pairwise attention by the fused kernels on the host, as test_cuda_chain.cpp has it by the chain.
#include "pairwise_host.h"

namespace {

// Every tile of the fused path, tails of every kind, slices, splits; and no ldmatrix row waits for another's bank.
template <class E>
void test_fused_cases() {
  using T = ResultOf<E>;
  const auto test_pairwise = [](const Case& t) { ::test_pairwise<T, E>(t); };
  emulator::machine().statistics = {};
  const ChunkLimits all, few{64, int64_t(1) << 20, 8};
  const Gpu a100{80, 1, shared_bytes_of(80)}, ada{89, 1, shared_bytes_of(89)}, many{89, 64, shared_bytes_of(89)};
  for (const Gpu& gpu : {a100, ada}) {
    test_pairwise({2, 33, 29, 8, 12, Layout::rows, true, true, all, 15, 0, 3, gpu});
    test_pairwise({1, 140, 130, 72, 64, Layout::rows, true, true, few, 15, 10, 3, gpu});
    test_pairwise({2, 136, 72, 40, 48, Layout::channel_first, true, true, few, 15, 3, 3, gpu});
    test_pairwise({2, 21, 67, 3, 9, Layout::gaps, false, true, all, 15, 3, 3, gpu});
    test_pairwise({3, 40, 24, 8, 16, Layout::heads, true, false, all, 15, 0, 20, gpu});
    // The widest tiles of floats take more than ada has.
    const int64_t width = std::is_same_v<E, Tf32> && gpu.capability == 89 ? 192 : 256;
    test_pairwise({1, 65, 65, width, 256, Layout::rows, true, true, all, 15, 0, 3, gpu});
    test_pairwise({1, 30, 66, 16, 520, Layout::channel_first, true, true, all, 15, 3, 3, gpu});  // two slices
    test_pairwise({1, 1, 1, 1, 1, Layout::rows, true, true, all, 15, 0, 3, gpu});
  }
  test_pairwise({1, 40, 900, 8, 8, Layout::rows, true, true, all, 15, 3, 3, many});
  test_pairwise({1, 20, 600, 8, 600, Layout::channel_first, true, true, all, 15, 3, 20, many});  // slices and splits
  for (unsigned needs = 0; needs < 16; ++needs)
    test_pairwise({1, 19, 26, 4, 5, Layout::channel_first, true, true, all, needs, 0, 3, a100});
  const auto& seen = emulator::machine().statistics;
  CHECK(seen.matrix_rows > 0 && seen.matrix_conflicts == 0, "%ld of %ld groups of rows meet in a bank",
        long(seen.matrix_conflicts), long(seen.matrix_rows));
}

// The bank of shared memory that each lane reads of a fragment of Tf32 across the rows of a tile.
__global__ void across_banks_kernel(Tile<Tf32> tile, int* bank) {  // (kWarp)
  const FragmentReader<Tf32> reader(tile);
  bank[threadIdx.x] = (reader.lane - tile.data) % kWarp;
}

// In all tiles of a plan they differ: one load serves the warp.
void test_across_banks() {
  for (const ForwardTile& tile : kForwardTiles)
    for (int inner = kFragmentRows * column_groups_of(tile); inner <= tile.channels; inner += kFragmentRows) {
      int bank[kWarp], *to = bank;
      std::vector<Tf32> memory(4 * (inner + kWarp));
      const Tile<Tf32> values{memory.data(), tile.keys, inner, false, false};
      emulator::Launcher().launch(&across_banks_kernel, LaunchShape{1, kWarp}, values, to);
      std::sort(bank, bank + kWarp);
      for (int i = 0; i < kWarp; ++i) CHECK(bank[i] == i, "rows of %d channels: bank %d is read twice", inner, bank[i]);
    }
}

}  // namespace

int main(int argc, char** argv) {
  test_across_banks();
  for_turns(argc, argv, [] {
    test_fused_cases<Tf32>();
    test_fused_cases<__nv_bfloat16>();
    test_fused_cases<__half>();
  });
  return report();
}
