// The step of the backward for halves that makes the map of a chunk, as the chain takes it: P' and dS' in 16 bits from
// the products S' and dP' in float, whose place they take. fused/backward_map.cuh takes the same step together with the
// products.
#pragma once

#include "ops/pairwise/chain/operands.cuh"
#include "ops/pairwise/chain/row_logits.cuh"

namespace dnl {

template <class T>
constexpr int kProbabilityExponent = std::is_same_v<T, __half> ? 12 : 0;
template <class T>
constexpr bool kScaledGradient = std::is_same_v<T, __half>;
constexpr float kGradientBound = 32768;  // of scaled dS, half of what float16 can hold
static_assert((1 << kProbabilityExponent<__half>)*2 <= kGradientBound, "P is at most 1, give or take a rounding");

template <class T>
struct SoftmaxBackwardStep {
  using A = AccOf<T>;
  A* logits;            // (group, buffer rows, pitch): S'; the fused kernel has it in registers
  A* grad_probability;  // (group, buffer rows, pitch): dP'; likewise
  T* probability;       // (group, rows, pitch): P', in the place of S' if that is there; null where it is not wanted
  T* grad_logits;       // (group, rows, pitch): dS', likewise in that of dP'; null where only P' is wanted
  A* row_sum;           // (group, rows): sum of dS', or null
  Rows<const A> bias;   // (group, rows), or null
  Rows<const A> shift;  // (group, columns); whole quads
  Rows<const A> row_factor;  // (group, columns); whole quads: P = 2^(magnitude (t - shift)) row_factor
  Rows<const A> delta;       // (group, columns); whole quads
  const A* grad_scale;       // (group), or null
  int64_t rows, columns, pitch;
  A sign, magnitude;        // of the scale, for exponents of 2
  int64_t buffer_rows = 0;  // of each batch element, whole lines; not for the fused kernel
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pairwise_softmax_backward_kernel(SoftmaxBackwardStep<T> step, int64_t tasks) {
  using A = AccOf<T>;
  constexpr A factor = 1 << kProbabilityExponent<T>;
  __shared__ A scratch[kWarps];
  const MapRows map{step.rows, step.columns, step.buffer_rows, step.pitch};
  const int64_t quads = map.quads();
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / map.buffer_rows, j = task % map.buffer_rows;
    A* row = step.logits + map.start(b, j);
    A* grad_row = step.grad_logits ? step.grad_probability + map.start(b, j) : nullptr;
    T* probability = step.probability ? reinterpret_cast<T*>(row) : nullptr;
    T* grad_logits = reinterpret_cast<T*>(grad_row);
    if (j >= map.rows) {
      if (probability) store_zeros(probability, quads);
      if (grad_logits) store_zeros(grad_logits, quads);
      continue;
    }
    const A *shift = step.shift.element(b), *row_factor = step.row_factor.element(b), *delta = step.delta.element(b);
    const A bias = step.bias.data ? step.bias.element(b)[j] : A(0);
    const A grad_scale = step.grad_scale ? step.grad_scale[b] : A(1);
    A sum = 0;
    for (int64_t first = 0; first < quads; first += kThreads) {  // of all threads alike, for the barrier
      const int64_t quad = first + threadIdx.x;
      Quad<A> s{}, dp{};
      if (quad < quads) {
        s = load_quad(row, quad);
        if (grad_row) dp = load_quad(grad_row, quad);
      }
      __syncthreads();  // results lie where logits of these and of earlier quads lay
      if (quad >= quads) continue;
      const Quad<A> off = load_quad(shift, quad), by = load_quad(row_factor, quad);
      Quad<A> d{};
      if (grad_row) d = load_quad(delta, quad);
      A p[kQuad], ds[kQuad];
      for (int u = 0; u < kQuad; ++u) {
        // Beyond the last column the buffers hold anything; products sum over the zeros there.
        const bool inside = quad * kQuad + u < step.columns;
        const A exponent = (s.value[u] * step.sign + bias - off.value[u]) * step.magnitude;
        const A value = inside ? by.value[u] * exp2_of(not_positive(exponent)) : A(0);
        p[u] = factor * value;
        ds[u] = inside ? grad_scale * softmax_jacobian(value, dp.value[u], d.value[u]) : A(0);
      }
      if (probability) store_quad(probability, quad, rounded_quad<T>(p));
      if (!grad_logits) continue;
      const Quad<T> out = rounded_quad<T>(ds);
      for (T value : out.value) sum += wide(value);
      store_quad(grad_logits, quad, out);
    }
    if (step.row_sum) {
      sum = block_sum(sum, scratch);
      if (threadIdx.x == 0) step.row_sum[b * map.rows + j] = sum;
      __syncthreads();  // before the next row overwrites `scratch`
    }
  }
}

}  // namespace dnl
