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

// Adds the upper half of 2 `width` sums to the lower one.
template <class T>
inline void fold(double* sum, double* rest, int64_t width) {
  for (int64_t l = 0; l < width; ++l) {
    add_to<T>(sum[l], rest[l], sum[l + width]);
    if constexpr (std::is_same_v<T, double>) rest[l] += rest[l + width];
  }
}

// The sum of `count` lanes, a power of two, in pairs; they are overwritten.
template <int64_t count>
inline double sum_of_lanes(double* lane) {
#pragma GCC unroll 8
  for (int64_t width = count / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

// f(i) over `count` of them, summed in as many lanes as a vector has.
template <class T, class F>
inline void sum_in_lanes(int64_t count, const F& f, double* out, double* out_rest) {
  constexpr int64_t W = kWidth<double>;
  double lane[kReduceLanes] = {}, rest[kReduceLanes] = {};
  int64_t i = 0;
  for (; i + kReduceLanes <= count; i += kReduceLanes)
    for (int64_t l = 0; l < kReduceLanes; ++l) add_to<T>(lane[l], rest[l], f(i + l));
  for (int64_t l = 0; i < count; ++i, ++l) add_to<T>(lane[l], rest[l], f(i));
#pragma GCC unroll 8
  for (int64_t width = kReduceLanes / 2; width >= W; width /= 2) fold<T>(lane, rest, width);
  for (int64_t l = 0; l < W; ++l) out[l] = lane[l], out_rest[l] = rest[l];
}

// sum_i f(i) over `count` of them.
template <class T, class F>
inline double lane_sum(int64_t count, const F& f) {
  double lane[kWidth<double>], rest[kWidth<double>];
  sum_in_lanes<T>(count, f, lane, rest);
#pragma GCC unroll 8
  for (int64_t width = kWidth<double> / 2; width > 0; width /= 2) fold<T>(lane, rest, width);
  return with_rest(lane[0], rest[0]);
}

// out[inner - begin] = sum_outer f(outer, inner) for N of them from `begin`: a number that the compiler knows.
template <class T, int64_t N, class F>
inline void sums_of(int64_t outers, int64_t begin, double* out, const F& f) {
  double sum[N] = {}, rest[N] = {};
  for (int64_t outer = 0; outer < outers; ++outer)
    for (int64_t i = 0; i < N; ++i) add_to<T>(sum[i], rest[i], f(outer, begin + i));
  for (int64_t i = 0; i < N; ++i) out[i] = with_rest(sum[i], rest[i]);
}

// Calls f(n, first) for pieces of [begin, end), n being a number of them that the compiler knows.
template <class F>
inline void in_pieces(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) f(std::integral_constant<int64_t, 64>{}, i);
  for (; i + 16 <= end; i += 16) f(std::integral_constant<int64_t, 16>{}, i);
  for (; i + 4 <= end; i += 4) f(std::integral_constant<int64_t, 4>{}, i);
  for (; i < end; ++i) f(std::integral_constant<int64_t, 1>{}, i);
}

// The same for inner from `begin` to `end`, at most kReduceBlock of them.
template <class T, class F>
inline void side_by_side_sums(int64_t outers, int64_t begin, int64_t end, double* out, const F& f) {
  in_pieces(begin, end, [&](auto piece, int64_t first) { sums_of<T, piece>(outers, first, out + first - begin, f); });
}

// out[c - begin] = sum_i f(i, c) for channels [begin, end), at most kReduceBlock of them, visiting memory in `Order`.
template <class Order, class T, class F>
inline void column_sums_of(int64_t positions, int64_t begin, int64_t end, double* out, const F& f) {
  if constexpr (Order::kChannelOutside)
    for (int64_t c = begin; c < end; ++c) out[c - begin] = lane_sum<T>(positions, [&](int64_t i) { return f(i, c); });
  else
    side_by_side_sums<T>(positions, begin, end, out, f);
}

// The same of weight_i x[i][c], f(i, c) being x[i][c], in the accumulate type over kWeightedRun of them and in double
// over runs. Weights are rounded, so that no exact sum is lost as in a mean.
constexpr int64_t kWeightedRun = 16;

// For N channels from `begin`.
template <class A, int64_t N, class F>
inline void weighted_sums_of(int64_t positions, int64_t begin, const A* weight, double* out, const F& f) {
  double sum[N] = {};
  for (int64_t first = 0; first < positions; first += kWeightedRun) {
    A run[N] = {};
    const int64_t last = std::min(positions, first + kWeightedRun);
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < N; ++c) run[c] += weight[i] * f(i, begin + c);
    for (int64_t c = 0; c < N; ++c) sum[c] += double(run[c]);
  }
  for (int64_t c = 0; c < N; ++c) out[c] = sum[c];
}

// For one channel.
template <class A, class F>
inline double weighted_lane_sum(int64_t positions, const A* weight, const F& f) {
  constexpr int64_t L = 4 * kWidth<A>;
  double sum[L] = {};
  A run[L] = {};
  int64_t i = 0;
  while (i + L <= positions) {
    for (int64_t step = 0; step < kWeightedRun && i + L <= positions; ++step, i += L)
      for (int64_t l = 0; l < L; ++l) run[l] += weight[i + l] * f(i + l);
    for (int64_t l = 0; l < L; ++l) sum[l] += double(run[l]), run[l] = 0;
  }
  for (int64_t l = 0; i < positions; ++i, ++l) sum[l] += double(weight[i]) * double(f(i));
  return sum_of_lanes<L>(sum);
}

template <class Order, class T>
inline void weighted_column_sums_of(int64_t positions, int64_t begin, int64_t end, const T* x, const View& view,
                                    const Acc<T>* weight, double* out) {
  using A = Acc<T>;
  const auto at = [&](int64_t i, int64_t c) { return widen(x[Order::at(view, i, c)]); };
  if constexpr (std::is_same_v<T, double>) {
    column_sums_of<Order, T>(positions, begin, end, out, [&](int64_t i, int64_t c) { return at(i, c) * weight[i]; });
  } else if constexpr (Order::kChannelOutside) {
    for (int64_t c = begin; c < end; ++c)
      out[c - begin] = weighted_lane_sum<A>(positions, weight, [&](int64_t i) { return at(i, c); });
  } else {
    in_pieces(begin, end, [&](auto piece, int64_t first) {
      weighted_sums_of<A, piece>(positions, first, weight, out + first - begin, at);
    });
  }
}

// out[c - begin] = sum_i weight_i x[i][c] for channels [begin, end) of one batch element; weight may be null.
template <class Src>
inline void column_sums(const Src* x, const View& view, int64_t positions, int64_t begin, int64_t end,
                        const Acc<Src>* weight, double* out) {
  const auto sums = [&](auto order) {
    using Order = decltype(order);
    if (weight) return weighted_column_sums_of<Order>(positions, begin, end, x, view, weight, out);
    column_sums_of<Order, Src>(positions, begin, end, out,
                               [&](int64_t i, int64_t c) { return double(widen(x[Order::at(view, i, c)])); });
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
  if constexpr (Order::kChannelOutside) {
    side_by_side_sums<T>(channels, begin, end, out, [&](int64_t c, int64_t i) { return f(i, c); });
  } else {
    // As many rows at a time as a vector has lanes: their lanes are then added up side by side.
    constexpr int64_t W = kWidth<double>;
    double lane[W][W], rest[W][W], sum[2 * W][W];
    for (int64_t first = begin; first < end; first += W) {
      const int64_t rows = std::min(W, end - first);
      for (int64_t r = 0; r < rows; ++r)
        sum_in_lanes<T>(channels, [&](int64_t c) { return f(first + r, c); }, lane[r], rest[r]);
      transpose<8>(lane, W, W, W, sum, W);
      transpose<8>(rest, W, W, W, sum + W, W);
      for (int64_t l = 1; l < W; ++l)
        for (int64_t r = 0; r < W; ++r) {
          add_to<T>(sum[0][r], sum[W][r], sum[l][r]);
          if constexpr (std::is_same_v<T, double>) sum[W][r] += sum[W + l][r];
        }
      for (int64_t r = 0; r < rows; ++r) out[first + r - begin] = with_rest(sum[0][r], sum[W][r]);
    }
  }
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

// out[i - begin] = sum_c weight_c (x[i][c] - x[0][c]) for positions [begin, end), at most kReduceBlock of them: sums
// about the first one, in the accumulate type, for what all positions share would cost them their last digits.
template <class T>
inline void weighted_row_differences(const T* x, const View& view, int64_t begin, int64_t end, int64_t channels,
                                     const Acc<T>* weight, double* out) {
  using A = Acc<T>;
  dispatch_order(
      [&](auto order) {
        using Order = decltype(order);
        const auto difference = [&](int64_t i, int64_t c) {
          return widen(x[Order::at(view, i, c)]) - widen(x[Order::at(view, 0, c)]);
        };
        if constexpr (Order::kChannelOutside) {
          const auto by_channel = [&](int64_t c, int64_t i) { return difference(i, c); };
          in_pieces(begin, end, [&](auto piece, int64_t first) {
            weighted_sums_of<A, piece>(channels, first, weight, out + first - begin, by_channel);
          });
        } else {
          // As many rows at a time as a vector has lanes: their lanes are then added up side by side. The last rows are
          // taken with the last one again.
          constexpr int64_t W = kWidth<A>;
          A lanes[W][W], columns[W][W];
          for (int64_t first = begin; first < end; first += W) {
            const int64_t rows = std::min(W, end - first);
            const T* row[W];
            for (int64_t r = 0; r < W; ++r) row[r] = x + std::min(first + r, end - 1) * view.position;
            Vec<A> sum[W] = {};
            int64_t c = 0;
            for (; c + W <= channels; c += W) {
              const Vec<A> base = load_wide(x + c), factor = load(weight + c);
#pragma GCC unroll 16
              for (int64_t r = 0; r < W; ++r) sum[r] += (load_wide(row[r] + c) - base) * factor;
            }
#pragma GCC unroll 16
            for (int64_t r = 0; r < W; ++r) {
              store(lanes[r], sum[r]);
              for (int64_t rest = c; rest < channels; ++rest)
                lanes[r][rest - c] += weight[rest] * (widen(row[r][rest]) - widen(x[rest]));
            }
            transpose<sizeof(A)>(lanes, W, W, W, columns, W);
            double sums[W] = {};
            for (int64_t l = 0; l < W; ++l)
              for (int64_t r = 0; r < W; ++r) sums[r] += double(columns[l][r]);
            for (int64_t r = 0; r < rows; ++r) out[first + r - begin] = sums[r];
          }
        }
      },
      view);
}

}  // namespace DNL_ISA
}  // namespace dnl
