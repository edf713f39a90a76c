// Rows of a chunk's map as the row kernels of the chain read and write them: a quad at a time, whole lines of them.
#pragma once

#include "core/cuda/ptx.cuh"

namespace dnl {

// Where the rows of a chunk lie, for a block that takes the tasks of `group` batch elements.
struct MapRows {
  int64_t rows, columns;  // of the map, of each batch element
  int64_t buffer_rows;    // of each batch element, whole lines
  int64_t pitch;          // between rows of float or double

  DNL_HOST_DEVICE int64_t quads() const { return pitch / kQuad; }  // of a row, those beyond its columns included
  DNL_HOST_DEVICE int64_t start(int64_t b, int64_t i) const { return (b * buffer_rows + i) * pitch; }
};

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

// Begins to copy a row to shared memory. A thread copies the quads that it will read, those with its index modulo
// kThreads: after its own wait for the copies it needs no barrier.
template <class A>
DNL_DEVICE void copy_row_async(A* kept, const A* row, int64_t quads) {
  for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads)
    for (int half = 0; half < int(sizeof(Quad<A>) / 16); ++half) {
      const int64_t at = quad * kQuad + half * (16 / sizeof(A));
      cp_async_16(kept + at, row + at, true);
    }
  cp_async_commit();
}

// Four values rounded to T, two to an instruction where T has 16 bits.
template <class T>
DNL_DEVICE Quad<T> rounded_quad(const AccOf<T> (&x)[kQuad]) {
  Quad<T> result;
  if constexpr (kHalf<T>) {
    const uint32_t pairs[2] = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])};
    memcpy(&result, pairs, sizeof(result));
  } else {
    for (int u = 0; u < kQuad; ++u) result.value[u] = rounded<T>(x[u]);
  }
  return result;
}

// Rows of the map that no query or key belongs to, but over which a product sums.
template <class T>
DNL_DEVICE void store_zeros(T* row, int64_t quads) {
  const AccOf<T> none[kQuad] = {};
  for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) store_quad(row, quad, rounded_quad<T>(none));
}

}  // namespace dnl
