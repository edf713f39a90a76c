// Delta_i = <dy_i, y_i - pooled>, which the backward subtracts from dO V^T.
//
// To y its rounding error is added, where the forward saved that as the residual. Where values are centred, their mean
// is subtracted from y: dO V^T has lost it too, and the difference of the two does not cancel.
#pragma once

#include "core/cpu/reduce.h"
#include "ops/pairwise/pairwise.h"

namespace dnl {
namespace DNL_ISA {

// The part of y that does not come from P times the centred values, for one batch element. value_mean is null, or its.
template <class Src>
void delta_offset(const PairwiseArgs& args, int64_t batch, const Acc<Src>* value_mean, double* offset) {
  const auto* pooled = static_cast<const Acc<Src>*>(args.pooled);
  for (int64_t ch = 0; ch < args.channels; ++ch)
    offset[ch] = (pooled ? double(pooled[batch * args.channels + ch]) : 0) + (value_mean ? double(value_mean[ch]) : 0);
}

// Delta of `count` queries of one batch element from `first` on.
template <class Src>
void compute_delta(const PairwiseArgs& args, const double* offset, int64_t batch, int64_t first, int64_t count,
                   Acc<Src>* out) {
  const Src *dy = element<Src>(args.grad_output, batch), *y = element<Src>(args.output, batch);
  const View &dv = args.grad_output, &yv = args.output, &rv = args.residual;
  const Src* rest = rv.data ? element<Src>(rv, batch) : nullptr;
  for (int64_t begin = first; begin < first + count; begin += kReduceBlock) {
    const int64_t end = std::min(first + count, begin + kReduceBlock);
    double sums[kReduceBlock];
    const auto sum = [&](auto order) {
      using Order = decltype(order);
      const auto of_value = [&](const auto& value) {
        row_sums_of<Order, Src>(begin, end, args.channels, sums, [&](int64_t i, int64_t ch) {
          return double(widen(dy[Order::at(dv, i, ch)])) * (value(i, ch) - offset[ch]);
        });
      };
      const auto rounded = [&](int64_t i, int64_t ch) { return double(widen(y[Order::at(yv, i, ch)])); };
      if (rest)
        of_value([&](int64_t i, int64_t ch) { return rounded(i, ch) + double(widen(rest[Order::at(rv, i, ch)])); });
      else
        of_value(rounded);
    };
    rest ? dispatch_order(sum, yv, dv, rv) : dispatch_order(sum, yv, dv);
    for (int64_t i = begin; i < end; ++i) out[i - first] = static_cast<Acc<Src>>(sums[i - begin]);
  }
}

}  // namespace DNL_ISA
}  // namespace dnl
