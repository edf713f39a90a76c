// Whitening by any mean and deviation on the CPU, forward and backward; mean_subtract is the case without a deviation
// whose means are of single columns.
//
// A column is summed in double over its positions; then the second moment, around the mean in a pass of its own, since
// sums of squares would cancel; then the result is written. Where columns do not share statistics one task takes a
// block of them through all of this, so that memory is read once as long as a block fits the cache. Where they do, the
// three are passes over everything, with sums per column between them: the order of adding depends on the shape alone.
#pragma once

#include "core/cpu/reduce.h"
#include "ops/whiten/whiten.h"

namespace dnl {
namespace DNL_ISA {

// Doubles of workspace: two moments per column, where columns share them.
inline int64_t standardise_workspace(const StandardiseArgs& args) { return args.group > 1 ? 2 * args.columns() : 0; }

// Columns [begin, end) of batch element b, at most kReduceBlock of them: what one task works on.
template <class Order, class T>
struct ColumnBlock {
  using A = Acc<T>;
  const StandardiseArgs& args;
  const int64_t b, begin, end;

  bool backward() const { return args.result.data; }
  int64_t count() const { return end - begin; }
  int64_t first_column() const { return b * args.channels + begin; }

  // The sum of each column, in the backward of dy.
  void sum(double* sums) const { column_sums_of<Order, T>(args.positions, begin, end, sums, from(args.input)); }

  // Around the means: of the squares; in the backward <dy, y>, for the sum of the y is 0, but not that of the y as they
  // were rounded.
  void second_moment(const double* means, double* sums) const {
    const auto from_mean = [means, first = begin, x = from(args.input)](int64_t i, int64_t c) {
      return x(i, c) - means[c - first];
    };
    if (backward())
      column_sums_of<Order, T>(
          args.positions, begin, end, sums,
          [from_mean, y = from(args.result)](int64_t i, int64_t c) { return from_mean(i, c) * y(i, c); });
    else
      column_sums_of<Order, T>(args.positions, begin, end, sums, [from_mean](int64_t i, int64_t c) {
        const double x = from_mean(i, c);
        return x * x;
      });
  }

  // From means and, with a deviation, second moments over n - 1; in the forward rstd is written first.
  void write(const double* means, const double* second) const {
    A mean[kReduceBlock], factor[kReduceBlock], slope[kReduceBlock];
    for (int64_t l = 0; l < count(); ++l) mean[l] = static_cast<A>(means[l]);
    if (!args.rstd) return write_each([&](A x, A, int64_t l) { return x - mean[l]; });
    for (int64_t l = 0; l < count(); ++l) {
      factor[l] = static_cast<const A*>(args.rstd)[(first_column() + l) / args.group];
      slope[l] = static_cast<A>(second[l]);
    }
    if (backward())
      write_each([&](A x, A y, int64_t l) { return (x - mean[l] - slope[l] * y) * factor[l]; });
    else
      write_each([&](A x, A, int64_t l) { return (x - mean[l]) * factor[l]; });
  }

 private:
  // The element of a view in double.
  auto from(const View& view) const {
    return [x = element<T>(view, b), &view](int64_t i, int64_t c) { return double(widen(x[Order::at(view, i, c)])); };
  }

  // value(x, y, l) of every element, l being its column in the block; y is 0 where there is none.
  template <class F>
  void write_each(const F& value) const {
    const T* const x = element<T>(args.input, b);
    T* const out = static_cast<T*>(args.output.data) + args.output.batch[b];
    const auto write_with = [&](const auto& y) {
      const auto at = [&](int64_t i, int64_t c) {
        out[Order::at(args.output, i, c)] = narrow<T>(value(widen(x[Order::at(args.input, i, c)]), y(i, c), c - begin));
      };
      if constexpr (Order::kChannelOutside) {
        for (int64_t c = begin; c < end; ++c)
          for (int64_t i = 0; i < args.positions; ++i) at(i, c);
      } else {
        in_pieces(begin, end, [&](auto piece, int64_t first) {
          for (int64_t i = 0; i < args.positions; ++i)
            for (int64_t c = first; c < first + piece; ++c) at(i, c);
        });
      }
    };
    if (backward() && args.rstd)
      write_with([&args = args, y = element<T>(args.result, b)](int64_t i, int64_t c) {
        return widen(y[Order::at(args.result, i, c)]);
      });
    else
      write_with([](int64_t, int64_t) { return A(0); });
  }
};

// Calls f(ColumnBlock) for blocks of all columns, in parallel.
template <class Order, class T, class F>
void for_column_blocks(const StandardiseArgs& args, const Executor& executor, const F& f) {
  // A channel-first row is contiguous on its own, so small blocks balance better; rows of channels want whole lines.
  const int64_t width = Order::kChannelOutside ? 4 : kReduceBlock;
  const int64_t blocks = ceil_div(args.channels, width);
  executor.parallel(args.batches * blocks, [&](int64_t task) {
    const int64_t begin = task % blocks * width;
    f(ColumnBlock<Order, T>{args, task / blocks, begin, std::min(args.channels, begin + width)});
  });
}

// Of the variance over n - 1: one element has none, 0 / 0.
template <class A>
A reciprocal_deviation(const StandardiseArgs& args, double variance) {
  return static_cast<A>(1 / std::sqrt(variance + args.eps));
}

// Columns that have statistics of their own.
template <class Order, class T>
void standardise_columns(const StandardiseArgs& args, const Executor& executor) {
  using A = Acc<T>;
  for_column_blocks<Order, T>(args, executor, [&](const ColumnBlock<Order, T>& block) {
    double means[kReduceBlock], second[kReduceBlock];
    block.sum(means);
    for (int64_t l = 0; l < block.count(); ++l) means[l] /= args.positions;
    if (args.rstd) {
      block.second_moment(means, second);
      A* rstd = static_cast<A*>(args.rstd) + block.first_column();
      for (int64_t l = 0; l < block.count(); ++l) {
        second[l] /= args.positions - 1;
        if (!block.backward()) rstd[l] = reciprocal_deviation<A>(args, second[l]);
      }
    }
    block.write(means, second);
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

// Groups of columns.
template <class Order, class T>
void standardise_groups(const StandardiseArgs& args, double* workspace, const Executor& executor) {
  using A = Acc<T>;
  using Columns = ColumnBlock<Order, T>;
  double *means = workspace, *second = workspace + args.columns();
  for_column_blocks<Order, T>(args, executor, [&](const Columns& block) { block.sum(means + block.first_column()); });
  share(args, means, args.count());
  if (args.rstd) {
    for_column_blocks<Order, T>(args, executor, [&](const Columns& block) {
      block.second_moment(means + block.first_column(), second + block.first_column());
    });
    share(args, second, args.count() - 1);
    if (!args.result.data)
      for (int64_t g = 0; g < args.groups(); ++g)
        static_cast<A*>(args.rstd)[g] = reciprocal_deviation<A>(args, second[g * args.group]);
  }
  for_column_blocks<Order, T>(args, executor, [&](const Columns& block) {
    block.write(means + block.first_column(), second + block.first_column());
  });
}

inline void standardise(const StandardiseArgs& args, double* workspace, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto order) {
      if (args.group > 1)
        standardise_groups<decltype(order), T>(args, workspace, executor);
      else
        standardise_columns<decltype(order), T>(args, executor);
    };
    args.result.data ? dispatch_order(run, args.input, args.output, args.result)
                     : dispatch_order(run, args.input, args.output);
  });
}

}  // namespace DNL_ISA
}  // namespace dnl
