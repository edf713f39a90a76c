// The step of the backward for halves that makes the map of a chunk, as the chain takes it: P' and dS' in 16 bits from
// the products S' and dP' in float. fused/backward_map.cuh takes the same step together with the products.
#pragma once

#include "ops/pairwise/chain/operands.cuh"

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
  const A* logits;            // (group, rows, pitch): S'; the fused kernel has it in registers
  const A* grad_probability;  // (group, rows, pitch): dP'; likewise
  T* probability;             // (group, rows, pitch): P', or null where it is not wanted
  T* grad_logits;             // (group, rows, pitch): dS', or null: only P' is wanted
  A* row_sum;                 // (group, rows): sum of dS', or null
  Rows<const A> bias;         // (group, rows), or null
  Rows<const A> shift;        // (group, columns); whole quads
  Rows<const A> row_factor;   // (group, columns); whole quads: P = 2^(magnitude (t - shift)) row_factor
  Rows<const A> delta;        // (group, columns); whole quads
  const A* grad_scale;        // (group), or null
  int64_t rows, columns, pitch;
  A sign, magnitude;  // of the scale, for exponents of 2
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pairwise_softmax_backward_kernel(SoftmaxBackwardStep<T> step, int64_t tasks) {
  using A = AccOf<T>;
  constexpr A factor = 1 << kProbabilityExponent<T>;
  __shared__ A scratch[kWarps];
  const int64_t quads = ceil_div_of(step.columns, kQuad);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.rows, j = task % step.rows, row = task * step.pitch;
    const A *shift = step.shift.element(b), *row_factor = step.row_factor.element(b), *delta = step.delta.element(b);
    const A bias = step.bias.data ? step.bias.element(b)[j] : A(0);
    const A grad_scale = step.grad_scale ? step.grad_scale[b] : A(1);
    A sum = 0;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      const Quad<A> s = load_quad(step.logits + row, quad);
      const Quad<A> off = load_quad(shift, quad), by = load_quad(row_factor, quad);
      Quad<A> p;
      Quad<T> out;
      for (int u = 0; u < kQuad; ++u) {
        // Beyond the last column the buffers hold anything; zeros there are never read but must not reach `sum`.
        const bool inside = quad * kQuad + u < step.columns;
        const A exponent = (s.value[u] * step.sign + bias - off.value[u]) * step.magnitude;
        p.value[u] = inside ? by.value[u] * exp2_of(not_positive(exponent)) : A(0);
        out.value[u] = rounded<T>(factor * p.value[u]);
      }
      if (step.probability) store_quad(step.probability + row, quad, out);
      if (step.grad_logits) {
        const Quad<A> dp = load_quad(step.grad_probability + row, quad), d = load_quad(delta, quad);
        for (int u = 0; u < kQuad; ++u) {
          const bool inside = quad * kQuad + u < step.columns;
          const A ds = inside ? grad_scale * softmax_jacobian(p.value[u], dp.value[u], d.value[u]) : A(0);
          out.value[u] = rounded<T>(ds);
          sum += wide(out.value[u]);
        }
        store_quad(step.grad_logits + row, quad, out);
      }
    }
    if (step.row_sum) {
      sum = block_sum(sum, scratch);
      if (threadIdx.x == 0) step.row_sum[task] = sum;
      __syncthreads();  // before the next row overwrites `scratch`
    }
  }
}

}  // namespace dnl
