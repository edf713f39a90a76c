// Parts of test_emulator.cpp that are no pairs of kernels: launches, turns, poison, errors, counts.
#pragma once

namespace {

std::string error_of(Kernel kernel, const LaunchShape& shape) {
  return twins::error_of([&] { return outputs(kernel, shape, kTile).empty(); });
}

template <int>
__global__ void nothing(float*, const float*) {}

void test_limits() {
  const auto error = [](const LaunchShape& shape) { return error_of(&nothing<0>, shape); };
  CHECK(error({1, 1024}) == "no error", "a block may have 1024 threads");
  CHECK(error({1, 1025}) == "launch: the number of threads of a block is 1025, expected 1 to 1024", "threads");
  CHECK(error({1, 0}) == "launch: the number of threads of a block is 0, expected 1 to 1024", "no threads");
  CHECK(error({int64_t(1) << 31, 32}).find("number of blocks is 2147483648") != std::string::npos, "blocks");
  CHECK(error({0, 32}) == "no error", "no blocks, no launch");
  CHECK(error({1, 32, 99 << 10}) == "no error", "shared memory");
  CHECK(error({1, 32, (99 << 10) + 1}).find("shared memory in bytes is 101377") != std::string::npos, "too much of it");
  emulator::machine().options.max_shared_bytes = emulator::shared_limit(90);
  CHECK(error({1, 32, 227 << 10}) == "no error", "more where the GPU has more");
  emulator::machine().options.max_shared_bytes = emulator::shared_limit(86);
}

void test_shuffles() {
  const auto out = outputs(&shuffles, {1, kWarp}, 7 * kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int segment = lane / 8 * 8;
    const float want[7] = {float(lane ^ 5),
                           float(lane + 3 < segment + 8 ? lane + 3 : lane),
                           float(lane - 3 >= segment ? lane - 3 : lane),
                           float(segment + 1),
                           float(0x01010101),
                           1,
                           float(31 - lane)};
    for (int kind = 0; kind < 7; ++kind) {
      const float got = out[kind * kWarp + lane];
      CHECK(got == want[kind], "kind %d, lane %d: %g, expected %g", kind, lane, got, want[kind]);
    }
  }
  CHECK(error_of(&collectives<1>, {1, 8}).find("the warp has only 8") != std::string::npos, "a warp of eight");
}

std::vector<unsigned> turns_taken;
template <int>
__global__ void note_turn(float*, const float*) {
  const emulator::Unseen unseen;
  turns_taken.push_back(blockIdx.x * blockDim.x + threadIdx.x);
}

void test_turns() {
  auto& options = emulator::machine().options;
  const auto taken = [&](Turns turns, uint64_t seed) {
    options.turns = turns;
    options.seed = seed;
    turns_taken.clear();
    outputs(&nothing<1>, {1, 1}, 1);
    outputs(&note_turn<0>, {3, kBlock}, 1);
    return turns_taken;
  };
  const auto up = taken(Turns::ascending, 0), down = taken(Turns::descending, 0);
  CHECK(up.size() == 3 * kBlock && std::is_sorted(up.begin(), up.end()), "ascending");
  CHECK(std::equal(up.begin(), up.end(), down.rbegin()), "descending");
  const auto once = taken(Turns::random, 1), again = taken(Turns::random, 1), other = taken(Turns::random, 2);
  CHECK(once == again && once != other && once != up, "random turns follow the seed");
  CHECK(std::is_permutation(once.begin(), once.end(), up.begin()), "everyone has a turn");
  // Blocks of a grid that nobody could run whole.
  options.turns = Turns::descending;
  options.only_blocks = {0, 0x7ffffffe};
  turns_taken.clear();
  outputs(&note_turn<0>, {0x7fffffff, 1}, 1);
  CHECK((turns_taken == std::vector<unsigned>{0x7ffffffe, 0}), "chosen blocks");
  CHECK(error_of(&nothing<0>, {10, 1}).find("a block to run is 2147483646, expected 0 to 9") != std::string::npos,
        "a block that the grid does not have");
  options.only_blocks.clear();
  options.turns = Turns::ascending;
}

void test_poison() {
  for (float x : outputs(&not_initialised, {1, kWarp, kWarp * kFloat}, kWarp)) CHECK(std::isnan(x), "got %g", x);
#ifdef __clang__
  for (float x : outputs(&not_initialised_static<0>, {2, kWarp}, 2 * kWarp)) CHECK(std::isnan(x), "got %g", x);
#endif
  for (float x : outputs(&zero_fill, {1, kWarp, kWarp * 16}, kWarp * kVector)) CHECK(x == 0, "got %g", x);
}

struct Counted {
  static inline int alive = 0;
  Counted() { count(1); }
  ~Counted() { count(-1); }
  static void count(int change) {
    const emulator::Unseen unseen;
    alive += change;
  }
};

// One thread fails while others wait.
template <int>
__global__ void failing(float*, const float*) {
  const Counted counted;
  if (threadIdx.x == 5) throw std::logic_error("of the kernel");
  __syncthreads();
}

template <int>
__global__ void early_exit(float* out, const float*) {
  if (threadIdx.x >= kWarp) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <int>
__global__ void atomics(int* sums) {
  atomicAdd(&sums[0], 2);
  atomicMax(&sums[1], int(threadIdx.x));
}

void test_errors() {
  for (Turns turns : kTurns) {
    emulator::machine().options.turns = turns;
    CHECK(error_of(&failing<0>, {1, kBlock}) == "of the kernel", "an exception of a kernel comes out");
    CHECK(Counted::alive == 0, "%d threads were not unwound", Counted::alive);
  }
  emulator::machine().options.turns = Turns::ascending;
  const std::string error = error_of(&collectives<1>, {1, kWarp});
  CHECK(error.find("block 0 cannot go on: threads 0-15 wait in") == 0, "%s", error.c_str());
  CHECK(error.find("; threads 16-31 have returned") != std::string::npos, "%s", error.c_str());
  CHECK(error.find(" at twins.h:") != std::string::npos, "%s", error.c_str());
  CHECK(error_of(&early_exit<0>, {1, kBlock}).find("32 threads of the block have returned") != std::string::npos,
        "threads that return early");
  emulator::machine().options.allow_early_exit = true;
  CHECK(error_of(&early_exit<0>, {1, kBlock}) == "no error", "are allowed if asked for");
  emulator::machine().options.allow_early_exit = false;
  int sums[2] = {};
  emulator::Launcher().launch(&atomics<0>, LaunchShape{3, kBlock}, static_cast<int*>(sums));
  CHECK(sums[0] == 2 * 3 * kBlock && sums[1] == kBlock - 1, "atomics: %d, %d", sums[0], sums[1]);
}

void test_conflicts() {
  auto& statistics = emulator::machine().statistics;
  const auto conflicts = [&](Kernel kernel, int pitch) {
    statistics = {};
    outputs(kernel, {1, kWarp, 8 * pitch * 2}, kWarp);
    CHECK(statistics.matrix_rows == 2 && statistics.launches == 1, "%ld groups of rows", long(statistics.matrix_rows));
    return statistics.matrix_conflicts;
  };
  CHECK(conflicts(&matrix_conflicts<64>, 64) == 14, "rows of 128 bytes all meet in the same banks");
  CHECK(conflicts(&matrix_conflicts<72>, 72) == 0, "a padded row moves on by one group");
}

void test_machine() {
  test_limits();
  test_shuffles();
  test_turns();
  test_poison();
  test_errors();
  test_conflicts();
}

}  // namespace
