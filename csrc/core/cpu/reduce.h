// Reductions over positions or channels of a strided matrix, in double. The error of a mean is the same for all
// positions and does not average out, so the mean of equal rows must be exactly that row. The sum of up to 2^29 equal
// floats is exact in double; for float64 there is no wider type, so its sums are compensated.
#pragma once

#include "core/cpu/product.h"

namespace dnl {
namespace DNL_ISA {

constexpr int64_t kReduceLanes = 32;  // independent partial sums, so that the loop vectorises without reassociation
constexpr int64_t kReduceBlock = 64;  // channels or positions per task

template <class Src>
inline const Src* element(const View& x, int64_t batch) {
  return static_cast<const Src*>(x.data) + x.batch[batch];
}

// Where element (i, c) of a matrix lies, with the unit stride known to the compiler where there is one.
struct PositionFast {
  static constexpr bool kChannelOutside = true;
  static int64_t at(const View& x, int64_t i, int64_t c) { return i + c * x.channel; }
};
struct ChannelFast {
  static constexpr bool kChannelOutside = false;
  static int64_t at(const View& x, int64_t i, int64_t c) { return i * x.position + c; }
};
struct AnyOrder {
  static constexpr bool kChannelOutside = true;
  static int64_t at(const View& x, int64_t i, int64_t c) { return i * x.position + c * x.channel; }
};

// Calls f(order) with the order that all of `views` have.
template <class F, class... Views>
inline void dispatch_order(const F& f, const Views&... views) {
  if (((views.position == 1) && ...)) return f(PositionFast{});
  if (((views.channel == 1) && ...)) return f(ChannelFast{});
  f(AnyOrder{});
}

// Adds x to a sum of numbers that come from elements of T. For double, `rest` collects the rounding errors (Knuth's
// TwoSum).
template <class T>
inline void add_to(double& sum, double& rest, double x) {
  const double next = sum + x;
  if constexpr (std::is_same_v<T, double>) {
    const double part = next - sum;
    rest += (sum - (next - part)) + (x - part);
  }
  sum = next;
}
// An infinite sum leaves a NaN beside it.
inline double with_rest(double sum, double rest) { return rest - rest == 0 ? sum + rest : sum; }

// sum_i f(i) over `count` of them.
template <class T, class F>
inline double lane_sum(int64_t count, const F& f) {
  double lane[kReduceLanes] = {}, lane_rest[kReduceLanes] = {}, sum = 0, rest = 0;
  int64_t i = 0;
  for (; i + kReduceLanes <= count; i += kReduceLanes)
    for (int64_t l = 0; l < kReduceLanes; ++l) add_to<T>(lane[l], lane_rest[l], f(i + l));
  for (; i < count; ++i) add_to<T>(sum, rest, f(i));
  for (int64_t l = 0; l < kReduceLanes; ++l) {
    add_to<T>(sum, rest, lane[l]);
    rest += lane_rest[l];
  }
  return with_rest(sum, rest);
}

// out[inner - begin] = sum_outer f(outer, inner) for inner from `begin` to `end`, at most kReduceBlock of them.
template <class T, class F>
inline void side_by_side_sums(int64_t outers, int64_t begin, int64_t end, double* out, const F& f) {
  double sum[kReduceBlock] = {}, rest[kReduceBlock] = {};
  if (end - begin == kReduceBlock) {  // a number that the compiler knows
    for (int64_t outer = 0; outer < outers; ++outer)
      for (int64_t i = 0; i < kReduceBlock; ++i) add_to<T>(sum[i], rest[i], f(outer, begin + i));
  } else {
    for (int64_t outer = 0; outer < outers; ++outer)
      for (int64_t i = 0; i < end - begin; ++i) add_to<T>(sum[i], rest[i], f(outer, begin + i));
  }
  for (int64_t i = 0; i < end - begin; ++i) out[i] = with_rest(sum[i], rest[i]);
}

// out[c - begin] = sum_i f(i, c) for channels [begin, end), at most kReduceBlock of them, visiting memory in `Order`.
template <class Order, class T, class F>
inline void column_sums_of(int64_t positions, int64_t begin, int64_t end, double* out, const F& f) {
  if constexpr (Order::kChannelOutside)
    for (int64_t c = begin; c < end; ++c) out[c - begin] = lane_sum<T>(positions, [&](int64_t i) { return f(i, c); });
  else
    side_by_side_sums<T>(positions, begin, end, out, f);
}

// out[c - begin] = sum_i weight_i x[i][c] for channels [begin, end) of one batch element; weight may be null.
template <class Src>
inline void column_sums(const Src* x, const View& view, int64_t positions, int64_t begin, int64_t end,
                        const Acc<Src>* weight, double* out) {
  const auto sums = [&](auto order) {
    using Order = decltype(order);
    const auto term = [&](int64_t i, int64_t c) { return double(widen(x[Order::at(view, i, c)])); };
    const auto weighted = [&](int64_t i, int64_t c) { return term(i, c) * double(weight[i]); };
    // Two loops: in one, a compiler may load the weights under a mask, which is slow at an address that is null.
    if (weight)
      column_sums_of<Order, Src>(positions, begin, end, out, weighted);
    else
      column_sums_of<Order, Src>(positions, begin, end, out, term);
  };
  dispatch_order(sums, view);
}

// The same for every batch element and channel, in parallel, over `divisor`. out: (batches, channels).
template <class Src>
void all_column_sums(const View& view, int64_t batches, int64_t positions, int64_t channels, const Acc<Src>* weight,
                     int64_t weight_batch, double divisor, Acc<Src>* out, const Executor& executor) {
  const int64_t blocks = ceil_div(channels, kReduceBlock);
  executor.parallel(batches * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * kReduceBlock;
    const int64_t end = std::min(channels, begin + kReduceBlock);
    double sums[kReduceBlock];
    column_sums(element<Src>(view, b), view, positions, begin, end, weight ? weight + b * weight_batch : nullptr, sums);
    for (int64_t c = begin; c < end; ++c) out[b * channels + c] = static_cast<Acc<Src>>(sums[c - begin] / divisor);
  });
}

// out[i - begin] = sum_c f(i, c) for positions [begin, end), at most kReduceBlock of them, visiting memory in `Order`.
template <class Order, class T, class F>
inline void row_sums_of(int64_t begin, int64_t end, int64_t channels, double* out, const F& f) {
  if constexpr (Order::kChannelOutside)
    side_by_side_sums<T>(channels, begin, end, out, [&](int64_t c, int64_t i) { return f(i, c); });
  else
    for (int64_t i = begin; i < end; ++i) out[i - begin] = lane_sum<T>(channels, [&](int64_t c) { return f(i, c); });
}

// The same of term(x[i][c], c) for one batch element, x being what lies there in double.
template <class Src, class F>
inline void row_sums(const Src* x, const View& view, int64_t begin, int64_t end, int64_t channels, double* out,
                     const F& term) {
  const auto sums = [&](auto order) {
    using Order = decltype(order);
    row_sums_of<Order, Src>(begin, end, channels, out,
                            [&](int64_t i, int64_t c) { return term(double(widen(x[Order::at(view, i, c)])), c); });
  };
  dispatch_order(sums, view);
}

}  // namespace DNL_ISA
}  // namespace dnl
