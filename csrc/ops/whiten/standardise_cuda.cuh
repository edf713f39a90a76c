// Whitening by any mean and deviation on CUDA, forward and backward: column sums, statistics per group of columns, one
// elementwise pass (core/cuda/reduce.cuh holds the sums).
//
// Means come first, then second moments around them. So the input is read three times where there is a deviation and
// twice where there is none (and once more in float64, to correct the mean), later reads mostly from L2. Statistics are
// summed in double, kept in the accumulate type. Nothing is added atomically, so equal inputs give equal bits.
#pragma once

#include "core/cuda/affine.cuh"
#include "core/cuda/operand.cuh"
#include "core/cuda/reduce.cuh"
#include "ops/whiten/whiten.h"

namespace dnl {

// An Op of row_sums, by columns: its batches are splits of kSplit positions of a batch element, its positions are
// channels, its channels the positions of the split. The term is (x - mean) times 1, x - mean or y.
enum class Moment { first, second, with_result };
template <class T, Moment kMoment>
struct MomentSums {
  using A = AccOf<T>;
  using Sum = double;
  Matrix<const T> input, result;
  const A* mean;  // (groups)
  double* out;    // (batches * splits, channels of the matrix)
  int64_t group, splits, length;
  int64_t batches, positions, channels;  // batches * splits, channels of the matrix, kSplit

  struct Term {
    const T *x, *y;
    const A* mean;
    Matrix<const T> input, result;
    int64_t step, first, length;

    DNL_HOST_DEVICE double operator()(int64_t c, int64_t i) const {
      i += first;
      if (i >= length) return 0;
      const double value = wide(x[i * input.position + c * input.channel]);
      const double from_mean = value - double(mean[c * step]);
      if constexpr (kMoment == Moment::first) return from_mean;
      if constexpr (kMoment == Moment::second) return from_mean * from_mean;
      return from_mean * double(wide(y[i * result.position + c * result.channel]));
    }
  };
  DNL_HOST_DEVICE Term at(int64_t split) const {
    const int64_t b = split / splits;
    const int64_t first = split % splits * kSplit;
    return {input.element(b),
            result.data ? result.element(b) : nullptr,
            mean + b * positions / group,
            input,
            result,
            group == 1,
            first,
            length};
  }
  DNL_HOST_DEVICE void store(int64_t split, int64_t c, double sum) const { out[split * positions + c] = sum; }
};

// rstd = 1 / sqrt(variance + eps)
template <class A>
__global__ void __launch_bounds__(kThreads) rstd_kernel(const double* variance,  // (count)
                                                        A* rstd,                 // (count)
                                                        double eps, int64_t count, int64_t tasks) {
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t index = task * kThreads + threadIdx.x;
    if (index < count) rstd[index] = static_cast<A>(1 / sqrt(variance[index] + eps));
  }
}

// out = (x - mean_g - slope_g y) rstd_g for the group g of each column; the tiles are those of core/cuda/affine.cuh.
template <class T>
struct Standardise {
  using A = AccOf<T>;
  Matrix<const T> input, result;  // (batches, positions, channels); result.data = nullptr leaves its term out
  Matrix<T> out;                  // the same shape
  int64_t batches, positions, channels, group;
  const A* mean;        // (groups)
  const double* slope;  // (groups), or nullptr with `result`
  const A* rstd;        // (groups), or nullptr for 1
};

template <class T, bool kPositionFast>
__global__ void __launch_bounds__(kThreads) standardise_kernel(Standardise<T> op, int64_t tasks) {
  using A = AccOf<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t slow_count = kPositionFast ? op.channels : op.positions;
  const int64_t fast_count = kPositionFast ? op.positions : op.channels;
  const int64_t fast_tiles = ceil_div_of(fast_count, kTileFast), slow_tiles = ceil_div_of(slow_count, kTileSlow);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t fast = task % fast_tiles * kTileFast, slow = task / fast_tiles % slow_tiles * kTileSlow;
    const int64_t b = task / fast_tiles / slow_tiles;
    const T *x = op.input.element(b), *y = op.result.data ? op.result.element(b) : nullptr;
    T* out = op.out.element(b);
    // A group is one column, or all columns of one or more batch elements.
    const int64_t group = b * op.channels / op.group, step = op.group == 1;
    for (int64_t s = slow + warp; s < slow + kTileSlow && s < slow_count; s += kWarps) {
      for (int u = 0; u < kPerLane; ++u) {
        const int64_t f = fast + u * kWarp + lane;
        if (f >= fast_count) continue;
        const int64_t i = kPositionFast ? f : s, c = kPositionFast ? s : f;
        const int64_t g = group + c * step;
        A value = wide(x[i * op.input.position + c * op.input.channel]) - op.mean[g];
        if (y) value -= static_cast<A>(op.slope[g]) * wide(y[i * op.result.position + c * op.result.channel]);
        if (op.rstd) value *= op.rstd[g];
        out[i * op.out.position + c * op.out.channel] = rounded<T>(value);
      }
    }
  }
}

// out[g] (+)= factor * the sum over the elements of group g of one moment around mean[g]
template <Moment kMoment, class T, class Device>
void moment_sums(Device& device, const StandardiseArgs& args, const Matrix<const T>& x, const Matrix<const T>& y,
                 const AccOf<T>* mean, double factor, double* out, ColumnSum kind = ColumnSum::plain) {
  const int64_t splits = column_splits(args.positions), parts = args.batches * splits;
  double* partial = device.template allocate<double>(parts * args.channels);
  const MomentSums<T, kMoment> op{x,     y, mean, partial, args.group, splits, args.positions, parts, args.channels,
                                  kSplit};
  row_sums(device, op, !position_is_fast(x, args.positions, args.channels));
  // A group of one column is summed over its splits; a larger one is whole batch elements, which lie in one run.
  const int64_t width = args.group == 1 ? args.channels : 1, runs = args.groups() / width;
  const int64_t rows = parts * args.channels / args.groups();
  column_sums<double>(device, dense<double>(partial, runs, rows, width).read(), runs, rows, width, {}, factor, out,
                      kind);
}

template <class T, class Device>
void standardise_cuda(const StandardiseArgs& args, Device& device) {
  using A = AccOf<T>;
  const auto x = matrix_of<const T>("x", args.input, args.batches);
  const auto y = args.rstd ? matrix_of<const T>("output", args.result, args.batches) : Matrix<const T>{};
  const int64_t columns = args.columns(), groups = args.groups();

  A* column = device.template allocate<A>(columns);
  A* mean = device.template allocate<A>(groups);
  column_sums<T>(device, x, args.batches, args.positions, args.channels, {}, 1.0 / args.positions, column);
  column_sums<A>(device, dense<A>(column, groups, args.group, 1).read(), groups, args.group, 1, {}, 1.0 / args.group,
                 mean);
  double* second = device.template allocate<double>(groups);
  if constexpr (std::is_same_v<T, double>)  // nothing is wider: what rounding took from the mean, all elements share
    moment_sums<Moment::first>(device, args, x, y, mean, 1.0 / args.count(), mean, ColumnSum::added);
  if (args.rstd) {
    const double factor = 1.0 / (args.count() - 1);  // one element has no variance: 0 times infinity
    if (args.result.data) {
      moment_sums<Moment::with_result>(device, args, x, y, mean, factor, second);
    } else {
      moment_sums<Moment::second>(device, args, x, y, mean, factor, second);
      const int64_t tasks = ceil_div_of(groups, kThreads);
      device.launch(&rstd_kernel<A>, tasks, second, static_cast<A*>(args.rstd), args.eps, groups, tasks);
    }
  }

  const Standardise<T> op{x,
                          y,
                          matrix_of<T>("output", args.output, args.batches),
                          args.batches,
                          args.positions,
                          args.channels,
                          args.group,
                          mean,
                          second,
                          static_cast<const A*>(args.rstd)};
  const bool position_fast = position_is_fast(op.out, args.positions, args.channels);
  const int64_t slow = position_fast ? args.channels : args.positions;
  const int64_t fast = position_fast ? args.positions : args.channels;
  const int64_t tasks = args.batches * ceil_div_of(slow, kTileSlow) * ceil_div_of(fast, kTileFast);
  device.launch(position_fast ? &standardise_kernel<T, true> : &standardise_kernel<T, false>, tasks, op, tasks);
}

}  // namespace dnl
