// Backward of whitened pairwise attention on CUDA for float and double, in chunks of query rows:
//
//   S = Q K^T, dP = dO V^T            library products                  (rows x keys)
//   P = softmax(|scale| t)            our kernel, a block per row
//   dS = P (dP - <P, dP>)             the same kernel
//   dV += P^T dO, dK += dS^T Q        library products into buffers of their own, then added
//   dQ = dS K'                        library product, complete with the chunk
//
// A chunk holds whole rows, so P is normalised by the sum of its own exponentials and Delta is taken from its own P:
// nothing of the forward is read but its inputs. That is for accuracy. Where the softmax is nearly one-hot, as the
// paper's temperature makes it, plain PyTorch has P = 1 and dS = 0 without any error; P with the forward's statistics
// is off by the rounding of S, which at a hot logit's size is many times that of P, whenever the library adds S up
// in another order than before. Traded away: dK and dV are summed over chunks (keys x (width + channels) values), where
// the schedule for halves (chain/backward.cuh) sums the narrower dQ; and a row is read three times. A part
// (pairwise.h) has no whole rows: a kernel of its own makes P and dS with the statistics and Delta that the caller
// gives.
#pragma once

#include "ops/pairwise/chain/gradients.cuh"
#include "ops/pairwise/chain/row_logits.cuh"

namespace dnl {

template <class A>
struct SoftmaxRowStep {
  A* map;              // (group, rows, pitch): S, becomes P
  A* grad;             // (group, rows, pitch): dP, becomes dS; or null: only P is wanted
  Rows<const A> bias;  // (group, columns), or null
  int64_t rows, columns, pitch;
  A sign, magnitude;  // of the scale
};

template <class A>
__global__ void __launch_bounds__(kThreads) pairwise_row_backward_kernel(SoftmaxRowStep<A> step, int64_t tasks) {
  __shared__ A scratch[3][kWarps];
  const int64_t quads = ceil_div_of(step.columns, kQuad);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    A* map = step.map + task * step.pitch;
    A* grad = step.grad ? step.grad + task * step.pitch : nullptr;

    const RowLogits<A> logits{map, step.bias.data ? step.bias.element(task / step.rows) : nullptr, step.columns,
                              step.sign, step.magnitude};
    const A most = logits.most(scratch[0]);
    const A off = most == logits.kLowest ? A(0) : most;  // -inf less -inf would be NaN
    A sum = 0, dot = 0;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      Quad<A> dp{}, out;
      logits.load_less(quad, off, x);
      if (grad) dp = load_quad(grad, quad);
      for (int u = 0; u < kQuad; ++u) {
        out.value[u] = exp_of(x[u]);
        sum += out.value[u];
        if (quad * kQuad + u < step.columns) dot += out.value[u] * dp.value[u];
      }
      store_quad(map, quad, out);
    }
    sum = block_sum(sum, scratch[1]);
    const A delta = block_sum(dot, scratch[2]) / sum;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {  // the quads that this thread wrote
      Quad<A> p = load_quad(map, quad);
      for (int u = 0; u < kQuad; ++u) p.value[u] /= sum;
      store_quad(map, quad, p);
      if (!grad) continue;
      Quad<A> ds = load_quad(grad, quad);
      for (int u = 0; u < kQuad; ++u) ds.value[u] = softmax_jacobian(p.value[u], ds.value[u], delta);
      store_quad(grad, quad, ds);
    }
    // No barrier: each reduction has its own scratch, which the next row reaches only through the barriers before it.
  }
}

template <class A>
struct PartRowStep {
  A* map;               // (group, rows, pitch): S, becomes P
  A* grad;              // (group, rows, pitch): dP, becomes dS; or null: only P is wanted
  Rows<const A> stats;  // (group, rows, 2): shift and factor of whole rows
  Rows<const A> delta;  // (group, rows)
  int64_t rows, columns, pitch;
  A sign, magnitude;  // of the scale
};

// P = exp(|scale| (t - shift)) factor.
template <class A>
__global__ void __launch_bounds__(kThreads) pairwise_part_row_backward_kernel(PartRowStep<A> step, int64_t tasks) {
  const int64_t quads = ceil_div_of(step.columns, kQuad);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.rows, i = task % step.rows;
    A* map = step.map + task * step.pitch;
    A* grad = step.grad ? step.grad + task * step.pitch : nullptr;
    const A *stats = step.stats.element(b) + 2 * i, shift = stats[0], factor = stats[1];
    const A delta = step.delta.element(b)[i];
    const RowLogits<A> logits{map, nullptr, step.columns, step.sign, step.magnitude};
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      Quad<A> p;
      logits.load_less(quad, shift, x);
      for (int u = 0; u < kQuad; ++u) p.value[u] = exp_of(not_positive(x[u])) * factor;
      store_quad(map, quad, p);
      if (!grad) continue;
      Quad<A> ds = load_quad(grad, quad);
      for (int u = 0; u < kQuad; ++u) ds.value[u] = softmax_jacobian(p.value[u], ds.value[u], delta);
      store_quad(grad, quad, ds);
    }
  }
}

template <class T, class Device>
struct PairwiseBackwardRows {
  static_assert(!kHalf<T>, "P and dS are multiplied as they are");
  const PairwiseArgs& args;
  Device& device;
  const PairwiseOperands<T, Device> in;
  const PairwiseGradients<T, Device> out;
  Matrix<const T> grad_output;

  PairwiseBackwardRows(const PairwiseArgs& a, Device& d, const UnaryTerm<T>& unary)
      : args(a), device(d), in(a, d), out(a, d, in, unary) {
    grad_output = product_operand<T>(device, matrix_of<const T>("grad_output", args.grad_output, args.batches),
                                     args.batches, args.queries, args.channels, nullptr);
  }

  void run(const ChunkLimits& limits) {
    const bool need_grad = out.query.data || out.key.data;
    const Chunks chunks(args.batches, args.queries, args.keys, sizeof(T), limits);
    const int64_t pitch = pitch_of(args.keys), map = chunks.group * chunks.rows * pitch;
    T* logits = device.template allocate<T>(map);
    T* grad = need_grad ? device.template allocate<T>(map) : nullptr;
    const int64_t group_size = chunks.group;
    const auto buffer = [&](bool wanted, int64_t positions, int64_t channels) {
      return wanted ? device.template allocate<T>(like_order_size(group_size, positions, channels)) : nullptr;
    };
    T* grad_query = buffer(out.query.data, args.queries, args.width);
    T* grad_key = buffer(out.key.data, args.keys, args.width);
    T* grad_value = buffer(out.value.data, args.keys, args.channels);
    const bool several = chunks.rows < args.queries;
    T* more = buffer(several && (out.key.data || out.value.data), args.keys,
                     std::max(out.key.data ? args.width : 0, out.value.data ? args.channels : 0));
    // (group, keys): dS summed over the queries, in whole quads
    const int64_t sum_size = round_up_to(group_size * args.keys, kQuad);
    T* sum = out.needs_sum() ? device.template allocate<T>(sum_size) : nullptr;
    T* more_sum = out.needs_sum() && several ? device.template allocate<T>(sum_size) : nullptr;
    const Rows<const T> stats{static_cast<const T*>(args.stats), 2 * args.queries};
    const Rows<const T> delta{static_cast<const T*>(args.delta), args.queries};
    const T magnitude = args.magnitude<T>();

    // c (+)= a b, where c holds what the chunks before left
    const auto accumulate = [&](const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& c, T* total,
                                bool first, int64_t group, int64_t n, int64_t k) {
      Matrix<T> target = c;
      target.data = first ? total : more;
      device.product(a, b, target, group, args.keys, n, k);
      if (!first) add(device, total, more, group * c.batch.stride[0]);
    };

    chunks.for_each(args.batches, args.queries, [&](int64_t b, int64_t group, int64_t first, int64_t rows) {
      const bool last = first + rows == args.queries;
      const auto q = in.query.from(b, first), k = in.key.from(b, 0), dy = grad_output.from(b, first);
      const Matrix<T> s = dense(logits, group, rows, pitch), ds = dense(grad, group, rows, pitch);
      device.product(q, k.transposed(), s, group, rows, args.keys, args.width);
      if (need_grad) device.product(dy, in.value.from(b, 0).transposed(), ds, group, rows, args.keys, args.channels);
      if (args.part) {
        const PartRowStep<T> step{
            logits, grad, stats.from(b, 2 * first), delta.from(b, first), rows, args.keys, pitch, in.sign, magnitude};
        device.launch(&pairwise_part_row_backward_kernel<T>, group * rows, step, group * rows);
      } else {
        const SoftmaxRowStep<T> step{logits, grad, in.bias.from(b, 0), rows, args.keys, pitch, in.sign, magnitude};
        device.launch(&pairwise_row_backward_kernel<T>, group * rows, step, group * rows);
      }

      if (out.value.data) {
        const auto dv = like_order(out.value, grad_value, group, args.keys, args.channels);
        accumulate(s.read().transposed(), dy, dv, grad_value, first == 0, group, args.channels, rows);
        if (last) out.write_value(dv, b, group, 0, args.keys, 1);
      }
      if (out.key.data) {
        if (out.needs_sum()) {
          column_sums<T>(device, ds.read(), group, rows, args.keys, {}, 1.0, first ? more_sum : sum);
          if (first) add(device, sum, more_sum, round_up_to(group * args.keys, kQuad));
        }
        const auto dk = like_order(out.key, grad_key, group, args.keys, args.width);
        accumulate(ds.read().transposed(), q, dk, grad_key, first == 0, group, args.width, rows);
        if (last) out.write_key(dk, sum, b, group, 0, args.keys, nullptr);
      }
      if (out.query.data) {
        const auto dq = like_order(out.query, grad_query, group, args.queries, args.width);
        device.product(ds.read(), k, dq.from(0, first), group, rows, args.width, args.keys);
        if (last) out.write_query(dq, b, group, nullptr);
      }
    });
  }
};

}  // namespace dnl
