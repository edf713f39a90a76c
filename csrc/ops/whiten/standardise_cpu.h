// Whitening by any mean and deviation on the CPU, forward and backward: sums per column of a block of channels (in
// parallel over batch elements and blocks), statistics per group of columns, then one elementwise pass.
//
// All sums are in double and per column first, so the order of adding depends on the shape alone. The second moment is
// taken around the mean in a pass of its own, since sums of squares would cancel. So the input is read three times
// where there is a deviation and twice where there is none, even where a group is one column and would fit the cache.
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

// values[column] of every group by their sum over `divisor`, in place.
inline void share(const StandardiseArgs& args, double* values, double divisor) {
  for (int64_t g = 0; g < args.groups(); ++g) {
    double* group = values + g * args.group;
    const double total = lane_sum<double>(args.group, [&](int64_t c) { return group[c]; });
    std::fill(group, group + args.group, total / divisor);
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
    column_sums_of<Order, T>(args.positions, begin, end, mean + b * args.channels + begin,
                             [&](int64_t i, int64_t c) { return double(input(x, i, c)); });
  });
  share(args, mean, args.count());

  if (args.rstd) {
    // Around the mean in both directions: the sum of the y is 0, but not that of the y as they were rounded.
    for_channel_blocks<Order>(args, executor, [&](int64_t b, int64_t begin, int64_t end) {
      const T* x = element<T>(args.input, b);
      const T* y = backward ? element<T>(args.result, b) : nullptr;
      const double* means = mean + b * args.channels;
      double* sums = second + b * args.channels + begin;
      const auto from_mean = [&](int64_t i, int64_t c) { return double(input(x, i, c)) - means[c]; };
      if (backward)
        column_sums_of<Order, T>(args.positions, begin, end, sums,
                                 [&](int64_t i, int64_t c) { return from_mean(i, c) * double(result(y, i, c)); });
      else
        column_sums_of<Order, T>(args.positions, begin, end, sums,
                                 [&](int64_t i, int64_t c) { return from_mean(i, c) * from_mean(i, c); });
    });
    share(args, second, args.count() - 1);  // one element has no variance: 0 / 0
    if (!backward)
      for (int64_t g = 0; g < args.groups(); ++g)
        static_cast<A*>(args.rstd)[g] = static_cast<A>(1 / std::sqrt(second[g * args.group] + args.eps));
  }

  for_channel_blocks<Order>(args, executor, [&](int64_t b, int64_t begin, int64_t end) {
    const T* x = element<T>(args.input, b);
    const T* y = backward && args.rstd ? element<T>(args.result, b) : nullptr;
    T* out = static_cast<T*>(args.output.data) + args.output.batch[b];
    A means[kReduceBlock], factors[kReduceBlock], slopes[kReduceBlock];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t column = b * args.channels + c;
      means[c - begin] = static_cast<A>(mean[column]);
      factors[c - begin] = args.rstd ? static_cast<const A*>(args.rstd)[column / args.group] : A(1);
      slopes[c - begin] = y ? static_cast<A>(second[column]) : A(0);
    }
    // One loop for each of the formulas: a compiler vectorises none that chooses between them.
    const auto write = [&](const auto& value) {
      const auto at = [&](int64_t i, int64_t c) {
        out[Order::at(args.output, i, c)] = narrow<T>(value(i, c, means[c - begin], factors[c - begin]));
      };
      if constexpr (Order::kChannelOutside) {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t i = 0; i < args.positions; ++i) at(i, c);
      } else {
        for (int64_t i = 0; i < args.positions; ++i)
          for (int64_t c = begin; c < end; ++c) at(i, c);
      }
    };
    if (!args.rstd)
      write([&](int64_t i, int64_t c, A mean, A) { return input(x, i, c) - mean; });
    else if (!y)
      write([&](int64_t i, int64_t c, A mean, A factor) { return (input(x, i, c) - mean) * factor; });
    else
      write([&](int64_t i, int64_t c, A mean, A factor) {
        return (input(x, i, c) - mean - slopes[c - begin] * result(y, i, c)) * factor;
      });
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
