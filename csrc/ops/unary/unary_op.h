// Checked calls of softmax and of unary pooling, shared by the CPU and CUDA routes.
#pragma once

#include "core/operator.h"
#include "ops/unary/unary.h"

namespace dnl {

// softmax over the last dimension, or its backward when `probability` is given.
struct SoftmaxCall {
  Tensor output;
  SoftmaxArgs args{};

  SoftmaxCall(const char* name, const Tensor& x, const Tensor* probability = nullptr) : output(x) {
    check_float(name, x);
    check_dims(name, x, 1, "(..., N)");
    if (x.size(-1) == 0)
      throw ValueError(message(name, ": expected at least one column, got shape ", to_string(sizes_of(x))));
    if (probability) {
      check_alike("output", *probability, name, x);
      check_sizes("output", *probability, sizes_of(x));
    }
    output = empty_like_layout(probability ? *probability : x, sizes_of(x));
    input_.set(x, 1);
    output_.set(output, 1);
    args.input = input_.view;
    args.output = output_.view;
    if (probability) {
      probability_.set(*probability, 1);
      args.probability = probability_.view;
    }
    args.dtype = input_.dtype;
    args.rows = product_of(sizes_of(x), 0, x.dim() - 1);
    args.columns = x.size(-1);
  }

  bool empty() const { return args.rows == 0; }

 private:
  Operand input_, output_, probability_;
};

inline void check_unary(const Tensor& mask_logits, const Tensor& value) {
  check_float("value", value);
  check_dims("value", value, 2, "(..., Nk, Dv)");
  check_alike("mask_logits", mask_logits, "value", value);
  check_sizes("mask_logits", mask_logits, leading(value, 1));
  if (value.size(-2) == 0)
    throw ValueError(message("value: expected at least one key, got shape ", to_string(sizes_of(value))));
}

struct UnaryCall {
  Tensor pooled, lse, grad_mask, grad_value;
  UnaryArgs args{};

  // Forward.
  UnaryCall(const Tensor& mask_logits, const Tensor& value)
      : pooled(value), lse(value), grad_mask(value), grad_value(value) {
    check_unary(mask_logits, value);
    pooled =
        dnl::empty(value, leading(value, 2) + std::initializer_list<int64_t>{value.size(-1)}, accumulate_type(value));
    lse = dnl::empty(value, leading(value, 2), accumulate_type(value));
    set(mask_logits, value);
  }

  // Backward: `forward_pooled` and `forward_lse` are what the forward returned.
  UnaryCall(const Tensor& grad_pooled, const Tensor& mask_logits, const Tensor& value, const Tensor& forward_pooled,
            const Tensor& forward_lse, bool need_mask, bool need_value)
      : pooled(forward_pooled), lse(forward_lse), grad_mask(value), grad_value(value) {
    check_unary(mask_logits, value);
    const Sizes lead = leading(value, 2), pooled_sizes = lead + std::initializer_list<int64_t>{value.size(-1)};
    check_saved("grad_pooled", grad_pooled, "value", value, pooled_sizes);
    check_saved("pooled", pooled, "value", value, pooled_sizes);
    check_saved("lse", lse, "value", value, lead);
    grad_pooled_.emplace(made_contiguous(grad_pooled));
    pooled = made_contiguous(pooled);
    lse = made_contiguous(lse);
    const Sizes absent = lead + std::initializer_list<int64_t>{0};
    grad_mask =
        need_mask ? empty_like_layout(mask_logits, sizes_of(mask_logits)) : dnl::empty(value, absent, type_of(value));
    grad_value = need_value ? empty_like_layout(value, sizes_of(value)) : dnl::empty(value, absent, type_of(value));
    set(mask_logits, value);
    args.grad_pooled = grad_pooled_->data_ptr();
    if (need_mask) {
      grad_mask_.set(grad_mask, 1);
      args.grad_mask = grad_mask_.view;
    }
    if (need_value) {
      grad_value_.set(grad_value);
      args.grad_value = grad_value_.view;
    }
  }

  bool empty() const { return args.batches == 0; }

 private:
  void set(const Tensor& mask_logits, const Tensor& value) {
    mask_.set(mask_logits, 1);
    value_.set(value);
    args.mask = mask_.view;
    args.value = value_.view;
    args.pooled = pooled.data_ptr();
    args.lse = lse.data_ptr();
    args.dtype = value_.dtype;
    args.batches = static_cast<int64_t>(value_.offsets.size());
    args.keys = value.size(-2);
    args.channels = value.size(-1);
  }

  Operand mask_, value_, grad_mask_, grad_value_;
  std::optional<Tensor> grad_pooled_;
};

}  // namespace dnl
