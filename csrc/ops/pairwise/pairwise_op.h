// Checked calls of pairwise attention, shared by the CPU and CUDA routes.
#pragma once

#include <cmath>

#include "core/operator.h"
#include "ops/pairwise/pairwise.h"
#include "ops/unary/unary_op.h"

namespace dnl {

// Whether the name asks for centring; unknown names raise. The valid names stand in dnl_ext/reference.py too.
inline bool parse_whiten(const std::optional<std::string>& whiten) {
  if (!whiten) return false;
  if (*whiten == "channel") return true;
  throw ValueError(message("whiten: expected one of 'channel', None, got '", *whiten, "'"));
}

inline void check_query_key(const Tensor& query, const Tensor& key) {
  check_float("query", query);
  check_dims("query", query, 2, "(..., Nq, Dqk)");
  check_alike("key", key, "query", query);
  check_dims("key", key, 2, "(..., Nk, Dqk)");
  check_sizes("key", key, leading(query, 2) + std::initializer_list<int64_t>{key.size(-2), query.size(-1)});
  if (query.size(-1) == 0)
    throw ValueError(message("query: expected at least one channel, got shape ", to_string(sizes_of(query))));
  if (key.size(-2) == 0)
    throw ValueError(message("key: expected at least one key, got shape ", to_string(sizes_of(key))));
}

inline void check_pairwise(const Tensor& query, const Tensor& key, const Tensor& value,
                           const std::optional<Tensor>& mask_logits, double scale) {
  check_query_key(query, key);
  check_alike("value", value, "query", query);
  check_dims("value", value, 2, "(..., Nk, Dv)");
  check_sizes("value", value, leading(query, 2) + std::initializer_list<int64_t>{key.size(-2), value.size(-1)});
  if (mask_logits) {
    check_alike("mask_logits", *mask_logits, "query", query);
    check_sizes("mask_logits", *mask_logits, leading(key, 1));
  }
  if (!std::isfinite(scale)) throw ValueError(message("scale: expected a finite number, got ", scale));
}

// An absent result: no elements, but the leading dimensions, so that vmap can map it like the others.
inline Tensor absent(const Tensor& like, ScalarType type) {
  return empty(like, leading(like, 2) + std::initializer_list<int64_t>{0}, type);
}

struct PairwiseCall {
  using PartForward = std::tuple<Tensor, Tensor, Tensor>;
  using PartBackward = std::tuple<Tensor, Tensor, Tensor>;

  Tensor output, stats, residual, pooled, mask_lse;
  Tensor grad_query, grad_key, grad_value, grad_mask;
  PairwiseArgs args{};

  // Forward. With mask logits, the caller computes `pooled` and `mask_lse` by the unary operator and sets them.
  PairwiseCall(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask_logits,
               double scale, const std::optional<std::string>& whiten, bool save_residual)
      : output(query),
        stats(query),
        residual(query),
        pooled(query),
        mask_lse(query),
        grad_query(query),
        grad_key(query),
        grad_value(query),
        grad_mask(query) {
    args.whiten = parse_whiten(whiten);
    check_pairwise(query, key, value, mask_logits, scale);
    output = empty_like_layout(query, leading(query, 1) + std::initializer_list<int64_t>{value.size(-1)});
    stats = dnl::empty(query, leading(query, 1) + std::initializer_list<int64_t>{2}, accumulate_type(query));
    residual = save_residual && query.element_size() == 2 ? empty_like_layout(query, sizes_of(output))
                                                          : absent(query, type_of(query));
    if (!mask_logits) {
      pooled = absent(query, accumulate_type(query));
      mask_lse = absent(query, accumulate_type(query));
    }
    set(query, key, value, scale);
  }

  void set_unary(const Tensor& pooled_values, const Tensor& lse_of_mask) {
    pooled = pooled_values;
    mask_lse = lse_of_mask;
    args.pooled = pooled.data_ptr();
    args.mask_lse = mask_lse.data_ptr();
  }

  // Backward: output, stats, residual, pooled and mask_lse are what the forward returned.
  PairwiseCall(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
               const std::optional<Tensor>& mask_logits, const Tensor& forward_output, const Tensor& forward_stats,
               const Tensor& forward_residual, const Tensor& forward_pooled, const Tensor& forward_mask_lse,
               double scale, const std::optional<std::string>& whiten, bool need_query, bool need_key, bool need_value,
               bool need_mask)
      : output(forward_output),
        stats(forward_stats),
        residual(forward_residual),
        pooled(forward_pooled),
        mask_lse(forward_mask_lse),
        grad_query(query),
        grad_key(key),
        grad_value(value),
        grad_mask(value) {
    args.whiten = parse_whiten(whiten);
    check_pairwise(query, key, value, mask_logits, scale);
    const Sizes lead = leading(query, 2);
    const Sizes out_sizes = leading(query, 1) + std::initializer_list<int64_t>{value.size(-1)};
    check_alike("grad_output", grad_output, "query", query);
    check_sizes("grad_output", grad_output, out_sizes);
    check_alike("output", output, "query", query);
    check_sizes("output", output, out_sizes);
    check_saved("softmax_stats", stats, "query", query, leading(query, 1) + std::initializer_list<int64_t>{2});
    stats = made_contiguous(stats);
    check_alike("residual", residual, "query", query);
    check_dims("residual", residual, 1, "(..., Nq, Dv)");
    check_sizes("residual", residual, residual.size(-1) ? out_sizes : lead + std::initializer_list<int64_t>{0});
    if (mask_logits) {
      check_saved("pooled", pooled, "query", query, lead + std::initializer_list<int64_t>{value.size(-1)});
      check_saved("mask_lse", mask_lse, "query", query, lead);
      pooled = made_contiguous(pooled);
      mask_lse = made_contiguous(mask_lse);
    }
    grad_query = need_query ? empty_like_layout(query, sizes_of(query)) : absent(query, type_of(query));
    grad_key = need_key ? empty_like_layout(key, sizes_of(key)) : absent(query, type_of(query));
    grad_value = need_value ? empty_like_layout(value, sizes_of(value)) : absent(query, type_of(query));
    need_mask = need_mask && mask_logits.has_value();
    grad_mask = need_mask ? empty_like_layout(*mask_logits, sizes_of(*mask_logits)) : absent(query, type_of(query));
    set(query, key, value, scale);
    grad_output_.set(grad_output);
    args.grad_output = grad_output_.view;
    if (mask_logits) {
      mask_.set(*mask_logits, 1);
      args.mask = mask_.view;
      args.pooled = pooled.data_ptr();
      args.mask_lse = mask_lse.data_ptr();
    }
    if (need_query) args.grad_query = view(grad_query_, grad_query, 2);
    if (need_key) args.grad_key = view(grad_key_, grad_key, 2);
    if (need_value) args.grad_value = view(grad_value_, grad_value, 2);
    if (need_mask) args.grad_mask = view(grad_mask_, grad_mask, 1);
  }

  // Forward where the keys are a part of those of a row (pairwise.h).
  PairwiseCall(const Tensor& query, const Tensor& key, const Tensor& value, double scale, bool save_residual)
      : PairwiseCall(query, key, value, std::nullopt, scale, std::nullopt, save_residual) {
    args.part = true;
  }

  // Backward of a part. The output is not read: what stands in its place has its type and shape.
  PairwiseCall(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
               const Tensor& row_stats, const Tensor& delta, double scale, bool need_query, bool need_key,
               bool need_value)
      : PairwiseCall(grad_output, query, key, value, std::nullopt, grad_output, row_stats,
                     absent(query, type_of(query)), row_stats, row_stats, scale, std::nullopt, need_query, need_key,
                     need_value, false) {
    check_saved("delta", delta, "query", query, leading(query, 1));
    delta_ = made_contiguous(delta);
    args.part = true;
    args.delta = delta_.data_ptr();
  }

  // Nothing to compute.
  bool empty() const { return args.batches == 0 || args.queries == 0; }

  // The backward where there is nothing to compute: without queries, zeros for what they would have added to.
  void clear_gradients() {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_mask}) torch::stable::zero_(*grad);
  }

 private:
  static View view(Operand& operand, const Tensor& x, int64_t trailing) {
    operand.set(x, trailing);
    return operand.view;
  }

  void set(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
    args.query = view(query_, query, 2);
    args.key = view(key_, key, 2);
    args.value = view(value_, value, 2);
    args.output = view(output_, output, 2);
    args.stats = stats.data_ptr();
    if (residual.numel() != 0) args.residual = view(residual_, residual, 2);
    args.dtype = query_.dtype;
    args.batches = static_cast<int64_t>(query_.offsets.size());
    args.queries = query.size(-2);
    args.keys = key.size(-2);
    args.width = query.size(-1);
    args.channels = value.size(-1);
    // One query less its mean is zero, and so are its logits; halves, multiplied before they are centred, would leave
    // the rounding of raw logits.
    args.scale = args.whiten && args.queries == 1 ? 0 : scale;
  }

  Tensor delta_ = stats;
  Operand query_, key_, value_, output_, residual_, grad_output_, mask_, grad_query_, grad_key_, grad_value_,
      grad_mask_;
};

}  // namespace dnl
