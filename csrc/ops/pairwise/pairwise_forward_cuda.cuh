// Forward of whitened pairwise attention on CUDA, in chunks of query rows:
//
//   S = Q K^T                        library product, float out     (rows x keys)
//   P = 2^(c S + bias - max), lse    our kernel, a block per row    (rows x keys, of the operands' type)
//   Y = P V                          library product, float out     (rows x channels)
//   y = Y / sum + pooled             our kernel, rounded once, in the layout of the output
//
// P is kept relative to the row's maximum, not normalised: its largest entry is 1, so float16 does not underflow where
// the softmax is flat. With float and double P takes the place of S. The row is read twice (maximum and sum, then P).
#pragma once

#include "ops/pairwise/pairwise_cuda.cuh"

namespace dnl {

template <class T>
struct SoftmaxStep {
  using A = AccOf<T>;
  const A* logits;     // (group, rows, pitch): S
  T* probability;      // (group, rows, pitch): P, which may take the place of S
  Rows<A> inverse;     // (group, rows): 1 / sum
  Rows<A> lse;         // (group, rows), natural logarithm
  Rows<const A> bias;  // (group, columns), base 2, or null
  int64_t rows, columns, pitch;
  A scale;
};

template <class T>
__global__ void __launch_bounds__(kThreads) pairwise_softmax_kernel(SoftmaxStep<T> step, int64_t tasks) {
  using A = AccOf<T>;
  using State = OnlineSoftmax<A, true>;
  __shared__ A most[kWarps], sum[kWarps];
  const int64_t quads = ceil_div_of(step.columns, kQuad);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.rows, i = task % step.rows;
    const A* s = step.logits + task * step.pitch;
    const A* bias = step.bias.data ? step.bias.element(b) : nullptr;
    T* p = step.probability + task * step.pitch;

    // Base-2 logits of a quad; -inf beyond the last column, where the buffer holds anything.
    const auto logits = [&](int64_t quad, A(&x)[kQuad]) {
      const Quad<A> in = load_quad(s, quad);
      Quad<A> more{};
      if (bias) more = load_quad(bias, quad);
      for (int u = 0; u < kQuad; ++u)
        x[u] = quad * kQuad + u < step.columns ? in.value[u] * step.scale + more.value[u]
                                               : -std::numeric_limits<A>::infinity();
    };

    State state;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      logits(quad, x);
      state.add(x);
    }
    state = block_merge(state, most, sum);
    if (threadIdx.x == 0) {
      step.inverse.element(b)[i] = A(1) / state.sum;
      step.lse.element(b)[i] = state.lse();
    }
    const A shift = state.shift();
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      Quad<T> out;
      logits(quad, x);
      for (int u = 0; u < kQuad; ++u) out.value[u] = rounded<T>(State::power(x[u] - shift));
      store_quad(p, quad, out);
    }
    __syncthreads();  // before the next row overwrites `most` and `sum`
  }
}

template <class T, class Device>
void pairwise_forward_cuda(const PairwiseArgs& args, Device& device, const ChunkLimits& limits = {}) {
  using A = AccOf<T>;
  const PairwiseOperands<T, Device> in(args, device);
  const auto output = matrix_of<T>("query", args.output, args.batches);
  const Chunks chunks(args.batches, args.queries, args.keys, sizeof(A), limits);
  const int64_t pitch = pitch_of(args.keys), map = chunks.group * chunks.rows * pitch;
  A* logits = device.template allocate<A>(map);
  T* probability;
  if constexpr (kHalf<T>) probability = device.template allocate<T>(map);
  else probability = logits;
  A* sums = device.template allocate<A>(like_order_size(chunks.group, chunks.rows, args.channels));
  A* inverse = device.template allocate<A>(chunks.group * chunks.rows);
  const Rows<A> lse{static_cast<A*>(args.lse), args.queries};
  const A* pooled = static_cast<const A*>(args.pooled);

  chunks.for_each(args.batches, args.queries, [&](int64_t b, int64_t group, int64_t first, int64_t rows) {
    const Matrix<A> s = dense(logits, group, rows, pitch);
    const Matrix<T> p = dense(probability, group, rows, pitch);
    device.product(in.query.from(b, first), in.key.from(b, 0).transposed(), s, group, rows, args.keys, args.width);

    const SoftmaxStep<T> step{logits, probability, {inverse, rows}, lse.from(b, first), in.bias.from(b, 0),
                              rows,   args.keys,   pitch,           in.scale};
    device.launch(&pairwise_softmax_kernel<T>, group * rows, step, group * rows);

    const Matrix<T> out = output.from(b, first);
    const Matrix<A> y = like_order(out, sums, group, rows, args.channels);
    device.product(p.read(), in.value.from(b, 0), y, group, rows, args.channels, args.keys);
    Affine<A, T> write{y.read(), out, group, rows, args.channels};
    write.alpha_row = {inverse, rows};
    write.gamma = pooled ? pooled + b * args.channels : nullptr;
    affine(device, write);
  });
}

}  // namespace dnl
