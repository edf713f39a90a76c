// How much of the map the chain makes at a time, and what it keeps in shared memory (ops/pairwise/chain/plan.h).
// clang-format off
#include "cuda_host.h"
// clang-format on
#include "ops/pairwise/pairwise_plan.h"
#include "plan_checks.h"

namespace {

void test_chunks() {
  for (int64_t channels : {1, 128, 129, 256, 1024})
    for (int multiprocessors : {1, 4, 108, 132}) check_waves(channels, multiprocessors);
  for (int64_t batches : {1, 3, 64})
    for (int64_t rows : {1, 100, 4096, 9409, 50000})
      for (int64_t columns : {1, 9409, 1 << 20})
        for (int64_t channels : {1, 256, 1024}) check_chunks(batches, rows, columns, rows_of_waves(channels, 132), {});
}

// Sizes that docs/cuda.md speaks of, and others.
void test_sizes() {
  struct Size {
    int64_t batches, positions, channels;
    int multiprocessors;
    int64_t group, rows;
  };
  const Size sizes[] = {
      {1, 16384, 256, 132, 1, 8192},   // 512 MiB of floats
      {1, 16384, 512, 132, 1, 8192},   // likewise: one chunk of two waves would leave more than the bytes
      {1, 16384, 1024, 132, 1, 5504},  // three, each more than two waves
      {1, 9409, 512, 132, 1, 9409},    // 354 MB
      {8, 4096, 512, 132, 4, 4096},    // elements together
      {1, 65536, 256, 108, 1, 2048},   // what the bytes allow
      {1, 128, 64, 132, 1, 128},       // all there is
      {100000, 1, 8, 4, 1031, 1},      // 8 tiles are two waves
  };
  for (const Size& x : sizes) {
    const Chunks chunks(x.batches, x.positions, x.positions, 4, rows_of_waves(x.channels, x.multiprocessors), {});
    CHECK(chunks.group == x.group && chunks.rows == x.rows, "%ld x %ld positions, %ld channels: chunks of %ld x %ld",
          long(x.batches), long(x.positions), long(x.channels), long(chunks.group), long(chunks.rows));
  }
}

void test_kept_rows() {
  for (int capability : {80, 86, 89, 90, 100, 120}) check_kept_rows(shared_bytes_of(capability));
  CHECK(kept_rows(1, 16384 * 4, Gpu{80, 1, shared_bytes_of(80)}) == 1, "16,384 floats on sm_80");
  CHECK(kept_rows(2, 14336 * 4, Gpu{90, 1, shared_bytes_of(90)}) == 2, "twice 14,336 floats on sm_90");
}

}  // namespace

int main() {
  test_chunks();
  test_sizes();
  test_kept_rows();
  return report();
}
