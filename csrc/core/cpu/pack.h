// Packing: from a strided matrix in memory, optionally centred, to the operands of core/cpu/product.h, and back.
#pragma once

#include <type_traits>

#include "core/cpu/product.h"

namespace dnl {
namespace DNL_ISA {

// A strided matrix of Src elements, read as (outer, inner). `mean` holds one value per outer index or per inner index.
template <class Src>
struct Source {
  const Src* data;
  int64_t outer_stride, inner_stride;
  const Acc<Src>* outer_mean = nullptr;
  const Acc<Src>* inner_mean = nullptr;
};

// Calls f(at), where at(outer, inner) is the element as E: one loop body per kind of centring, and a plain copy where
// nothing changes.
template <class E, class Src, class F>
inline void with_elements(const Source<Src>& x, const F& f) {
  const auto* data = x.data;
  const int64_t outer_stride = x.outer_stride, inner_stride = x.inner_stride;
  const auto* mean = x.outer_mean ? x.outer_mean : x.inner_mean;
  const auto raw = [=](int64_t outer, int64_t inner) { return data[outer * outer_stride + inner * inner_stride]; };
  if (x.outer_mean) {
    f([=](int64_t outer, int64_t inner) { return narrow<E>(widen(raw(outer, inner)) - mean[outer]); });
  } else if (x.inner_mean) {
    f([=](int64_t outer, int64_t inner) { return narrow<E>(widen(raw(outer, inner)) - mean[inner]); });
  } else if constexpr (std::is_same_v<E, Src>) {
    f(raw);
  } else {
    f([=](int64_t outer, int64_t inner) { return narrow<E>(widen(raw(outer, inner))); });
  }
}

// Visits an outer x inner matrix in tiles, the index that moves fastest in memory innermost, so that a transposition
// reads whole cache lines and writes within a few.
template <class F>
inline void visit(int64_t outers, int64_t inners, bool outer_fastest, const F& f) {
  constexpr int64_t T = 32;
  for (int64_t o = 0; o < outers; o += T)
    for (int64_t i = 0; i < inners; i += T) {
      const int64_t oe = std::min(outers, o + T), ie = std::min(inners, i + T);
      if (outer_fastest) {
        for (int64_t ii = i; ii < ie; ++ii)
          for (int64_t oo = o; oo < oe; ++oo) f(oo, ii);
      } else {
        for (int64_t oo = o; oo < oe; ++oo)
          for (int64_t ii = i; ii < ie; ++ii) f(oo, ii);
      }
    }
}

// Rows (outer) of `depth` (inner) elements, `pitch` apart, zero from depth to pitch.
template <class E, class Src>
void pack_rows(const Source<Src>& x, int64_t rows, int64_t depth, int64_t pitch, E* out) {
  with_elements<E>(x, [=](auto at) {
    if (x.inner_stride == 1) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < depth; ++k) out[r * pitch + k] = at(r, k);
    } else {
      visit(rows, depth, x.outer_stride == 1, [=](int64_t r, int64_t k) { out[r * pitch + k] = at(r, k); });
    }
  });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = depth; k < pitch; ++k) out[r * pitch + k] = E{};
}

// Panels of `depth` (outer) by `lanes` (inner), zero in the lanes and the depths that fill up the last group.
template <class E, class Src>
void pack_panels(const Source<Src>& x, int64_t depth, int64_t lanes, E* out, int64_t panel) {
  constexpr int64_t L = Block<E>::kLanes, G = Block<E>::kGroup;
  const auto place = [](int64_t k, int64_t lane) { return k / G * G * L + lane * G + k % G; };
  with_elements<E>(x, [=](auto at) {
    for (int64_t first = 0; first < lanes; first += L) {
      E* to = out + first / L * panel;
      if (x.inner_stride == 1 && lanes - first >= L) {
        for (int64_t k = 0; k + G <= depth; k += G)
          for (int64_t lane = 0; lane < L; ++lane)
            for (int64_t g = 0; g < G; ++g) to[k * L + lane * G + g] = at(k + g, first + lane);
        for (int64_t k = depth / G * G; k < depth; ++k)
          for (int64_t lane = 0; lane < L; ++lane) to[place(k, lane)] = at(k, first + lane);
      } else {
        visit(depth, std::min(L, lanes - first), x.outer_stride == 1 && x.inner_stride != 1,
              [=](int64_t k, int64_t lane) { to[place(k, lane)] = at(k, first + lane); });
      }
    }
  });
  const int64_t filled = round_up(depth, G);
  for (int64_t first = 0; first < lanes; first += L)
    for (int64_t k = 0; k < filled; ++k)
      for (int64_t lane = k < depth ? std::min(L, lanes - first) : 0; lane < L; ++lane)
        out[first / L * panel + place(k, lane)] = E{};
}

// Writes f(row)(lane), at most kMostLanes lanes, to memory with any strides. Values are made along the lanes, where
// their making vectorises; where lanes are not what lies together in memory, a few rows at a time are made first and
// then transposed.
constexpr int64_t kMostLanes = 64;
template <class Dst, class F>
inline void write_lanes(Dst* out, int64_t row_stride, int64_t lane_stride, int64_t rows, int64_t lanes, const F& f) {
  if (lane_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto value = f(r);
      for (int64_t lane = 0; lane < lanes; ++lane) out[r * row_stride + lane] = value(lane);
    }
    return;
  }
  constexpr int64_t T = 32;
  Dst tile[T][kMostLanes];
  for (int64_t first = 0; first < rows; first += T) {
    const int64_t count = std::min(T, rows - first);
    for (int64_t r = 0; r < count; ++r) {
      const auto value = f(first + r);
      for (int64_t lane = 0; lane < lanes; ++lane) tile[r][lane] = value(lane);
    }
    Dst* to = out + first * row_stride;
    if (row_stride == 1) {
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t r = 0; r < count; ++r) to[lane * lane_stride + r] = tile[r][lane];
    } else {
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t r = 0; r < count; ++r) to[lane * lane_stride + r * row_stride] = tile[r][lane];
    }
  }
}

// Bytes from a workspace in order; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* result = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace DNL_ISA
}  // namespace dnl
