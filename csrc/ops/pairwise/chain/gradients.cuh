// What both schedules of the pairwise backward on CUDA share: the unary term, and how sums become gradients.
//
//   dv = alpha sum_i P_ij dy_i + u_j G
//   dk = scale (sum_i dS_ij q_i + mean_term (sum_i dS_ij) mu_q)      where the query mean enters apart
//   dq = scale (sum_j dS_ij k'_j - its mean over queries)            the mean with whitening only
//
// The sums come from library products, in the accumulate type; each gradient is one write in the layout of its input.
#pragma once

#include "ops/pairwise/chain/operands.cuh"

namespace dnl {

// G = sum_i dy_i (batches, channels) and u (batches, keys) of the unary term, and dm, which need no map. Absent without
// mask logits.
template <class T>
struct UnaryTerm {
  using A = AccOf<T>;
  A* grad_pooled = nullptr;
  Rows<A> map;

  template <class Device>
  UnaryTerm(const PairwiseArgs& args, Device& device) {
    if (!args.mask.data) return;
    grad_pooled = device.template allocate<A>(args.batches * args.channels);
    column_sums<T>(device, matrix_of<const T>("grad_output", args.grad_output, args.batches), args.batches,
                   args.queries, args.channels, {}, 1.0, grad_pooled);
    map = unary_map<T>(device, args.mask, args.batches, args.keys, nullptr);
    if (args.grad_mask.data)
      unary_mask_gradient<T>(device, matrix_of<const T>("value", args.value, args.batches), map.read(), grad_pooled,
                             static_cast<const A*>(args.pooled), args.grad_mask, args.batches, args.keys,
                             args.channels);
  }
};

// The wanted gradients of query, key and value; data = nullptr where one is not wanted. Each function writes `rows`
// positions from `first` on of `group` batch elements from b on, out of sums that lie as like_order() lays them.
template <class T, class Device>
struct PairwiseGradients {
  using A = AccOf<T>;
  const PairwiseArgs& args;
  Device& device;
  const PairwiseOperands<T, Device>& in;
  const UnaryTerm<T>& unary;
  Matrix<T> query, key, value;

  PairwiseGradients(const PairwiseArgs& a, Device& d, const PairwiseOperands<T, Device>& operands,
                    const UnaryTerm<T>& term)
      : args(a),
        device(d),
        in(operands),
        unary(term),
        query(matrix_of<T>("query", a.grad_query, a.batches)),
        key(matrix_of<T>("key", a.grad_key, a.batches)),
        value(matrix_of<T>("value", a.grad_value, a.batches)) {}

  // Whether dk needs the sum of dS over the queries.
  bool needs_sum() const { return key.data && in.mean_term; }

  // sums: (group, rows, channels)
  void write_value(const Matrix<A>& sums, int64_t b, int64_t group, int64_t first, int64_t rows, A alpha) const {
    Affine<A, T> write{sums.read(), value.from(b, first), group, rows, args.channels};
    write.alpha = alpha;
    write.beta_row = unary.map.from(b, first).read();
    write.gamma = unary.grad_pooled ? unary.grad_pooled + b * args.channels : nullptr;
    affine(device, write);
  }

  // sums: (group, rows, width); sum: (group, rows), of dS over the queries, where needs_sum(); factor: (group) or null
  void write_key(const Matrix<A>& sums, const A* sum, int64_t b, int64_t group, int64_t first, int64_t rows,
                 const A* factor) const {
    Affine<A, T> write{sums.read(), key.from(b, first), group, rows, args.width};
    if (needs_sum()) {
      write.beta = in.mean_term;
      write.beta_row = {sum, rows};
      write.gamma = in.query_mean + b * args.width;
    }
    write.scale = static_cast<A>(args.gradient_scale());
    write.factor = factor;
    affine(device, write);
  }

  // sums: (group, queries, width); factor: (group) or null
  void write_query(const Matrix<A>& sums, int64_t b, int64_t group, const A* factor) const {
    Affine<A, T> write{sums.read(), query.from(b, 0), group, args.queries, args.width};
    if (args.whiten) {
      A* mean = device.template allocate<A>(group * args.width);
      column_sums<A>(device, sums.read(), group, args.queries, args.width, {}, 1.0 / args.queries, mean);
      write.beta = -1;
      write.gamma = mean;
    }
    write.scale = static_cast<A>(args.gradient_scale());
    write.factor = factor;
    affine(device, write);
  }
};

}  // namespace dnl
