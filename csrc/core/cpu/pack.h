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

// The index of a Source whose elements lie together, known to the compiler.
enum class Together { neither, outer, inner };

// Calls f(at), where at(outer, inner) is the element as E: one loop body per kind of centring, and a plain copy where
// nothing changes. `kTogether` must be true of the strides.
template <class E, Together kTogether, class Src, class F>
inline void with_elements(const Source<Src>& x, const F& f) {
  const auto* data = x.data;
  const int64_t outer_stride = x.outer_stride, inner_stride = x.inner_stride;
  const auto* mean = x.outer_mean ? x.outer_mean : x.inner_mean;
  const auto raw = [=](int64_t outer, int64_t inner) {
    return data[kTogether == Together::outer   ? outer + inner * inner_stride
                : kTogether == Together::inner ? outer * outer_stride + inner
                                               : outer * outer_stride + inner * inner_stride];
  };
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

// Reads an outer x inner matrix along its outer index, in tiles of kTile x kInners, and calls f(outer, inner, outers,
// inners, tile) with each: where it begins, its size, and its elements, (o, i) at i * kTile + o.
constexpr int64_t kTile = 32;
template <class E, int64_t kInners, class Src, class F>
inline void for_tiles(const Source<Src>& x, int64_t outers, int64_t inners, const F& f) {
  const auto visit = [&](auto at) {
    alignas(64) E tile[kInners * kTile];
    for (int64_t o = 0; o < outers; o += kTile)
      for (int64_t i = 0; i < inners; i += kInners) {
        const int64_t height = std::min(kTile, outers - o), width = std::min(kInners, inners - i);
        for (int64_t b = 0; b < width; ++b)
          for (int64_t a = 0; a < height; ++a) tile[b * kTile + a] = at(o + a, i + b);
        f(o, i, height, width, static_cast<const E*>(tile));
      }
  };
  x.outer_stride == 1 ? with_elements<E, Together::outer>(x, visit) : with_elements<E, Together::neither>(x, visit);
}

// Panels of `depth` (outer) by `lanes` (inner), L lanes in each, zero in the lanes and the depths that fill up the last
// group.
template <class E, int64_t L = Block<E>::kLanes, class Src>
void pack_panels(const Source<Src>& x, int64_t depth, int64_t lanes, E* out, int64_t panel) {
  constexpr int64_t G = Block<E>::kGroup;
  using Group = std::conditional_t<G == 4, uint64_t, uint32_t>;  // of 16-bit elements
  const auto place = [](int64_t k, int64_t lane) { return panel_place<E>(k, lane, L); };
  if (x.inner_stride == 1)
    with_elements<E, Together::inner>(x, [=](auto at) {
      for (int64_t first = 0; first < lanes; first += L) {
        E* to = out + first / L * panel;
        const int64_t count = std::min(L, lanes - first);
        for (int64_t k = 0; k + G <= depth; k += G)
          if constexpr (G > 1) {
            for (int64_t lane = 0; lane < count; ++lane) {
              Group group = 0;
#pragma GCC unroll 4
              for (int64_t g = 0; g < G; ++g) group |= static_cast<Group>(at(k + g, first + lane).bits) << 16 * g;
              std::memcpy(to + k * L + lane * G, &group, sizeof(group));
            }
          } else {
            for (int64_t lane = 0; lane < count; ++lane) to[k * L + lane] = at(k, first + lane);
          }
        for (int64_t k = depth / G * G; k < depth; ++k)
          for (int64_t lane = 0; lane < count; ++lane) to[place(k, lane)] = at(k, first + lane);
      }
    });
  else
    for_tiles<E, std::min(L, kTile)>(  // no tile across two panels
        x, depth, lanes, [=](int64_t k, int64_t lane, int64_t height, int64_t width, const E* tile) {
          E* to = out + lane / L * panel + lane % L * G + k * L;
          transpose<G * sizeof(E)>(tile, kTile / G, width, height / G, to, L);  // a lane holds a group of depths
          for (int64_t last = height / G * G; last < height; ++last)
            for (int64_t i = 0; i < width; ++i) to[place(last, i)] = tile[i * kTile + last];
        });
  const int64_t filled = round_up(depth, G);
  for (int64_t first = 0; first < lanes; first += L)
    for (int64_t k = 0; k < filled; ++k)
      for (int64_t lane = k < depth ? std::min(L, lanes - first) : 0; lane < L; ++lane)
        out[first / L * panel + place(k, lane)] = E{};
}

// Rows (outer) of `depth` (inner) elements, `pitch` apart, zero from depth on to the last group at least.
template <class E, class Src>
void pack_rows(const Source<Src>& x, int64_t rows, int64_t depth, int64_t pitch, E* out) {
  constexpr int64_t T = Block<E>::kRowGroup;
  if constexpr (T > 1) {
    const Source<Src> columns{x.data, x.inner_stride, x.outer_stride, x.inner_mean, x.outer_mean};
    return pack_panels<E, T>(columns, depth, rows, out, T * pitch);
  }
  if (x.inner_stride == 1)
    with_elements<E, Together::inner>(x, [=](auto at) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < depth; ++k) out[r * pitch + k] = at(r, k);
    });
  else
    for_tiles<E, kTile>(x, rows, depth, [=](int64_t r, int64_t k, int64_t height, int64_t width, const E* tile) {
      transpose<sizeof(E)>(tile, kTile, width, height, out + r * pitch + k, pitch);
    });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = depth; k < pitch; ++k) out[r * pitch + k] = E{};
}

// Writes f(row)(lane), at most kMostLanes lanes, to memory with any strides. Values are computed along the lanes,
// where that vectorises; where lanes are not contiguous in memory, a few rows at a time are computed first and then
// transposed.
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
  alignas(64) Dst tile[kTile][kMostLanes];
  for (int64_t first = 0; first < rows; first += kTile) {
    const int64_t count = std::min(kTile, rows - first);
    for (int64_t r = 0; r < count; ++r) {
      const auto value = f(first + r);
      for (int64_t lane = 0; lane < lanes; ++lane) tile[r][lane] = value(lane);
    }
    Dst* to = out + first * row_stride;
    if (row_stride == 1) {
      transpose<sizeof(Dst)>(tile, kMostLanes, count, lanes, to, lane_stride);
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
