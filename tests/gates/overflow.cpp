// Offsets beyond 2^31 and 2^32 elements: every kernel that indexes a map, and those that walk operands as large, run
// the chosen block of a huge grid over memory of which only the touched pages exist (mmap without reserve).
//
// A block is the one that owns a given row; its operands are filled, its neighbours are not, so that an offset which
// wrapped reads zeros or lands outside the mapping. Each kernel is tested just beyond 2^31 and beyond 2^32 elements.
#include <sys/mman.h>

// clang-format off
#define DNL_EXT_HOPPER
#include "emulator.h"
#include "sm90.h"
// clang-format on
#include "gate.h"
#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/pairwise/fused/forward.cuh"
#include "ops/pairwise/hopper/backward_map.cuh"
#include "ops/pairwise/hopper/forward.cuh"
#include "ops/unary/unary_cuda.cuh"
#include "ops/whiten/standardise_cuda.cuh"

namespace {

// `count` zeros of address space.
template <class T>
struct Sparse {
  T* data;
  size_t bytes;

  explicit Sparse(int64_t count) : bytes(count * sizeof(T)) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error(message("no address space for ", bytes, " bytes"));
    data = static_cast<T*>(at);
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(data, bytes); }
};

// Runs only the block `block` of a launch of `tasks` blocks.
template <class... Parameters, class... Arguments>
void launch_one(int64_t block, int64_t tasks, void (*kernel)(Parameters...), const Arguments&... arguments) {
  auto& only = emulator::machine().options.only_blocks;
  only = {block};
  emulator::Launcher().launch(kernel, tasks, arguments...);
  only.clear();
}

// A map of kColumns columns whose row `row` starts beyond 2^31 or 2^32 elements.
constexpr int64_t kColumns = 65544;
constexpr int64_t kRows[] = {(int64_t(1) << 31) / kColumns + 1, (int64_t(1) << 32) / kColumns + 1};
static_assert(kColumns % kQuad == 0 && kRows[0] * kColumns > int64_t(1) << 31 &&
              kRows[1] * kColumns > int64_t(1) << 32);

double logit(int64_t j) { return (j * 37 % 101) * 0.05 - 2; }

void near(const char* kernel, int64_t row, const char* what, double got, double want, double bound) {
  CHECK(std::abs(got - want) <= bound * std::abs(want), "%s, row %ld: %s is %g, expected %g", kernel, long(row), what,
        got, want);
}

Values row_softmax() {
  Values x(kColumns);
  for (int64_t j = 0; j < kColumns; ++j) x[j] = logit(j);
  return softmax(x.data(), kColumns);
}

MapRows rows_to(int64_t row) { return {row + 1, kColumns, row + 1, kColumns}; }

template <class T>
void map_softmax(int64_t row) {
  using A = AccOf<T>;
  const Sparse<A> logits((row + 1) * kColumns);
  std::vector<A> inverse(row + 1), stats(2 * (row + 1));
  for (int64_t j = 0; j < kColumns; ++j) logits.data[row * kColumns + j] = A(logit(j));
  const SoftmaxStep<T> step{
      rows_to(row), logits.data, {inverse.data(), row + 1}, {stats.data(), 2 * (row + 1)}, {}, 1, 1};
  launch_one(row, row + 1, &pairwise_softmax_kernel<T, false>, step, row + 1);
  const Values p = row_softmax();
  const T* probability = reinterpret_cast<const T*>(logits.data + row * kColumns);
  for (int64_t j : {int64_t(0), int64_t(77), kColumns - 1})
    near("map softmax", row, "P", wide(probability[j]) * inverse[row], p[j], 1e-2);
}

void row_backward(int64_t row) {
  const Sparse<float> map((row + 1) * kColumns), grad((row + 1) * kColumns);
  const Values p = row_softmax();
  double delta = 0;
  for (int64_t j = 0; j < kColumns; ++j) {
    map.data[row * kColumns + j] = float(logit(j));
    grad.data[row * kColumns + j] = float(j % 3);
    delta += p[j] * (j % 3);
  }
  launch_one(row, row + 1, &pairwise_row_backward_kernel<float, 0>,
             SoftmaxRowStep<float>{rows_to(row), map.data, grad.data, {}, 1, 1}, row + 1);
  for (int64_t j : {int64_t(0), int64_t(77), kColumns - 1}) {
    near("row backward", row, "P", map.data[row * kColumns + j], p[j], 1e-3);
    near("row backward", row, "dS", grad.data[row * kColumns + j], p[j] * (j % 3 - delta), 1e-2);
  }
}

constexpr float kShift = 4;  // above all logits, as a real one is

void part_row_backward(int64_t row) {
  const Sparse<float> map((row + 1) * kColumns), grad((row + 1) * kColumns);
  for (int64_t j = 0; j < kColumns; ++j) {
    map.data[row * kColumns + j] = float(logit(j));
    grad.data[row * kColumns + j] = float(j % 3);
  }
  const Sparse<float> stats(2 * (row + 1)), delta(row + 1);
  stats.data[2 * row] = kShift, stats.data[2 * row + 1] = 0.5f, delta.data[row] = 0.75f;
  const PartRowStep<float> step{rows_to(row),          map.data, grad.data, {stats.data, 2 * (row + 1)},
                                {delta.data, row + 1}, 1,        1};
  launch_one(row, row + 1, &pairwise_part_row_backward_kernel<float>, step, row + 1);
  for (int64_t j : {int64_t(0), int64_t(77), kColumns - 1}) {
    const double p = 0.5 * std::exp(logit(j) - kShift);
    near("part", row, "P", map.data[row * kColumns + j], p, 1e-3);
    near("part", row, "dS", grad.data[row * kColumns + j], p * (j % 3 - 0.75), 1e-3);
  }
}

// P' and dS' of the backward for halves, by the chain's kernel.
template <class T>
void map_backward(int64_t row) {
  const Sparse<float> logits((row + 1) * kColumns), grad((row + 1) * kColumns);
  const T* probability = reinterpret_cast<T*>(logits.data + row * kColumns);
  const T* grad_logits = reinterpret_cast<T*>(grad.data + row * kColumns);
  std::vector<float> shift(kColumns, kShift), row_factor(kColumns, 1), delta(kColumns, 0.5f), sum(row + 1);
  double want_sum = 0;
  for (int64_t j = 0; j < kColumns; ++j) {
    logits.data[row * kColumns + j] = float(logit(j));
    grad.data[row * kColumns + j] = float(j % 3);
    want_sum += std::exp(logit(j) - kShift) * (j % 3 - 0.5);
  }
  SoftmaxBackwardStep<T> step{};
  step.logits = logits.data, step.grad_probability = grad.data;
  step.probability = reinterpret_cast<T*>(logits.data), step.grad_logits = reinterpret_cast<T*>(grad.data);
  step.row_sum = sum.data(), step.buffer_rows = row + 1;
  step.shift = {shift.data(), kColumns}, step.row_factor = {row_factor.data(), kColumns};
  step.delta = {delta.data(), kColumns};
  step.rows = row + 1, step.columns = kColumns, step.pitch = kColumns;
  step.sign = 1, step.magnitude = kLog2OfE;
  launch_one(row, row + 1, &pairwise_softmax_backward_kernel<T>, step, row + 1);
  for (int64_t j : {int64_t(0), int64_t(77), kColumns - 1}) {
    const double p = std::exp(logit(j) - kShift);
    near("map backward", row, "P", wide(probability[j]) / (1 << kProbabilityExponent<T>), p, 1e-2);
    near("map backward", row, "dS", wide(grad_logits[j]), p * (j % 3 - 0.5), 1e-2);
  }
  near("map backward", row, "sum of dS", sum[row], want_sum, 1e-2);
}

// The same step from tiles of operands, the fused kernel or Hopper's: the block that ends with row `row`, first tile of
// queries.
template <class T, bool kHopper>
void one_kernel_map(int64_t row) {
  constexpr int64_t kWidth = 16;
  const int64_t rows = row + 1;
  const Sparse<T> key(rows * kWidth), value(rows * kWidth), probability(rows * kColumns), grad_logits(rows * kColumns);
  const Sparse<T> query(kColumns * kWidth), dy(kColumns * kWidth);
  std::vector<float> shift(kColumns, kShift), row_factor(kColumns, 1), delta(kColumns, 0.5f);
  for (int64_t c = 0; c < kWidth; ++c) {
    key.data[row * kWidth + c] = rounded<T>(0.25f), value.data[row * kWidth + c] = rounded<T>(0.5f);
    for (int64_t i = 0; i < kMapTile; ++i)
      query.data[i * kWidth + c] = rounded<T>(float(i % 4) * 0.25f), dy.data[i * kWidth + c] = rounded<T>(0.125f);
  }
  SoftmaxBackwardStep<T> step{};
  step.probability = probability.data, step.grad_logits = grad_logits.data;
  step.shift = {shift.data(), kColumns}, step.row_factor = {row_factor.data(), kColumns};
  step.delta = {delta.data(), kColumns};
  step.rows = rows, step.columns = kColumns, step.pitch = kColumns;
  step.sign = 1, step.magnitude = kLog2OfE;
  const auto matrix = [&](T* data, int64_t positions) {
    return dense(static_cast<const T*>(data), 1, positions, kWidth);
  };
  const int64_t row_blocks = ceil_div_of(rows, kMapTile), blocks = row_blocks * ceil_div_of(kColumns, kMapTile);
  auto& only = emulator::machine().options.only_blocks;
  only = {row_blocks - 1};
  emulator::Launcher launcher;
  if constexpr (kHopper) {
    hopper_backward_map<T>(launcher, step, matrix(key.data, rows), matrix(query.data, kColumns),
                           matrix(value.data, rows), matrix(dy.data, kColumns), nullptr, 1, kWidth, kWidth,
                           static_cast<int>(blocks));
  } else {
    const auto operand = [&](T* data, int64_t positions) {
      return FusedOperand<T>(matrix(data, positions), positions, kWidth, false);
    };
    const FusedMap<T> op{step,
                         operand(key.data, rows),
                         operand(query.data, kColumns),
                         operand(value.data, rows),
                         operand(dy.data, kColumns),
                         nullptr,
                         kMapStages};
    launcher.launch(&fused_backward_map_kernel<T, false>, LaunchShape{blocks, kThreads, map_shared_bytes(kMapStages)},
                    op);
  }
  only.clear();
  const char* name = kHopper ? "hopper map" : "fused map";
  for (int64_t i : {0, 1, 7}) {
    const double p = std::exp(kWidth * 0.25 * (i % 4) * 0.25 - kShift);
    near(name, row, "P", wide(probability.data[row * kColumns + i]) / (1 << kProbabilityExponent<T>), p, 1e-2);
    near(name, row, "dS", wide(grad_logits.data[row * kColumns + i]), p * (kWidth * 0.5 * 0.125 - 0.5), 1e-2);
  }
}

// Elementwise over a map, its rows as positions: the last tile of it.
void elementwise(int64_t row) {
  const Sparse<float> in((row + 1) * kColumns), out((row + 1) * kColumns);
  const int64_t at = row * kColumns + kColumns - 1;
  in.data[at] = 7;
  Affine<float, float> op{dense(static_cast<const float*>(in.data), 1, row + 1, kColumns),
                          dense(out.data, 1, row + 1, kColumns), 1, row + 1, kColumns};
  op.alpha = 2;
  const int64_t tasks = ceil_div_of(row + 1, kTileSlow) * ceil_div_of(kColumns, kTileFast);
  launch_one(tasks - 1, tasks, &affine_kernel<float, float, false>, op, tasks);
  near("affine", row, "out", out.data[at], 14, 1e-6);
}

// Whitening, its last tile and its last column sums of moments.
void standardise(int64_t row) {
  const Sparse<float> in((row + 1) * kColumns), out((row + 1) * kColumns), mean(kColumns), rstd(kColumns);
  const int64_t positions = row + 1, at = positions * kColumns - 1;
  in.data[at] = 7, mean.data[kColumns - 1] = 3, rstd.data[kColumns - 1] = 0.5f;
  const auto x = dense(static_cast<const float*>(in.data), 1, positions, kColumns);
  const Standardise<float> op{
      x, {}, dense(out.data, 1, positions, kColumns), 1, positions, kColumns, 1, mean.data, nullptr, rstd.data};
  const int64_t tasks = ceil_div_of(positions, kTileSlow) * ceil_div_of(kColumns, kTileFast);
  launch_one(tasks - 1, tasks, &standardise_kernel<float, false>, op, tasks);
  near("standardise", row, "out", out.data[at], 2, 1e-6);

  using Moments = MomentSums<float, Moment::second>;
  const int64_t splits = column_splits(positions), in_last = positions - (splits - 1) * kSplit;
  const Sparse<double> partial(splits * kColumns);
  const Moments moments{x, {}, mean.data, partial.data, 1, splits, positions, splits, kColumns, kSplit};
  const int64_t sums = splits * ceil_div_of(kColumns, kWarp);
  launch_one(sums - 1, sums, &row_sums_kernel<Moments, true>, moments, sums);
  near("moments", row, "sum", partial.data[splits * kColumns - 1], 9.0 * (in_last - 1) + 16, 1e-12);
}

// Column sums of a map (dS over the queries): the last split of positions, both orders of walking.
void column_sum(int64_t row) {
  const Sparse<float> map((row + 1) * kColumns);
  const int64_t positions = row + 1, splits = column_splits(positions), tiles = ceil_div_of(kColumns, kWarp);
  for (int64_t i = (splits - 1) * kSplit; i < positions; ++i) map.data[i * kColumns + kColumns - 1] = float(i % 5 + 1);
  double want = 0;
  for (int64_t i = (splits - 1) * kSplit; i < positions; ++i) want += i % 5 + 1;
  const Sparse<double> partial(splits * kColumns);
  const auto x = dense(static_cast<const float*>(map.data), 1, positions, kColumns);
  const int64_t tasks = splits * tiles;
  for (auto kernel : {&column_sums_kernel<float, false>, &column_sums_kernel<float, true>}) {
    partial.data[splits * kColumns - 1] = 0;
    launch_one(tasks - 1, tasks, kernel, MatrixPair<float>{x, x, 1}, Rows<const float>{}, partial.data, positions,
               kColumns, splits, tasks);
    near("column sums", row, "sum", partial.data[splits * kColumns - 1], want, 1e-12);
  }
}

// Softmax of a row that far away, forward and backward.
void far_softmax(int64_t row) {
  const Sparse<float> in((row + 1) * kColumns), out((row + 1) * kColumns), grad((row + 1) * kColumns);
  const Values p = row_softmax();
  double dot = 0;
  for (int64_t j = 0; j < kColumns; ++j) {
    in.data[row * kColumns + j] = float(logit(j));
    grad.data[row * kColumns + j] = float(j % 3), dot += p[j] * (j % 3);
  }
  const auto matrix = [&](float* data) { return Matrix<float>{data, single_batch(row + 1, kColumns), 1, 1}; };
  const auto x = matrix(in.data), y = matrix(out.data), dy = matrix(grad.data);
  launch_one(row, row + 1, &softmax_kernel<float, float>, x.read(), y, static_cast<float*>(nullptr), kColumns, row + 1);
  near("softmax", row, "p", out.data[row * kColumns + 77], p[77], 1e-4);
  launch_one(row, row + 1, &softmax_backward_kernel<float>, dy.read(), y.read(), x, kColumns, row + 1);
  near("softmax backward", row, "dx", in.data[row * kColumns + 77], p[77] * (77 % 3 - dot), 1e-3);
}

// Row sums over an operand that large: inner products of values and a vector.
void row_sum(int64_t row) {
  const int64_t positions = row + 1;
  const Sparse<float> x(positions * kColumns), vector(kColumns), out(positions);
  for (int64_t j = 0; j < kColumns; ++j) vector.data[j] = 1, x.data[row * kColumns + j] = float(j % 2);
  const RowDot<float> op{dense(static_cast<const float*>(x.data), 1, positions, kColumns),
                         vector.data,
                         nullptr,
                         1,
                         positions,
                         kColumns,
                         {out.data, positions},
                         1};
  const int64_t tasks = ceil_div_of(positions, kWarp);
  launch_one(tasks - 1, tasks, &row_sums_kernel<RowDot<float>, false>, op, tasks);
  near("row sums", row, "sum", out.data[row], kColumns / 2, 1e-6);
  launch_one(tasks - 1, tasks, &row_sums_kernel<RowDot<float>, true>, op, tasks);
  near("row sums, other order", row, "sum", out.data[row], kColumns / 2, 1e-6);
}

// Runs of the fused forward only the blocks of the last tile of queries, and only the last block of the merge. Launches
// of tasks over the queries are left out: what they would make (means, copies) is zero, as fresh memory is.
struct LastTile {
  static constexpr int64_t kMostTasks = 100;
  std::deque<Sparse<char>> buffers;
  int64_t tiles;

  template <class T>
  T* allocate(int64_t count) {
    return reinterpret_cast<T*>(buffers.emplace_back(count * sizeof(T)).data);
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t tasks, const Arguments&... arguments) const {
    if (tasks <= kMostTasks) emulator::Launcher().launch(kernel, tasks, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) const {
    auto& only = emulator::machine().options.only_blocks;
    const int64_t step = shape.shared_bytes ? tiles : shape.blocks;  // the merge has no dynamic shared memory
    for (int64_t block = step - 1; block < shape.blocks; block += step) only.push_back(block);
    emulator::Launcher().launch(kernel, shape, arguments...);
    only.clear();
  }
};

// The fused forward or Hopper's, and the merge of its splits, where queries x channels is that large.
template <class T, bool kHopper>
void one_kernel_forward(int64_t row) {
  using Result = ResultOf<T>;
  constexpr int64_t kWidth = 16, kKeys = 130, kChannels = 512;
  const int64_t queries = row * kColumns / kChannels + 1;
  const Sparse<Result> query(queries * kWidth), key(kKeys * kWidth), value(kKeys * kChannels),
      output(queries * kChannels);
  const Sparse<float> stats(2 * queries);
  for (int64_t j = 0; j < kKeys; ++j)
    for (int64_t c = 0; c < kChannels; ++c) value.data[j * kChannels + c] = rounded<Result>(j % 2 * (1 + c % 4));
  const int64_t first = 0;
  PairwiseArgs args{};
  args.query = {query.data, &first, kWidth, 1}, args.key = {key.data, &first, kWidth, 1};
  args.value = {value.data, &first, kChannels, 1}, args.output = {output.data, &first, kChannels, 1};
  args.stats = stats.data, args.dtype = kType<Result>, args.scale = 1;
  args.batches = 1, args.queries = queries, args.keys = kKeys, args.width = kWidth, args.channels = kChannels;
  const Gpu gpu{90, 132, shared_bytes_of(90)};
  const PairwiseShape shape = shape_of<Result>(args);
  ForwardPlan plan = kHopper ? plan_hopper_forward(shape, gpu) : plan_fused_forward(shape, gpu);
  for (int splits : {1, 2}) {
    plan.splits = splits;
    LastTile device{{}, ceil_div_of(queries, kForwardTiles[plan.tile].queries)};
    output.data[queries * kChannels - 1] = rounded<Result>(-1), stats.data[2 * queries - 1] = -1;
    if constexpr (kHopper)
      pairwise_hopper_forward_cuda<T>(args, device, plan);
    else
      pairwise_fused_forward_cuda<T>(args, device, plan);
    const char* name = kHopper ? "hopper forward" : "fused forward";
    near(name, row, "y", wide(output.data[queries * kChannels - 1]), 2, 1e-2);
    near(name, row, "factor", stats.data[2 * queries - 1], 1.0 / kKeys, 1e-5);
  }
}

}  // namespace

// A case is one kernel family at one size, in turn; arguments as of the other programs.
int main(int argc, char** argv) {
  void (*const tests[])(int64_t) = {&map_softmax<float>,
                                    &map_softmax<__nv_bfloat16>,
                                    &map_softmax<__half>,
                                    &row_backward,
                                    &part_row_backward,
                                    &map_backward<__nv_bfloat16>,
                                    &map_backward<__half>,
                                    &one_kernel_map<__nv_bfloat16, false>,
                                    &one_kernel_map<__half, false>,
                                    &one_kernel_map<__nv_bfloat16, true>,
                                    &one_kernel_map<__half, true>,
                                    &elementwise,
                                    &column_sum,
                                    &one_kernel_forward<__nv_bfloat16, false>,
                                    &one_kernel_forward<__nv_bfloat16, true>,
                                    &one_kernel_forward<Tf32, false>,
                                    &standardise,
                                    &far_softmax,
                                    &row_sum};
  const int64_t kinds = std::size(tests);
  std::vector<char*> arguments(argv, argv + argc);
  std::string count = std::to_string(2 * kinds);
  if (argc > 1) arguments[1] = count.data();  // there are this many cases and no more
  int64_t number = 0;
  return gates::run(static_cast<int>(arguments.size()), arguments.data(), [&](gates::Draw&) {
    tests[number % kinds](kRows[number / kinds]);
    ++number;
  });
}
