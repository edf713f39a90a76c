// A row of logits as the row kernels of the chain read it: with the bias of its columns, a quad at a time.
#pragma once

#include "core/cuda/device.cuh"

namespace dnl {

template <class A>
struct RowLogits {
  const A* row;   // (columns), whole quads: S
  const A* bias;  // (columns), whole quads, or null
  int64_t columns;
  A sign, magnitude;  // of the scale

  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

  // Logits of a quad, but for the magnitude of the scale (pairwise.h); -inf beyond the last column, where the buffer
  // holds anything.
  DNL_DEVICE void load(int64_t quad, A (&x)[kQuad]) const {
    const Quad<A> in = load_quad(row, quad);
    Quad<A> more{};
    if (bias) more = load_quad(bias, quad);
    for (int u = 0; u < kQuad; ++u) x[u] = quad * kQuad + u < columns ? in.value[u] * sign + more.value[u] : kLowest;
  }

  // Logits of a quad less `off`, which is in units of what load() gives.
  DNL_DEVICE void load_less(int64_t quad, A off, A (&x)[kQuad]) const {
    load(quad, x);
    for (int u = 0; u < kQuad; ++u) x[u] = (x[u] - off) * magnitude;
  }

  // The largest logit that is a number, -inf if there is none, in every thread of the block. `scratch` as for
  // block_max.
  DNL_DEVICE A most(A* scratch) const {
    A largest = kLowest;
    const int64_t quads = ceil_div_of(columns, kQuad);
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      load(quad, x);
      for (int u = 0; u < kQuad; ++u) largest = x[u] > largest ? x[u] : largest;
    }
    return block_max(largest, scratch);
  }
};

}  // namespace dnl
