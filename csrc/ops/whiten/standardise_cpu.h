// Whitening by any mean and deviation on the CPU, forward and backward: sums per column of a block of channels (in
// parallel over batch elements and blocks), statistics per group of columns, then one elementwise pass.
//
// All sums are in double and per column first, so the order of adding depends on the shape alone. The second moment is
// taken around each column's own mean and the means' spread is added: sums of squares would cancel. The input is read
// up to three times, the last two from cache where a block fits. Traded away: one pass for a group that is one column.
#pragma once

#include "core/cpu/reduce.h"
#include "ops/whiten/whiten.h"

namespace dnl {
namespace DNL_ISA {

// Doubles of workspace: two moments per column.
inline int64_t standardise_workspace(const StandardiseArgs& args) { return 2 * args.columns(); }

// Calls f(b, begin, end) for blocks of channels, in parallel.
template <class Order, class F>
void for_channel_blocks(const StandardiseArgs& args, const Executor& executor, const F& f) {
  // As in whiten_cpu.h: channel-first rows balance better in small blocks.
  const int64_t width = Order::kChannelOutside ? 4 : kReduceBlock;
  const int64_t blocks = ceil_div(args.channels, width);
  executor.parallel(args.batches * blocks, [&](int64_t task) {
    const int64_t begin = task % blocks * width;
    f(task / blocks, begin, std::min(args.channels, begin + width));
  });
}

// Statistics of every group from those of its columns; in place.
//   forward   mean, second = sum of squares around the column's mean   ->  mean of the group, its rstd (also in
//   args.rstd) backward  mean of dy, second = sum of dy y                         ->  mean of the group, sum of dy y /
//   (n - 1)
template <class A>
void share_moments(const StandardiseArgs& args, double* mean, double* second) {
  const double n = args.count();
  for (int64_t g = 0; g < args.groups(); ++g) {
    double *means = mean + g * args.group, *seconds = second + g * args.group, total = 0, moment = 0;
    for (int64_t c = 0; c < args.group; ++c) total += means[c];
    total /= args.group;
    if (args.rstd) {
      const double weight = args.result.data ? 0 : args.positions;
      for (int64_t c = 0; c < args.group; ++c)
        moment += seconds[c] + (weight ? weight * (means[c] - total) * (means[c] - total) : 0);
      moment /= n - 1;  // one element has no variance: 0 / 0
      if (!args.result.data) {
        moment = 1 / std::sqrt(moment + args.eps);
        static_cast<A*>(args.rstd)[g] = static_cast<A>(moment);
      }
    }
    std::fill(means, means + args.group, total);
    std::fill(seconds, seconds + args.group, moment);
  }
}

template <class Order, class T>
void standardise_ordered(const StandardiseArgs& args, double* workspace, const Executor& executor) {
  using A = Acc<T>;
  double *mean = workspace, *second = workspace + args.columns();
  const bool backward = args.result.data;
  const auto input = [&](const T* x, int64_t i, int64_t c) { return widen(x[Order::at(args.input, i, c)]); };
  const auto result = [&](const T* y, int64_t i, int64_t c) { return widen(y[Order::at(args.result, i, c)]); };

  for_channel_blocks<Order>(args, executor, [&](int64_t b, int64_t begin, int64_t end) {
    const T* x = element<T>(args.input, b);
    double sums[kReduceBlock], *means = mean + b * args.channels, *seconds = second + b * args.channels;
    column_sums_of<Order>(args.positions, begin, end, sums,
                          [&](int64_t i, int64_t c) { return double(input(x, i, c)); });
    for (int64_t c = begin; c < end; ++c) means[c] = sums[c - begin] / args.positions;
    if (!args.rstd) return;
    if (backward) {
      const T* y = element<T>(args.result, b);
      column_sums_of<Order>(args.positions, begin, end, seconds + begin,
                            [&](int64_t i, int64_t c) { return double(input(x, i, c)) * double(result(y, i, c)); });
    } else {
      column_sums_of<Order>(args.positions, begin, end, seconds + begin, [&](int64_t i, int64_t c) {
        const double from_mean = double(input(x, i, c)) - means[c];
        return from_mean * from_mean;
      });
    }
  });

  share_moments<A>(args, mean, second);

  for_channel_blocks<Order>(args, executor, [&](int64_t b, int64_t begin, int64_t end) {
    const T* x = element<T>(args.input, b);
    const T* y = backward && args.rstd ? element<T>(args.result, b) : nullptr;
    T* out = static_cast<T*>(args.output.data) + args.output.batch[b];
    A means[kReduceBlock], factors[kReduceBlock], slopes[kReduceBlock];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t column = b * args.channels + c;
      means[c - begin] = static_cast<A>(mean[column]);
      factors[c - begin] = args.rstd ? static_cast<const A*>(args.rstd)[column / args.group] : A(1);
      slopes[c - begin] = static_cast<A>(second[column]);
    }
    const auto write = [&](int64_t i, int64_t c) {
      A value = input(x, i, c) - means[c - begin];
      if (y) value -= slopes[c - begin] * result(y, i, c);
      out[Order::at(args.output, i, c)] = narrow<T>(value * factors[c - begin]);
    };
    if constexpr (Order::kChannelOutside) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t i = 0; i < args.positions; ++i) write(i, c);
    } else {
      for (int64_t i = 0; i < args.positions; ++i)
        for (int64_t c = begin; c < end; ++c) write(i, c);
    }
  });
}

inline void standardise(const StandardiseArgs& args, double* workspace, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) {
    const auto run = [&](auto order) {
      standardise_ordered<decltype(order), decltype(type)>(args, workspace, executor);
    };
    args.result.data ? dispatch_order(run, args.input, args.output, args.result)
                     : dispatch_order(run, args.input, args.output);
  });
}

}  // namespace DNL_ISA
}  // namespace dnl
