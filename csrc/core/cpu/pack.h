// Packing: from a strided matrix in memory, optionally centred, to the operands of core/cpu/product.h.
#pragma once

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

  template <class E>
  E at(int64_t outer, int64_t inner) const {
    const Src* x = data + outer * outer_stride + inner * inner_stride;
    if constexpr (sizeof(E) == sizeof(Src) && sizeof(E) == 2) {  // bf16 to bf16: a copy unless centred
      if (!outer_mean && !inner_mean) {
        E copy;
        std::memcpy(&copy, x, sizeof(E));
        return copy;
      }
    }
    Acc<Src> value = widen(*x);
    if (outer_mean) value -= outer_mean[outer];
    if (inner_mean) value -= inner_mean[inner];
    return narrow<E>(value);
  }
};

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
  const bool outer_fastest = x.outer_stride == 1 && x.inner_stride != 1;
  visit(rows, depth, outer_fastest, [&](int64_t r, int64_t k) { out[r * pitch + k] = x.template at<E>(r, k); });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = depth; k < pitch; ++k) out[r * pitch + k] = E{};
}

// Panels of `depth` (outer) by `lanes` (inner), zero in the lanes and the depths that fill up the last group.
template <class E, class Src>
void pack_panels(const Source<Src>& x, int64_t depth, int64_t lanes, E* out, int64_t panel) {
  constexpr int L = Block<E>::kLanes, G = Block<E>::kGroup;
  const bool outer_fastest = x.outer_stride == 1 && x.inner_stride != 1;
  for (int64_t p = 0; p * L < lanes; ++p) {
    E* to = out + p * panel;
    const int64_t count = std::min<int64_t>(L, lanes - p * L);
    Source<Src> from = x;
    from.data += p * L * x.inner_stride;
    if (from.inner_mean) from.inner_mean += p * L;
    visit(depth, count, outer_fastest, [&](int64_t k, int64_t lane) {
      to[(k / G) * G * L + lane * G + k % G] = from.template at<E>(k, lane);
    });
    for (int64_t k = 0; k < round_up(depth, G); ++k)
      for (int64_t lane = k < depth ? count : 0; lane < L; ++lane) to[(k / G) * G * L + lane * G + k % G] = E{};
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
