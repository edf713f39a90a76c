// Forward of whitened pairwise attention on CUDA, in chunks of query rows:
//
//   S = Q K^T                              library product, float out     (rows x keys)
//   P = exp(|scale| (t - max)), stats      our kernel, a block per row    (rows x keys, of the operands' type)
//   Y = P V                                library product, float out     (rows x channels)
//   y = Y / sum of P + offset              our kernel, rounded once, in the layout of the output
//
// P is kept relative to the row's maximum, not normalised: its largest entry is 1, so float16 does not underflow where
// the softmax is flat. Y is divided by the sum of P as rounded, so that a mean which values share comes out exact; the
// statistics have the sum before rounding. P takes the place of S in the first bytes of each row. A row that fits into
// shared memory is read once; a longer one twice, for the maximum and for the exponentials.
#pragma once

#include "ops/pairwise/chain/operands.cuh"
#include "ops/pairwise/chain/row_logits.cuh"

namespace dnl {

template <class T>
struct SoftmaxStep {
  using A = AccOf<T>;
  MapRows map;         // tasks are its rows
  A* logits;           // (group, buffer rows, pitch): S, becomes P
  Rows<A> inverse;     // (group, rows): 1 / sum of P as stored
  Rows<A> stats;       // (group, rows, 2): shift and factor
  Rows<const A> bias;  // (group, columns), or null
  A sign, magnitude;   // of the scale
};

// kKept: the row is held in dynamic shared memory, (pitch).
template <class T, bool kKept>
__global__ void __launch_bounds__(kThreads) pairwise_softmax_kernel(SoftmaxStep<T> step, int64_t tasks) {
  using A = AccOf<T>;
  DNL_DYNAMIC_SHARED(A, kept);
  __shared__ A scratch[3][kWarps];
  const int64_t quads = step.map.quads();
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.map.rows, i = task % step.map.rows;
    A* row = step.logits + step.map.start(b, i);
    const RowLogits<A> logits{kKept ? kept : row, step.bias.data ? step.bias.element(b) : nullptr, step.map.columns,
                              step.sign, step.magnitude};
    T* p = reinterpret_cast<T*>(row);

    if constexpr (kKept) {
      copy_row_async(kept, row, quads);
      cp_async_wait<0>();
    }
    const A most = logits.most(scratch[0]);
    const A off = most == logits.kLowest ? A(0) : most;  // -inf less -inf would be NaN
    A sum = 0, stored = 0;
    for (int64_t first = 0; first < quads; first += kThreads) {  // of all threads alike, for the barrier
      const int64_t quad = first + threadIdx.x;
      A x[kQuad];
      if (quad < quads) logits.load_less(quad, off, x);
      // P of these quads lies where S of earlier ones lay, and S of these for the first.
      if constexpr (!kKept && kHalf<T>) __syncthreads();
      if (quad >= quads) continue;
      for (A& value : x) {
        value = exp_of(value);
        sum += value;
      }
      const Quad<T> out = rounded_quad<T>(x);
      for (T value : out.value) stored += wide(value);
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
void pairwise_softmax(Device& device, const SoftmaxStep<T>& step, int64_t group) {
  const int64_t row_bytes = step.map.pitch * sizeof(AccOf<T>), tasks = group * step.map.rows;
  if (kept_rows(1, row_bytes, device.gpu()))
    device.launch(&pairwise_softmax_kernel<T, true>, Tasks(tasks, row_bytes), step, tasks);
  else
    device.launch(&pairwise_softmax_kernel<T, false>, tasks, step, tasks);
}

template <class T, class Device>
void pairwise_forward_cuda(const PairwiseArgs& args, Device& device, const ChunkLimits& limits = {}) {
  using A = AccOf<T>;
  const PairwiseOperands<T, Device> in(args, device);
  const auto output = matrix_of<T>("query", args.output, args.batches);
  const auto residual = matrix_of<T>("query", args.residual, args.batches);
  const Chunks chunks(args.batches, args.queries, args.keys, sizeof(A),
                      rows_of_waves(args.channels, device.gpu().multiprocessors), limits);
  const int64_t keys = pitch_of(args.keys), width = pitch_of(args.width), channels = pitch_of(args.channels);
  A* logits = device.template allocate<A>(chunks.group * chunks.buffer_rows() * keys);
  A* sums = device.template allocate<A>(like_order_size(chunks.group, chunks.rows, args.channels));
  A* inverse = device.template allocate<A>(chunks.group * chunks.rows);
  const Rows<A> stats{static_cast<A*>(args.stats), 2 * args.queries};

  chunks.for_each(args.batches, args.queries, [&](int64_t b, int64_t group, int64_t first, int64_t rows) {
    const int64_t lines = pitch_of(rows);
    const Matrix<A> s = dense(logits, group, lines, keys);
    device.product(in.query.from(b, first), in.key.from(b, 0).transposed(), s, group, lines, keys, width);

    const SoftmaxStep<T> step{{rows, args.keys, lines, keys},
                              logits,
                              {inverse, rows},
                              stats.from(b, 2 * first),
                              in.bias.from(b, 0),
                              in.sign,
                              args.magnitude<A>()};
    pairwise_softmax<T>(device, step, group);

    const Matrix<const T> p = in_place_of<T>(s);
    const Matrix<T> out = output.from(b, first);
    const Matrix<A> y = like_order(out, sums, group, rows, args.channels);
    device.product(p, in.value.from(b, 0), y, group, lines, channels, keys);
    Affine<A, T> write{y.read(), out, group, rows, args.channels};
    write.alpha_row = {inverse, rows};
    write.gamma = in.offset ? in.offset + b * args.channels : nullptr;
    if (residual.data) write.rest = residual.from(b, first);
    affine(device, write);
  });
}

}  // namespace dnl
