// Whitened pairwise attention with an optional unary term.
//
//   forward   S_ij = scale <q_i - mu_q, k_j - mu_k>,  P = softmax_j(S),  y_i = sum_j P_ij v_j + pooled
//   backward  Delta_i = <dy_i, y_i - pooled>,  dS_ij = P_ij (<dy_i, v_j> - Delta_i)
//             dq_i = scale sum_j dS_ij k'_j, less its mean over i;  dk_j = scale sum_i dS_ij q'_i
//             dv_j = sum_i P_ij dy_i + u_j G,  G = sum_i dy_i
//
// q' and k' are the centred query and key. Rows of dS sum to zero, so dk needs no mean removed and sums to zero itself.
//
// With scale = sign |scale| and t_ij = sign <q'_i, k'_j>, the forward keeps shift_i = max_j t_ij and factor_i, one over
// the sum, and the backward makes P again: P_ij = exp(|scale| (t_ij - shift_i)) factor_i. The difference comes first,
// the scale after it: the exponent of the largest logit is then exactly 0, where the difference of two scaled logits
// would be off by their rounding, which is more than an exponential bears once logits are large.
//
// A 16-bit output has lost what Delta needs when values share a large mean; `residual` keeps it for the backward.
// `pooled` = sum_j u_j v_j and u = softmax(m) come from ops/unary; without mask logits they are absent.
//
// A *part* has some of the keys that a row of P sums over (dnl_ext/distributed): the forward gives the softmax over
// these alone, with its statistics; the backward takes the statistics of whole rows and their Delta. Sums over a part
// of a row of dS are not zero, so centring keys or values by means of their own would be wrong: a part is used as it
// comes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/types.h"

namespace dnl {

// Accumulated quantities (stats, pooled, mask_lse) are float, or double where dtype is f64, and dense.
struct PairwiseArgs {
  View query;                    // (batches, queries, width)
  View key;                      // (batches, keys, width)
  View value;                    // (batches, keys, channels)
  View output;                   // (batches, queries, channels)
  void* stats;                   // (batches, queries, 2): shift and factor of a row of P
  View residual;                 // (batches, queries, channels): what rounding took from output, or data = nullptr
  const void* pooled = nullptr;  // (batches, channels), or nullptr
  DType dtype;
  int64_t batches, queries, keys, width, channels;
  double scale;
  bool whiten;
  bool part = false;  // the keys are some of those of a row; whiten is false

  // Backward only. A gradient with data = nullptr is not wanted.
  View grad_output;                // (batches, queries, channels)
  View mask;                       // (batches, keys), data = nullptr without the unary term
  const void* mask_lse = nullptr;  // (batches)
  const void* delta = nullptr;     // (batches, queries), of a part: <dy_i, y_i> with whole rows
  View grad_query, grad_key, grad_value, grad_mask;

  double sign() const { return scale > 0 ? 1 : scale < 0 ? -1 : 0; }
  // What differences of t are multiplied by to be exponents of e, or of 2 with per_logit = log2(e). Where the scale is
  // 0 t is too, and a factor of 0 would make NaN of -inf. Inlined: what was compiled for one instruction set must not
  // be linked to the kernels of another.
  template <class A>
  [[gnu::always_inline]] A magnitude(double per_logit = 1) const {
    using Limits = std::numeric_limits<A>;
    if (scale == 0) return 1;
    return static_cast<A>(std::clamp(std::abs(scale) * per_logit, double(Limits::min()), double(Limits::max())));
  }

  // Of dq and dk. A softmax over one key is 1 whatever its logit: times 0, the rounding of its dS is gone and NaN
  // stays.
  double gradient_scale() const { return keys == 1 && !part ? 0 : scale; }
};

}  // namespace dnl
