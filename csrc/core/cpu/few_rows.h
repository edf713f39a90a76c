// Products of a few rows with a matrix that is read once, as it lies in memory.
//
// With a handful of rows a product takes as long as reading the matrix: a packed copy would be a second reading and a
// writing. A matrix is *lines* here, whose elements lie together: positions of (positions, channels), or channels of a
// channel-first map. Of lines x_i[e] and R rows of weights there are three products:
//
//   line_dots   out_r[i] += sum_e w_r[e] (x_i[e] - mean)    vectors along a line, whose lanes are added up at the end
//   line_sums   out_r[e] += sum_i w_r[i] (x_i[e] - mean)    one weight for a whole line
//   rank_few    x_i[e] = scale sum_r a_r[i] b_r[e]          written once, rounded
//
// `mean` has a number for each line or for each element of a line. Rows and means are accumulators, rows `pitch` apart,
// with room for whole vectors; lanes beyond the last element may hold anything but NaN and infinity, and do afterwards.
#pragma once

#include "core/cpu/product.h"

namespace dnl {
namespace DNL_ISA {

template <class T>
struct Lines {
  T* data;
  int64_t line, step;  // strides between lines, and between the elements of one: 1 but in rare layouts
  int64_t lines, length;

  T* at(int64_t i, int64_t e) const { return data + i * line + e * step; }
};

// What the mean of line_dots and line_sums belongs to.
enum class MeanOf { line, element };

// What a vector of a line holds: elements of its own; the last ones of the line, of which those count that no vector
// before has; or those of a line that is no vector long, or does not lie together, collected one by one.
enum class Piece { whole, last, collected };

// Calls f(piece, e) for vectors of a line's elements [begin, end): `end` is its length, or a vector ends there.
template <int W, class T, class F>
DNL_INLINE void for_pieces(const Lines<T>& x, int64_t begin, int64_t end, const F& f) {
  int64_t e = begin;
  if (x.step == 1) {
    for (; e + W <= end; e += W) f(std::integral_constant<Piece, Piece::whole>{}, e);
    if (e < end && end >= W) return f(std::integral_constant<Piece, Piece::last>{}, end - W);
  }
  for (; e < end; e += W) f(std::integral_constant<Piece, Piece::collected>{}, e);
}

// Lines less their mean.
template <MeanOf kMeanOf, class T, class A>
struct CentredLines {
  static constexpr int W = kWidth<A>;
  using Integer = typename VecOf<A>::integer;

  const Lines<T> x;
  const A* const mean;
  Integer counts;  // lanes of Piece::last

  CentredLines(const Lines<T>& lines, const A* m) : x(lines), mean(m) {
    for (int l = 0; l < W; ++l) counts[l] = l < W - lines.length % W ? 0 : -1;
  }
  // Elements from e on of line i, zero in lanes that do not count.
  template <Piece kPiece>
  DNL_INLINE Vec<A> at(int64_t i, int64_t e) const {
    const Vec<A> centre = kMeanOf == MeanOf::line ? broadcast(mean[i]) : load(mean + e);
    if constexpr (kPiece == Piece::collected) {
      A wide[W] = {};
      for (int64_t l = 0; l < std::min<int64_t>(W, x.length - e); ++l) wide[l] = widen(*x.at(i, e + l)) - centre[l];
      return load(wide);
    } else {
      const Vec<A> centred = load_wide(x.data + i * x.line + e) - centre;
      return kPiece == Piece::whole ? centred : (Vec<A>)((Integer)centred & counts);
    }
  }
  // Asks for what will be read soon of positions: short and far apart, they are no stream that the hardware follows.
  DNL_INLINE void ask(int64_t i, int64_t e) const {
    if constexpr (kMeanOf == MeanOf::element) __builtin_prefetch(x.data + i * x.line + e);
  }
};

// Lane i of the result is the sum of the lanes of x[i], by W - 1 exchanges; x is overwritten.
template <class A, int S = 1>
DNL_INLINE Vec<A> sums_of_vectors(Vec<A>* x) {
  constexpr int W = kWidth<A>;
  using Exchange = Transposition<sizeof(A)>;
  using Row = typename Exchange::Row;
#pragma GCC unroll 8
  for (int i = 0; i < W / S / 2; ++i) {
    Row a = (Row)x[2 * i], b = (Row)x[2 * i + 1];
    Exchange::template exchange<S>(a, b, std::make_index_sequence<W>());
    x[i] = (Vec<A>)a + (Vec<A>)b;
  }
  if constexpr (2 * S < W)
    return sums_of_vectors<A, 2 * S>(x);
  else
    return x[0];
}

// So many products at most are added up, in a lane or over lines, before their sum is added to that of all: in one
// running sum small ones would be rounded away.
constexpr int64_t kLaneRun = 32, kLineRun = 16;

template <int R, MeanOf kMeanOf, class T, class A>
void line_dots(const Lines<T>& lines, const A* mean, const A* weight, int64_t pitch, A* out, int64_t out_pitch) {
  constexpr int W = kWidth<A>, K = R <= 2 ? std::min(4, W) : 2;  // lines at a time
  constexpr int64_t kAhead = 16, kCacheLine = 64 / sizeof(T);
  const CentredLines<kMeanOf, T, A> x(lines, mean);
  for (int64_t begin = 0; begin < lines.length; begin += kLaneRun * W) {
    const int64_t end = std::min(lines.length, begin + kLaneRun * W);
    for (int64_t first = 0; first < lines.lines; first += W) {
      Vec<A> sum[R][W];
      for (int k = 0; k < W; k += K) {
        for (int i = 0; i < K; ++i)
          for (int64_t e = begin; e < std::min(end, begin + 4 * kCacheLine); e += kCacheLine)
            x.ask(first + k + i + kAhead, e);
        Vec<A> s[R][K] = {};
        for_pieces<W>(lines, begin, end, [&](auto piece, int64_t e) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int i = 0; i < K; ++i) {  // beyond the last line, that one again
            const Vec<A> centred = x.template at<piece>(std::min(first + k + i, lines.lines - 1), e);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) s[r][i] += centred * load(weight + r * pitch + e);
          }
        });
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < K; ++i) sum[r][k + i] = s[r][i];
      }
      for (int r = 0; r < R; ++r) {
        A* to = out + r * out_pitch + first;
        store(to, load(to) + sums_of_vectors<A>(sum[r]));
      }
    }
  }
}

template <int R, MeanOf kMeanOf, class T, class A>
void line_sums(const Lines<T>& lines, const A* mean, const A* weight, int64_t pitch, A* out, int64_t out_pitch) {
  constexpr int W = kWidth<A>, V = R == 1 ? 4 : 2;  // vectors at a time
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  const CentredLines<kMeanOf, T, A> x(lines, mean);
  for (int64_t first = 0; first < lines.lines; first += kLineRun) {
    const int64_t last = std::min(lines.lines, first + kLineRun);
    const auto add = [&](auto piece, auto vectors, int64_t e) __attribute__((always_inline)) {
      Vec<A> s[R][vectors] = {};
      for (int64_t i = first; i < last; ++i) {
        for (int64_t ahead = 0; ahead < vectors * W; ahead += kCacheLine) x.ask(i + kLineRun, e + ahead);
        for (int v = 0; v < vectors; ++v) {
          const Vec<A> centred = x.template at<piece>(i, e + v * W);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) s[r][v] += centred * weight[r * pitch + i];
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < vectors; ++v) {
          A* to = out + r * out_pitch + e + v * W;
          store(to, load(to) + s[r][v]);
        }
    };
    int64_t e = 0;
    if (lines.step == 1)
      for (; e + V * W <= lines.length; e += V * W)
        add(std::integral_constant<Piece, Piece::whole>{}, std::integral_constant<int, V>{}, e);
    for_pieces<W>(lines, e, lines.length, [&](auto piece, int64_t begin) __attribute__((always_inline)) {
      add(piece, std::integral_constant<int, 1>{}, begin);
    });
  }
}

template <int R, class T, class A>
void rank_few(const Lines<T>& x, A scale, const A* a, int64_t a_pitch, const A* b, int64_t b_pitch) {
  constexpr int W = kWidth<A>;
  for (int64_t i = 0; i < x.lines; ++i)
    for_pieces<W>(x, 0, x.length, [&](auto piece, int64_t e) __attribute__((always_inline)) {
      Vec<A> sum = load(b + e) * a[i];
#pragma GCC unroll 4
      for (int r = 1; r < R; ++r) sum += load(b + r * b_pitch + e) * a[r * a_pitch + i];
      if constexpr (piece == Piece::collected) {
        A values[W];
        store(values, sum * scale);
        for (int64_t l = 0; l < std::min<int64_t>(W, x.length - e); ++l) *x.at(i, e + l) = narrow<T>(values[l]);
      } else {
        store_narrow(x.data + i * x.line + e, sum * scale);
      }
    });
}

}  // namespace DNL_ISA
}  // namespace dnl
