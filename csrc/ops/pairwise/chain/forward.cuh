// Forward of whitened pairwise attention on CUDA, in chunks of query rows:
//
//   S = Q K^T                              library product, float out     (rows x keys)
//   P = exp(|scale| (t - max)), stats      our kernel, a block per row    (rows x keys, of the operands' type)
//   Y = P V                                library product, float out     (rows x channels)
//   y = Y / sum of P + offset              our kernel, rounded once, in the layout of the output
//
// P is kept relative to the row's maximum, not normalised: its largest entry is 1, so float16 does not underflow where
// the softmax is flat. Y is divided by the sum of P as rounded, so that a mean which values share comes out exact; the
// statistics have the sum before rounding. With float and double P takes the place of S. A row is read twice, for
// the maximum and for the exponentials.
#pragma once

#include "ops/pairwise/chain/operands.cuh"
#include "ops/pairwise/chain/row_logits.cuh"

namespace dnl {

template <class T>
struct SoftmaxStep {
  using A = AccOf<T>;
  const A* logits;     // (group, rows, pitch): S
  T* probability;      // (group, rows, pitch): P, which may take the place of S
  Rows<A> inverse;     // (group, rows): 1 / sum of P as stored
  Rows<A> stats;       // (group, rows, 2): shift and factor
  Rows<const A> bias;  // (group, columns), or null
  int64_t rows, columns, pitch;
  A sign, magnitude;  // of the scale
};

template <class T>
__global__ void __launch_bounds__(kThreads) pairwise_softmax_kernel(SoftmaxStep<T> step, int64_t tasks) {
  using A = AccOf<T>;
  __shared__ A scratch[3][kWarps];
  const int64_t quads = ceil_div_of(step.columns, kQuad);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.rows, i = task % step.rows;
    const RowLogits<A> logits{step.logits + task * step.pitch, step.bias.data ? step.bias.element(b) : nullptr,
                              step.columns, step.sign, step.magnitude};
    T* p = step.probability + task * step.pitch;

    const A most = logits.most(scratch[0]);
    const A off = most == logits.kLowest ? A(0) : most;  // -inf less -inf would be NaN
    A sum = 0, stored = 0;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      Quad<T> out;
      logits.load_less(quad, off, x);
      for (int u = 0; u < kQuad; ++u) {
        const A value = exp_of(x[u]);
        sum += value;
        out.value[u] = rounded<T>(value);
        stored += wide(out.value[u]);
      }
      store_quad(p, quad, out);
    }
    sum = block_sum(sum, scratch[1]);
    stored = block_sum(stored, scratch[2]);
    if (threadIdx.x == 0) {
      step.inverse.element(b)[i] = A(1) / stored;
      store_stats(most, sum, step.stats.element(b) + 2 * i);
    }
    // No barrier: each sum has its own scratch, which the next row reaches only through the barriers before it.
  }
}

template <class T, class Device>
void pairwise_forward_cuda(const PairwiseArgs& args, Device& device, const ChunkLimits& limits = {}) {
  using A = AccOf<T>;
  const PairwiseOperands<T, Device> in(args, device);
  const auto output = matrix_of<T>("query", args.output, args.batches);
  const auto residual = matrix_of<T>("query", args.residual, args.batches);
  const Chunks chunks(args.batches, args.queries, args.keys, sizeof(A), limits);
  const int64_t pitch = pitch_of(args.keys), map = chunks.group * chunks.rows * pitch;
  A* logits = device.template allocate<A>(map);
  T* probability;
  if constexpr (kHalf<T>)
    probability = device.template allocate<T>(map);
  else
    probability = logits;
  A* sums = device.template allocate<A>(like_order_size(chunks.group, chunks.rows, args.channels));
  A* inverse = device.template allocate<A>(chunks.group * chunks.rows);
  const Rows<A> stats{static_cast<A*>(args.stats), 2 * args.queries};

  chunks.for_each(args.batches, args.queries, [&](int64_t b, int64_t group, int64_t first, int64_t rows) {
    const Matrix<A> s = dense(logits, group, rows, pitch);
    const Matrix<T> p = dense(probability, group, rows, pitch);
    device.product(in.query.from(b, first), in.key.from(b, 0).transposed(), s, group, rows, args.keys, args.width);

    const SoftmaxStep<T> step{
        logits,    probability, {inverse, rows}, stats.from(b, 2 * first), in.bias.from(b, 0), rows,
        args.keys, pitch,       in.sign,         args.magnitude<A>()};
    device.launch(&pairwise_softmax_kernel<T>, group * rows, step, group * rows);

    const Matrix<T> out = output.from(b, first);
    const Matrix<A> y = like_order(out, sums, group, rows, args.channels);
    device.product(p.read(), in.value.from(b, 0), y, group, rows, args.channels, args.keys);
    Affine<A, T> write{y.read(), out, group, rows, args.channels};
    write.alpha_row = {inverse, rows};
    write.gamma = in.offset ? in.offset + b * args.channels : nullptr;
    if (residual.data) write.rest = residual.from(b, first);
    affine(device, write);
  });
}

}  // namespace dnl
