// Backward of whitened pairwise attention on CUDA for halves, in chunks of keys (the map lies transposed, a row per
// key); float and double go by rows of the map (chain/backward_rows.cuh):
//
//   S' = K Q^T, dP' = V dO^T         library products, float out    (keys x queries)
//   P' = 2^(log2(e) (scale S' + bias_j) - shift_i) factor_i       our kernel, a block per key, in 16 bits
//   dS' = P' (dP' - Delta_i), and its sum over the queries;  Delta_i = <dO_i, y_i - offset>
//   dv = P' dO + u G                 library product, then our write with the unary term
//   dk = scale (dS' Q + mean_term (sum_i dS'_ji) mu_q)      where the query mean enters apart (chain/operands.cuh)
//   dQ += dS K'                      library product that adds to its result
//   dq = scale (dQ - its mean over queries)       once all keys have passed
//
// The first three lines are one kernel on the fused path (fused/backward_map.cuh) and on Hopper's
// (hopper/backward_map.cuh), which writes only P' and dS'. Its map has no zeros beyond the last key, so that its
// products are of exact extents.
//
// The sum over queries uses dS as rounded, which is what makes the correction exact. Only dQ (queries x width) is held
// in float over the whole call.
//
// float16 alone has a range to fear. P' is stored times 2^12, and dS' times a power of two that a bound on
// |dO_i| |v_j| gives per batch element; both are divided out in float. For bfloat16 these factors are 1.
#pragma once

#include "ops/pairwise/chain/backward_rows.cuh"
#include "ops/pairwise/fused/backward_map.cuh"
#include "ops/pairwise/hopper/hopper.h"

namespace dnl {

// scale[b] = the power of two that brings 2 max_i |dO_i| max_j |v_j| just under kGradientBound, 1 where that is 0 or
// not finite; inverse[b] = 1 / scale[b]. One block per batch element.
template <class A>
__global__ void __launch_bounds__(kThreads)
    gradient_scale_kernel(Rows<const A> grad_square,   // (batches, queries): |dO_i|^2
                          Rows<const A> value_square,  // (batches, keys): |v_j|^2
                          A* scale,                    // (batches)
                          A* inverse,                  // (batches)
                          int64_t queries, int64_t keys, int64_t batches) {
  __shared__ A most[kWarps][2];
  for (int64_t b = blockIdx.x; b < batches; b += gridDim.x) {
    A g = 0, v = 0;
    for (int64_t i = threadIdx.x; i < queries; i += kThreads) g = fmax(g, grad_square.element(b)[i]);
    for (int64_t j = threadIdx.x; j < keys; j += kThreads) v = fmax(v, value_square.element(b)[j]);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      g = fmax(g, __shfl_xor_sync(kAllLanes, g, step));
      v = fmax(v, __shfl_xor_sync(kAllLanes, v, step));
    }
    if (threadIdx.x % kWarp == 0) {
      most[threadIdx.x / kWarp][0] = g;
      most[threadIdx.x / kWarp][1] = v;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) {
        g = fmax(g, most[w][0]);
        v = fmax(v, most[w][1]);
      }
      const A bound = 2 * sqrt(g) * sqrt(v);
      const bool usable = bound > 0 && bound < std::numeric_limits<A>::infinity();
      const A exponent = usable ? floor(log2(A(kGradientBound) / bound)) : A(0);
      scale[b] = exp2(exponent);
      inverse[b] = exp2(-exponent);
    }
    __syncthreads();  // before the next element overwrites `most`
  }
}

// What the step takes of each query: Delta_i = <dy_i, y_i - offset>, where y is what was returned plus what rounding
// took from it, and its saved statistics in rows of their own.
template <class T>
struct DeltaOp {
  using A = AccOf<T>;
  using Sum = double;
  Matrix<const T> grad, output;  // (batches, positions, channels)
  Matrix<const T> residual;      // the same shape, or data = nullptr
  const A* offset;               // (batches, channels), or nullptr
  const A* stats;                // (batches, positions, 2)
  int64_t batches, positions, channels;
  Rows<A> out, shift, row_factor;  // (batches, positions)

  struct Term {
    const DeltaOp& op;
    const T *grad, *output, *residual;
    const A* offset;

    DNL_HOST_DEVICE double operator()(int64_t i, int64_t c) const {
      double y = wide(output[i * op.output.position + c * op.output.channel]);
      if (residual) y += wide(residual[i * op.residual.position + c * op.residual.channel]);
      if (offset) y -= offset[c];
      return double(wide(grad[i * op.grad.position + c * op.grad.channel])) * y;
    }
  };
  DNL_HOST_DEVICE Term at(int64_t b) const {
    return {*this, grad.element(b), output.element(b), residual.data ? residual.element(b) : nullptr,
            offset ? offset + b * channels : nullptr};
  }
  DNL_HOST_DEVICE void store(int64_t b, int64_t i, double sum) const {
    const A* saved = stats + 2 * (b * positions + i);
    out.element(b)[i] = static_cast<A>(sum);
    shift.element(b)[i] = saved[0];
    row_factor.element(b)[i] = saved[1];
  }
};

// |x_i|^2
template <class T>
struct SquareOp {
  using A = AccOf<T>;
  using Sum = A;
  Matrix<const T> x;  // (batches, positions, channels)
  int64_t batches, positions, channels;
  Rows<A> out;  // (batches, positions)

  struct Term {
    const T* x;
    int64_t position, channel;

    DNL_HOST_DEVICE A operator()(int64_t i, int64_t c) const {
      const A value = wide(x[i * position + c * channel]);
      return value * value;
    }
  };
  DNL_HOST_DEVICE Term at(int64_t b) const { return {x.element(b), x.position, x.channel}; }
  DNL_HOST_DEVICE void store(int64_t b, int64_t i, A sum) const { out.element(b)[i] = sum; }
};

// What makes the map of a chunk: library products with a kernel after them, or one kernel.
struct BackwardMap {
  enum { products, fused, hopper } by = products;
  int multiprocessors = 0;  // of the GPU, for Hopper's

  bool one_kernel() const { return by != products; }
};

template <class T, class Device>
struct PairwiseBackwardChain {
  static_assert(kHalf<T>, "float and double need P normalised anew");
  using A = AccOf<T>;
  const PairwiseArgs& args;
  Device& device;
  const PairwiseOperands<T, Device> in;
  const PairwiseGradients<T, Device> out;
  const bool need_logits;  // any gradient that goes through dS
  const BackwardMap map_by;
  Matrix<const T> grad_output, centred_key;
  MapOperands<T> mapped;  // what the fused map multiplies
  Rows<A> shift, row_factor, delta;
  A *grad_scale = nullptr, *grad_inverse = nullptr;

  PairwiseBackwardChain(const PairwiseArgs& a, Device& d, const UnaryTerm<T>& u, const BackwardMap& map)
      : args(a), device(d), in(a, d), out(a, d, in, u), need_logits(out.query.data || out.key.data), map_by(map) {}

  void run(const ChunkLimits& limits) {
    const auto grad = matrix_of<const T>("grad_output", args.grad_output, args.batches);
    grad_output = product_operand<T>(device, grad, args.batches, args.queries, args.channels, nullptr);
    row_statistics(grad);
    if (out.query.data)
      centred_key = product_operand<T>(device, matrix_of<const T>("key", args.key, args.batches), args.batches,
                                       args.keys, args.width, in.key_mean);
    if (map_by.by == BackwardMap::fused) {
      mapped = {in.key, in.query, in.value, grad_output};
      mapped.in_one_order(device, args);
    }
    run_chunks(limits);
  }

 private:
  // Shifts, factors and Delta in rows of whole quads; the gradient's power of two.
  void row_statistics(const Matrix<const T>& grad) {
    const int64_t pitch = pitch_of(args.queries);
    const A *stats = static_cast<const A*>(args.stats), *given = static_cast<const A*>(args.delta);
    const auto rows = [&] { return Rows<A>{device.template allocate<A>(args.batches * pitch), pitch}; };
    const auto copy = [&](const A* from, int64_t step, const Rows<A>& to) {
      affine(device, Affine<A, A>{{from, single_batch(args.batches, step * args.queries), step, 1},
                                  {to.data, single_batch(args.batches, pitch), 1, 1},
                                  args.batches,
                                  args.queries,
                                  1});
    };
    shift = rows(), row_factor = rows();
    if (need_logits) {
      delta = rows();
      if constexpr (kScaledGradient<T>) gradient_scale(grad);
    }
    if (need_logits && !given) {
      const DeltaOp<T> op{grad,
                          matrix_of<const T>("output", args.output, args.batches),
                          matrix_of<const T>("residual", args.residual, args.batches),
                          in.offset,
                          stats,
                          args.batches,
                          args.queries,
                          args.channels,
                          delta,
                          shift,
                          row_factor};
      row_sums(device, op, position_is_fast(grad, args.queries, args.channels));
      return;
    }
    copy(stats, 2, shift), copy(stats + 1, 2, row_factor);
    if (need_logits) copy(given, 1, delta);
  }

  void gradient_scale(const Matrix<const T>& grad) {
    Rows<A> grad_square{device.template allocate<A>(args.batches * args.queries), args.queries};
    Rows<A> value_square{device.template allocate<A>(args.batches * args.keys), args.keys};
    grad_scale = device.template allocate<A>(args.batches);
    grad_inverse = device.template allocate<A>(args.batches);
    row_sums(device, SquareOp<T>{grad, args.batches, args.queries, args.channels, grad_square},
             position_is_fast(grad, args.queries, args.channels));
    const auto value = matrix_of<const T>("value", args.value, args.batches);
    row_sums(device, SquareOp<T>{value, args.batches, args.keys, args.channels, value_square},
             position_is_fast(value, args.keys, args.channels));
    device.launch(&gradient_scale_kernel<A>, args.batches, grad_square.read(), value_square.read(), grad_scale,
                  grad_inverse, args.queries, args.keys, args.batches);
  }

  void run_chunks(const ChunkLimits& limits) {
    // The narrowest product of as many rows as a chunk: dk, dv, or S'.
    const int64_t narrowest = std::min(
        {out.key.data ? args.width : args.queries, out.value.data ? args.channels : args.queries, args.queries});
    const Chunks chunks(args.batches, args.keys, args.queries, sizeof(A),
                        rows_of_waves(narrowest, device.gpu().multiprocessors), limits);
    const auto extent = [&](int64_t n) { return map_by.one_kernel() ? n : pitch_of(n); };
    const int64_t pitch = pitch_of(args.queries), map = chunks.group * chunks.buffer_rows() * pitch;
    const int64_t queries = extent(args.queries), width = extent(args.width), channels = extent(args.channels);

    const bool one_kernel = map_by.one_kernel();
    A *logits = nullptr, *grad = nullptr;
    T *probability = nullptr, *grad_logits = nullptr;
    if (one_kernel) {
      if (out.value.data) probability = device.template allocate<T>(map);
      if (need_logits) grad_logits = device.template allocate<T>(map);
    } else {
      logits = device.template allocate<A>(map);
      if (need_logits) grad = device.template allocate<A>(map);
      if (out.value.data) probability = reinterpret_cast<T*>(logits);
      grad_logits = reinterpret_cast<T*>(grad);
    }
    const int64_t widest = std::max(out.key.data ? args.width : 0, out.value.data ? args.channels : 0);
    A* sums = device.template allocate<A>(like_order_size(chunks.group, chunks.rows, widest));
    A* row_sum = out.needs_sum() ? device.template allocate<A>(chunks.group * chunks.rows) : nullptr;
    A* row_part = row_sum && one_kernel
                      ? device.template allocate<A>(chunks.group * chunks.rows * ceil_div_of(args.queries, kMapTile))
                      : nullptr;
    A* grad_query =
        out.query.data ? device.template allocate<A>(like_order_size(chunks.group, args.queries, args.width)) : nullptr;

    chunks.for_each(args.batches, args.keys, [&](int64_t b, int64_t group, int64_t first, int64_t rows) {
      const A* inverse = grad_inverse ? grad_inverse + b : nullptr;
      const auto query = in.query.from(b, 0), dy = grad_output.from(b, 0);
      const int64_t lines = extent(rows);
      const SoftmaxBackwardStep<T> step{logits,
                                        grad,
                                        probability,
                                        grad_logits,
                                        row_sum,
                                        in.bias.from(b, first),
                                        shift.from(b, 0).read(),
                                        row_factor.from(b, 0).read(),
                                        delta.from(b, 0).read(),
                                        grad_scale ? grad_scale + b : nullptr,
                                        rows,
                                        args.queries,
                                        pitch,
                                        in.sign,
                                        args.magnitude<A>(kLog2OfE),
                                        lines};
      const auto key = in.key.from(b, first), value = in.value.from(b, first);
      Matrix<const T> p, ds;
      if (map_by.one_kernel()) {
        if (map_by.by == BackwardMap::hopper)
          hopper_backward_map<T>(device, step, key, query, value, dy, row_part, group, args.width, args.channels,
                                 map_by.multiprocessors);
        else
          fused_backward_map(device, step,
                             {mapped.key.from(b, first), mapped.query.from(b, 0), mapped.value.from(b, first),
                              mapped.grad.from(b, 0), mapped.channel_first},
                             args.width, args.channels, row_part, group);
        p = dense(static_cast<const T*>(probability), group, rows, pitch);
        ds = dense(static_cast<const T*>(grad_logits), group, rows, pitch);
      } else {
        const Matrix<A> s = dense(logits, group, lines, pitch), dp = dense(grad, group, lines, pitch);
        device.product(key, query.transposed(), s, group, lines, queries, width);
        if (need_logits) device.product(value, dy.transposed(), dp, group, lines, queries, channels);
        device.launch(&pairwise_softmax_backward_kernel<T>, group * lines, step, group * lines);
        p = in_place_of<T>(s);
        ds = in_place_of<T>(dp);
      }

      if (out.value.data) {
        const auto dv = like_order(out.value.from(b, first), sums, group, rows, args.channels);
        device.product(p, dy, dv, group, lines, channels, queries);
        out.write_value(dv, b, group, first, rows, A(1) / (1 << kProbabilityExponent<T>));
      }
      if (out.key.data) {
        const auto dk = like_order(out.key.from(b, first), sums, group, rows, args.width);
        device.product(ds, query, dk, group, lines, width, queries);
        out.write_key(dk, row_sum, b, group, first, rows, inverse);
      }
      if (out.query.data) {
        const auto dq = like_order(out.query, grad_query, group, args.queries, args.width);
        device.product(ds.transposed(), centred_key.from(b, first), dq, group, queries, width, lines, first > 0);
        if (first + rows == args.keys) out.write_query(dq, b, group, inverse);
      }
    });
  }
};

template <class T, class Device>
void pairwise_backward_cuda(const PairwiseArgs& args, Device& device, const ChunkLimits& limits = {},
                            const BackwardMap& map = {}) {
  const UnaryTerm<T> unary(args, device);
  if (!args.grad_query.data && !args.grad_key.data && !args.grad_value.data) return;
  if constexpr (kHalf<T>)
    PairwiseBackwardChain<T, Device>(args, device, unary, map).run(limits);
  else
    PairwiseBackwardRows<T, Device>(args, device, unary).run(limits);
}

}  // namespace dnl
