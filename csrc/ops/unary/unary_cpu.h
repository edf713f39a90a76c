// Row softmax, and unary attention, on the CPU.
//
// Softmax: a row is read once, whatever its stride, into a buffer of accumulators, where it becomes exponentials.
// Pooling: the map u is one row; it is held in full (Nk accumulators) and the values stream past it once.
#pragma once

#include "core/cpu/pack.h"
#include "core/cpu/reduce.h"
#include "ops/unary/unary.h"

namespace dnl {
namespace DNL_ISA {

// An array of a call's length. Not std::vector: its members for float, compiled here for one instruction set, could be
// the copy the linker keeps for all.
template <class A>
struct Buffer {
  A* const data;
  explicit Buffer(int64_t count) : data(new A[count]) {}
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// x, `stride` apart, widened into `out`, which has room for whole vectors: filled up with `fill`.
template <class T>
inline void gather(const T* x, int64_t stride, int64_t count, Acc<T> fill, Acc<T>* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = widen(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = widen(x[i * stride]);
  }
  for (int64_t i = count; i < round_up(count, kWidth<Acc<T>>); ++i) out[i] = fill;
}

// e^(row - offset) in place, and their sum. The offset is taken off first: a shift that all logits share then costs no
// digits. Sums of short runs first: in one running sum small ones would be rounded away.
template <class A>
inline double exponentials(A* row, int64_t count, A offset) {
  constexpr int64_t W = kWidth<A>, kRun = 16 * W;
  double sum[W] = {};
  for (int64_t first = 0; first < count; first += kRun) {
    Vec<A> run{};
    for (int64_t i = first; i < std::min(count, first + kRun); i += W) {
      const Vec<A> e = exp2((load(row + i) - broadcast(offset)) * kLog2e<A>);
      store(row + i, e);
      run += e;
    }
    for (int64_t l = 0; l < W; ++l) sum[l] += double(run[l]);
  }
  return sum_of_lanes<W>(sum);
}

// Maximum of a row and the sum of e^(x_i - most), which `row` holds. NaN in the row, or a row of -inf, makes the sum
// NaN.
template <class A>
struct RowStatistics {
  A most;
  double sum;

  A lse() const { return static_cast<A>(double(most) + std::log(sum)); }
};

template <class T>
inline RowStatistics<Acc<T>> row_exponentials(const T* x, int64_t stride, int64_t count, Acc<T>* row) {
  using A = Acc<T>;
  const A infinity = std::numeric_limits<A>::infinity();
  gather(x, stride, count, -infinity, row);
  Vec<A> largest = broadcast(-infinity);
  for (int64_t i = 0; i < count; i += kWidth<A>) largest = vmax(largest, load(row + i));
  const A most = largest_lane<A>(largest);
  if (most == -infinity) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    std::fill(row, row + count, nan);
    return {A(0), nan};
  }
  return {most, exponentials(row, count, most)};
}

template <class T>
void softmax_typed(const SoftmaxArgs& args, const Executor& executor) {
  using A = Acc<T>;
  // Rows of a block share a buffer, which is memory only where rows are long.
  constexpr int64_t kShort = 1024, kRows = 8;
  const int64_t room = round_up(args.columns, kWidth<A>);
  executor.parallel(ceil_div(args.rows, kRows), [&](int64_t block) {
    alignas(64) A small[kShort];
    const Buffer<A> large(room > kShort ? room : 0);
    A* const values = room > kShort ? large.data : small;
    for (int64_t row = block * kRows; row < std::min(args.rows, (block + 1) * kRows); ++row) {
      T* out = static_cast<T*>(args.output.data) + args.output.batch[row];
      const auto statistics = row_exponentials(element<T>(args.input, row), args.input.position, args.columns, values);
      const A factor = static_cast<A>(1 / statistics.sum);
      if (args.output.position == 1) {
        for (int64_t i = 0; i < args.columns; ++i) out[i] = narrow<T>(values[i] * factor);
      } else {
        for (int64_t i = 0; i < args.columns; ++i) out[i * args.output.position] = narrow<T>(values[i] * factor);
      }
    }
  });
}

// dx = p (dp - <p, dp>)
template <class T>
void softmax_backward_typed(const SoftmaxArgs& args, const Executor& executor) {
  executor.parallel(args.rows, [&](int64_t row) {
    const T* grad = element<T>(args.input, row);
    const T* p = element<T>(args.probability, row);
    T* out = static_cast<T*>(args.output.data) + args.output.batch[row];
    const int64_t gs = args.input.position, ps = args.probability.position, os = args.output.position;
    const auto product = [&](int64_t i) { return double(widen(grad[i * gs])) * double(widen(p[i * ps])); };
    const auto adjacent = [&](int64_t i) { return double(widen(grad[i])) * double(widen(p[i])); };
    const bool together = gs == 1 && ps == 1;
    const double dot = together ? lane_sum<T>(args.columns, adjacent) : lane_sum<T>(args.columns, product);
    const Acc<T> mean = static_cast<Acc<T>>(dot);
    if (together && os == 1) {
      for (int64_t i = 0; i < args.columns; ++i) out[i] = narrow<T>(widen(p[i]) * (widen(grad[i]) - mean));
    } else {
      for (int64_t i = 0; i < args.columns; ++i)
        out[i * os] = narrow<T>(widen(p[i * ps]) * (widen(grad[i * gs]) - mean));
    }
  });
}

// u = softmax(m) for every batch element, from its lse (natural logarithm), which is only the shift: u is divided by
// its own sum. u: (batches, keys).
template <class T>
void unary_map(const View& mask, const Acc<T>* lse, int64_t batches, int64_t keys, Acc<T>* u,
               const Executor& executor) {
  using A = Acc<T>;
  const int64_t room = round_up(keys, kWidth<A>);
  executor.parallel(batches, [&](int64_t b) {
    const Buffer<A> row(room);
    gather(element<T>(mask, b), mask.position, keys, -std::numeric_limits<A>::infinity(), row.data);
    const A factor = static_cast<A>(1 / exponentials(row.data, keys, lse[b]));
    for (int64_t j = 0; j < keys; ++j) u[b * keys + j] = row.data[j] * factor;
  });
}

template <class T>
void unary_forward_typed(const UnaryArgs& args, const Executor& executor) {
  using A = Acc<T>;
  const int64_t room = round_up(args.keys, kWidth<A>);
  const Buffer<A> u(args.batches * room);
  executor.parallel(args.batches, [&](int64_t b) {
    A* row = u.data + b * room;
    const auto statistics = row_exponentials(element<T>(args.mask, b), args.mask.position, args.keys, row);
    static_cast<A*>(args.lse)[b] = statistics.lse();
    const A factor = static_cast<A>(1 / statistics.sum);
    for (int64_t j = 0; j < args.keys; ++j) row[j] *= factor;
  });
  all_column_sums<T>(args.value, args.batches, args.keys, args.channels, u.data, room, 1.0,
                     static_cast<A*>(args.pooled), executor);
}

// dm_j = u_j (<dy, v_j> - <dy, y>), written where `grad_mask` says. <dy, y> is taken as sum_j u_j <dy, v_j> over the
// products just computed: the saved y was rounded, which shows where values share a large offset.
template <class T>
void unary_mask_gradient(const UnaryArgs& args, const Acc<T>* u, const Executor& executor) {
  using A = Acc<T>;
  const A* grad_pooled = static_cast<const A*>(args.grad_pooled);
  const int64_t blocks = ceil_div(args.keys, kReduceBlock);
  const Buffer<double> dot(args.batches * args.keys);
  executor.parallel(args.batches * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * kReduceBlock;
    const A* g = grad_pooled + b * args.channels;
    const T* v = element<T>(args.value, b);
    const int64_t end = std::min(args.keys, begin + kReduceBlock);
    double* out = dot.data + b * args.keys + begin;
    if constexpr (std::is_same_v<T, double>)
      row_sums(v, args.value, begin, end, args.channels, out, [&](double x, int64_t c) { return g[c] * x; });
    else
      weighted_row_differences(v, args.value, begin, end, args.channels, g, out);
  });
  executor.parallel(args.batches, [&](int64_t b) {
    const A* map = u + b * args.keys;
    const double* x = dot.data + b * args.keys;
    T* out = static_cast<T*>(args.grad_mask.data) + args.grad_mask.batch[b];
    // About the first product: what all of them share would otherwise cost the mean its last digits.
    const double weighted = lane_sum<double>(args.keys, [&](int64_t j) { return double(map[j]) * (x[j] - x[0]); });
    const double mean = weighted / lane_sum<double>(args.keys, [&](int64_t j) { return double(map[j]); });
    for (int64_t j = 0; j < args.keys; ++j)
      out[j * args.grad_mask.position] = narrow<T>(static_cast<A>(double(map[j]) * ((x[j] - x[0]) - mean)));
  });
}

template <class T>
void unary_backward_typed(const UnaryArgs& args, const Executor& executor) {
  using A = Acc<T>;
  const Buffer<A> u(args.batches * args.keys);
  unary_map<T>(args.mask, static_cast<const A*>(args.lse), args.batches, args.keys, u.data, executor);
  if (args.grad_mask.data) unary_mask_gradient<T>(args, u.data, executor);
  if (!args.grad_value.data) return;
  const A* grad_pooled = static_cast<const A*>(args.grad_pooled);
  const View& out = args.grad_value;
  const int64_t blocks = ceil_div(args.keys, kReduceBlock);
  executor.parallel(args.batches * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * kReduceBlock;
    const int64_t end = std::min(args.keys, begin + kReduceBlock);
    T* dv = static_cast<T*>(out.data) + out.batch[b];
    const A *map = u.data + b * args.keys + begin, *g = grad_pooled + b * args.channels;
    if (out.channel == 1) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t c = 0; c < args.channels; ++c) dv[j * out.position + c] = narrow<T>(map[j - begin] * g[c]);
      return;
    }
    write_lanes(dv + begin * out.position, out.channel, out.position, args.channels, end - begin,
                [=](int64_t c) { return [map, factor = g[c]](int64_t j) { return narrow<T>(map[j] * factor); }; });
  });
}

inline void softmax(const SoftmaxArgs& args, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) { softmax_typed<decltype(type)>(args, executor); });
}
inline void softmax_backward(const SoftmaxArgs& args, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) { softmax_backward_typed<decltype(type)>(args, executor); });
}
inline void unary_forward(const UnaryArgs& args, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) { unary_forward_typed<decltype(type)>(args, executor); });
}
inline void unary_backward(const UnaryArgs& args, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) { unary_backward_typed<decltype(type)>(args, executor); });
}

}  // namespace DNL_ISA
}  // namespace dnl
