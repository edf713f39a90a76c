// Row softmax, and unary attention, on the CPU.
//
// Softmax: a task owns a row and reads it in blocks through a small buffer of accumulators, whatever its stride: once
// for the maximum and the sum together (rescaling the sum when the maximum grows), once to write.
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

constexpr int64_t kRowBlock = 256;
static_assert(kRowBlock % kWidth<float> == 0 && kRowBlock % kWidth<double> == 0, "blocks hold whole vectors");

template <class T>
inline int64_t gather(const T* x, int64_t stride, int64_t begin, int64_t count, Acc<T> fill, Acc<T>* buffer) {
  const int64_t n = std::min(kRowBlock, count - begin);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(x[begin + i]);
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(x[(begin + i) * stride]);
  }
  for (int64_t i = n; i < kRowBlock; ++i) buffer[i] = fill;
  return n;
}

// e^(block - offset), in place. The offset is taken off first: a shift that all logits share then costs no digits.
template <class A>
inline void exponentials(A* block, A offset) {
  for (int64_t i = 0; i < kRowBlock; i += kWidth<A>)
    store(block + i, exp2((load(block + i) - broadcast(offset)) * kLog2e<A>));
}

// Maximum of a row and the sum of e^(x_i - most). NaN in the row, or a row of -inf, makes the sum NaN.
// Probabilities are divided by this sum rather than shifted by the lse, whose rounding all of them would share.
template <class A>
struct RowStatistics {
  A most;
  double sum;

  A lse() const { return static_cast<A>(double(most) + std::log(sum)); }
};

template <class T>
inline RowStatistics<Acc<T>> row_statistics(const T* x, int64_t stride, int64_t count) {
  using A = Acc<T>;
  const A infinity = std::numeric_limits<A>::infinity();
  alignas(64) A block[kRowBlock];
  A most = -infinity;
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kRowBlock) {
    gather(x, stride, begin, count, -infinity, block);
    Vec<A> largest = broadcast(-infinity);
    for (int64_t i = 0; i < kRowBlock; i += kWidth<A>) largest = vmax(largest, load(block + i));
    A grown = most;
    for (int i = 0; i < kWidth<A>; ++i) grown = std::max(grown, A(largest[i]));
    if (grown > most) {
      sum *= std::exp(double(most) - double(grown));
      most = grown;
    }
    exponentials(block, most == -infinity ? A(0) : most);
    Vec<A> total{};
    for (int64_t i = 0; i < kRowBlock; i += kWidth<A>) total += load(block + i);
    for (int i = 0; i < kWidth<A>; ++i) sum += double(total[i]);
  }
  if (most == -infinity) return {A(0), std::numeric_limits<double>::quiet_NaN()};
  return {most, sum};
}

template <class T>
void softmax_typed(const SoftmaxArgs& args, const Executor& executor) {
  executor.parallel(args.rows, [&](int64_t row) {
    const T* x = element<T>(args.input, row);
    T* out = static_cast<T*>(args.output.data) + args.output.batch[row];
    const auto statistics = row_statistics(x, args.input.position, args.columns);
    const Acc<T> factor = static_cast<Acc<T>>(1 / statistics.sum);
    alignas(64) Acc<T> block[kRowBlock];
    for (int64_t begin = 0; begin < args.columns; begin += kRowBlock) {
      const int64_t n = gather(x, args.input.position, begin, args.columns, Acc<T>(0), block);
      exponentials(block, statistics.most);
      for (int64_t i = 0; i < n; ++i) out[(begin + i) * args.output.position] = narrow<T>(block[i] * factor);
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
    double lane[kReduceLanes] = {}, dot = 0;
    int64_t i = 0;
    if (gs == 1 && ps == 1)
      for (; i + kReduceLanes <= args.columns; i += kReduceLanes)
        for (int64_t l = 0; l < kReduceLanes; ++l) lane[l] += double(widen(grad[i + l])) * double(widen(p[i + l]));
    for (; i < args.columns; ++i) dot += double(widen(grad[i * gs])) * double(widen(p[i * ps]));
    for (double value : lane) dot += value;
    const Acc<T> mean = static_cast<Acc<T>>(dot);
    for (i = 0; i < args.columns; ++i) out[i * os] = narrow<T>(widen(p[i * ps]) * (widen(grad[i * gs]) - mean));
  });
}

// u = softmax(m) for every batch element, from its lse (natural logarithm), which is only the shift: u is divided by
// its own sum. u: (batches, keys).
template <class T>
void unary_map(const View& mask, const Acc<T>* lse, int64_t batches, int64_t keys, Acc<T>* u,
               const Executor& executor) {
  executor.parallel(batches, [&](int64_t b) {
    alignas(64) Acc<T> block[kRowBlock];
    Acc<T>* map = u + b * keys;
    double sum = 0;
    for (int64_t begin = 0; begin < keys; begin += kRowBlock) {
      const int64_t n = gather(element<T>(mask, b), mask.position, begin, keys, Acc<T>(0), block);
      exponentials(block, lse[b]);
      std::copy(block, block + n, map + begin);
      sum += lane_sum<T>(n, [&](int64_t j) { return double(map[begin + j]); });
    }
    const Acc<T> factor = static_cast<Acc<T>>(1 / sum);
    for (int64_t j = 0; j < keys; ++j) map[j] *= factor;
  });
}

template <class T>
void unary_forward_typed(const UnaryArgs& args, const Executor& executor) {
  using A = Acc<T>;
  A* lse = static_cast<A*>(args.lse);
  executor.parallel(args.batches, [&](int64_t b) {
    lse[b] = row_statistics(element<T>(args.mask, b), args.mask.position, args.keys).lse();
  });
  const Buffer<A> u(args.batches * args.keys);
  unary_map<T>(args.mask, lse, args.batches, args.keys, u.data, executor);
  all_column_sums<T>(args.value, args.batches, args.keys, args.channels, u.data, args.keys, 1.0,
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
    row_sums(v, args.value, begin, std::min(args.keys, begin + kReduceBlock), args.channels,
             dot.data + b * args.keys + begin, [&](double x, int64_t c) { return double(g[c]) * x; });
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
