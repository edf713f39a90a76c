// Backward of whitened pairwise attention on CUDA for float and double, in chunks of query rows:
//
//   S = Q K^T, dP = dO V^T            library products                  (rows x keys)
//   P = softmax(|scale| t)            our kernel, a block per row
//   dS = P (dP - <P, dP>)             the same kernel
//   dV += P^T dO, dK += dS^T Q        library products that add to their results
//   dQ = dS K'                        library product, complete with the chunk
//
// A chunk holds whole rows, so P is normalised by the sum of its own exponentials and Delta is taken from its own P:
// nothing of the forward is read but its inputs. That is for accuracy. Where the softmax is nearly one-hot, as the
// paper's temperature makes it, plain PyTorch has P = 1 and dS = 0 without any error; P with the forward's statistics
// is off by the rounding of S, which at a hot logit's size is many times that of P, whenever the library adds S up
// in another order than before. Traded away: dK and dV are summed over chunks (keys x (width + channels) values), where
// the schedule for halves (chain/backward.cuh) sums the narrower dQ; and a row is read up to three times where it does
// not fit into shared memory, which holds S first, then dP too. A part (pairwise.h) has no whole rows: a kernel of its
// own makes P and dS with the statistics and Delta that the caller gives.
#pragma once

#include "ops/pairwise/chain/gradients.cuh"
#include "ops/pairwise/chain/row_logits.cuh"

namespace dnl {

template <class A>
struct SoftmaxRowStep {
  MapRows map;         // tasks are its rows, and those of the buffers that are none: zeros
  A* logits;           // (group, buffer rows, pitch): S, becomes P
  A* grad;             // (group, buffer rows, pitch): dP, becomes dS; or null: only P is wanted
  Rows<const A> bias;  // (group, columns), or null
  A sign, magnitude;   // of the scale
};

// kKept: the rows that are held in dynamic shared memory, (kKept, pitch): none, S, or S and dP.
template <class A, int kKept>
__global__ void __launch_bounds__(kThreads) pairwise_row_backward_kernel(SoftmaxRowStep<A> step, int64_t tasks) {
  DNL_DYNAMIC_SHARED(A, kept);
  __shared__ A scratch[3][kWarps];
  const int64_t quads = step.map.quads(), columns = step.map.columns;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.map.buffer_rows, i = task % step.map.buffer_rows;
    A* row = step.logits + step.map.start(b, i);
    A* grad = step.grad ? step.grad + step.map.start(b, i) : nullptr;
    if (i >= step.map.rows) {
      store_zeros(row, quads);
      if (grad) store_zeros(grad, quads);
      continue;
    }
    A* const unscaled = kKept >= 1 ? kept : row;  // S, then exponentials
    const A* const dp_row = kKept == 2 ? kept + step.map.pitch : grad;
    if constexpr (kKept >= 1) {
      copy_row_async(kept, row, quads);
      if (kKept == 2) copy_row_async(kept + step.map.pitch, grad, quads);
      cp_async_wait<kKept == 2>();  // for S
    }

    const RowLogits<A> logits{unscaled, step.bias.data ? step.bias.element(b) : nullptr, columns, step.sign,
                              step.magnitude};
    const A most = logits.most(scratch[0]);
    const A off = most == logits.kLowest ? A(0) : most;  // -inf less -inf would be NaN
    if constexpr (kKept == 2) cp_async_wait<0>();
    A sum = 0, dot = 0;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      Quad<A> dp{}, out;
      logits.load_less(quad, off, x);
      if (grad) dp = load_quad(dp_row, quad);
      for (int u = 0; u < kQuad; ++u) {
        out.value[u] = exp_of(x[u]);
        sum += out.value[u];
        dot += out.value[u] * dp.value[u];
      }
      store_quad(unscaled, quad, out);
    }
    sum = block_sum(sum, scratch[1]);
    const A delta = block_sum(dot, scratch[2]) / sum;
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {  // the quads that this thread wrote
      Quad<A> p = load_quad(unscaled, quad), ds{};
      if (grad) ds = load_quad(dp_row, quad);
      for (int u = 0; u < kQuad; ++u) {
        const bool inside = quad * kQuad + u < columns;  // 0 beyond, whatever the sum
        p.value[u] = inside ? p.value[u] / sum : A(0);
        ds.value[u] = inside ? softmax_jacobian(p.value[u], ds.value[u], delta) : A(0);
      }
      store_quad(row, quad, p);
      if (grad) store_quad(grad, quad, ds);
    }
    // No barrier: each reduction has its own scratch, which the next row reaches only through the barriers before it.
  }
}

template <class A, class Device>
void pairwise_row_backward(Device& device, const SoftmaxRowStep<A>& step, int64_t group) {
  const int64_t row_bytes = step.map.pitch * sizeof(A), tasks = group * step.map.buffer_rows;
  const int kept = kept_rows(step.grad ? 2 : 1, row_bytes, device.gpu());
  const auto kernel = kept == 2   ? &pairwise_row_backward_kernel<A, 2>
                      : kept == 1 ? &pairwise_row_backward_kernel<A, 1>
                                  : &pairwise_row_backward_kernel<A, 0>;
  device.launch(kernel, Tasks(tasks, kept * row_bytes), step, tasks);
}

template <class A>
struct PartRowStep {
  MapRows map;          // tasks as above
  A* logits;            // (group, buffer rows, pitch): S, becomes P
  A* grad;              // (group, buffer rows, pitch): dP, becomes dS; or null: only P is wanted
  Rows<const A> stats;  // (group, rows, 2): shift and factor of whole rows
  Rows<const A> delta;  // (group, rows)
  A sign, magnitude;    // of the scale
};

// P = exp(|scale| (t - shift)) factor.
template <class A>
__global__ void __launch_bounds__(kThreads) pairwise_part_row_backward_kernel(PartRowStep<A> step, int64_t tasks) {
  const int64_t quads = step.map.quads();
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / step.map.buffer_rows, i = task % step.map.buffer_rows;
    A* row = step.logits + step.map.start(b, i);
    A* grad = step.grad ? step.grad + step.map.start(b, i) : nullptr;
    if (i >= step.map.rows) {
      store_zeros(row, quads);
      if (grad) store_zeros(grad, quads);
      continue;
    }
    const A *stats = step.stats.element(b) + 2 * i, shift = stats[0], factor = stats[1];
    const A delta = step.delta.element(b)[i];
    const RowLogits<A> logits{row, nullptr, step.map.columns, step.sign, step.magnitude};
    for (int64_t quad = threadIdx.x; quad < quads; quad += kThreads) {
      A x[kQuad];
      Quad<A> p, ds{};
      logits.load_less(quad, shift, x);
      if (grad) ds = load_quad(grad, quad);
      for (int u = 0; u < kQuad; ++u) {
        const bool inside = quad * kQuad + u < step.map.columns;
        p.value[u] = inside ? exp_of(not_positive(x[u])) * factor : A(0);
        ds.value[u] = inside ? softmax_jacobian(p.value[u], ds.value[u], delta) : A(0);
      }
      store_quad(row, quad, p);
      if (grad) store_quad(grad, quad, ds);
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
    const int64_t narrowest = out.query.data ? std::min(args.width, args.keys) : args.keys;  // of dQ and of S
    const Chunks chunks(args.batches, args.queries, args.keys, sizeof(T),
                        rows_of_waves(narrowest, device.gpu().multiprocessors), limits);
    const int64_t keys = pitch_of(args.keys), width = pitch_of(args.width), channels = pitch_of(args.channels);
    const int64_t map = chunks.group * chunks.buffer_rows() * keys;
    T* logits = device.template allocate<T>(map);
    T* grad = need_grad ? device.template allocate<T>(map) : nullptr;
    const auto buffer = [&](bool wanted, int64_t positions, int64_t columns) {
      return wanted ? device.template allocate<T>(like_order_size(chunks.group, positions, columns)) : nullptr;
    };
    T* grad_query = buffer(out.query.data, args.queries, args.width);
    T* grad_key = buffer(out.key.data, args.keys, args.width);
    T* grad_value = buffer(out.value.data, args.keys, args.channels);
    // (group, keys): dS summed over the queries
    T* sum = out.needs_sum() ? device.template allocate<T>(chunks.group * args.keys) : nullptr;
    const Rows<const T> stats{static_cast<const T*>(args.stats), 2 * args.queries};
    const Rows<const T> delta{static_cast<const T*>(args.delta), args.queries};
    const T magnitude = args.magnitude<T>();

    chunks.for_each(args.batches, args.queries, [&](int64_t b, int64_t group, int64_t first, int64_t rows) {
      const bool last = first + rows == args.queries, later = first > 0;
      const int64_t lines = pitch_of(rows);
      const MapRows map_rows{rows, args.keys, lines, keys};
      const auto q = in.query.from(b, first), k = in.key.from(b, 0), dy = grad_output.from(b, first);
      const Matrix<T> s = dense(logits, group, lines, keys), ds = dense(grad, group, lines, keys);
      device.product(q, k.transposed(), s, group, lines, keys, width);
      if (need_grad) device.product(dy, in.value.from(b, 0).transposed(), ds, group, lines, keys, channels);
      if (args.part) {
        const PartRowStep<T> step{map_rows, logits,   grad, stats.from(b, 2 * first), delta.from(b, first),
                                  in.sign,  magnitude};
        device.launch(&pairwise_part_row_backward_kernel<T>, group * lines, step, group * lines);
      } else {
        pairwise_row_backward(device, SoftmaxRowStep<T>{map_rows, logits, grad, in.bias.from(b, 0), in.sign, magnitude},
                              group);
      }

      if (out.value.data) {
        const auto dv = like_order(out.value, grad_value, group, args.keys, args.channels);
        device.product(s.read().transposed(), dy, dv, group, keys, channels, lines, later);
        if (last) out.write_value(dv, b, group, 0, args.keys, 1);
      }
      if (out.key.data) {
        if (out.needs_sum())
          column_sums<T>(device, ds.read(), group, rows, args.keys, {}, 1.0, sum,
                         later ? ColumnSum::added : ColumnSum::plain);
        const auto dk = like_order(out.key, grad_key, group, args.keys, args.width);
        device.product(ds.read().transposed(), q, dk, group, keys, width, lines, later);
        if (last) out.write_key(dk, sum, b, group, 0, args.keys, nullptr);
      }
      if (out.query.data) {
        const auto dq = like_order(out.query, grad_query, group, args.queries, args.width);
        device.product(ds.read(), k, dq.from(0, first), group, lines, width, keys);
        if (last) out.write_query(dq, b, group, nullptr);
      }
    });
  }
};

}  // namespace dnl
