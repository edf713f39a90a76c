// Checked calls of mean_subtract and whiten, shared by the CPU and CUDA routes.
#pragma once

#include "core/operator.h"
#include "ops/whiten/whiten.h"

namespace dnl {

struct WhitenCall {
  Tensor output;
  WhitenArgs args{};

  WhitenCall(const Tensor& x, int64_t dim) : output(x) {
    check_float("x", x);
    check_dims("x", x, 1, "(..., N, C)");
    if (dim < -x.dim() || dim >= x.dim())
      throw ValueError(message("dim: expected a value from ", -x.dim(), " to ", x.dim() - 1, ", got ", dim));
    dim = dim < 0 ? dim + x.dim() : dim;
    output = empty_like_layout(x, sizes_of(x));

    // Channels are the remaining dimension that moves fastest in memory; all others are batch.
    int64_t channel = -1;
    for (int64_t i = x.dim() - 1; i >= 0; --i) {
      if (i == dim || x.size(i) == 1) continue;
      if (channel < 0 || (x.stride(i) != 0 && x.stride(i) < x.stride(channel))) channel = i;
    }
    std::vector<int64_t> batch;
    for (int64_t i = 0; i < x.dim(); ++i)
      if (i != dim && i != channel) batch.push_back(i);
    input_offsets_ = offsets_over(x, batch);
    output_offsets_ = offsets_over(output, batch);
    args.input = View{x.data_ptr(), input_offsets_.data(), x.stride(dim), channel < 0 ? 1 : x.stride(channel)};
    args.output =
        View{output.data_ptr(), output_offsets_.data(), output.stride(dim), channel < 0 ? 1 : output.stride(channel)};
    args.dtype = dtype_of(x);
    args.batches = static_cast<int64_t>(input_offsets_.size());
    args.positions = x.size(dim);
    args.channels = channel < 0 ? 1 : x.size(channel);
  }

  bool empty() const { return args.batches == 0 || args.positions == 0 || args.channels == 0; }

 private:
  std::vector<int64_t> input_offsets_, output_offsets_;
};

inline const Whitening& parse_whitening(const std::string& name) {
  std::ostringstream names;
  for (const Whitening& whitening : kWhitenings) {
    if (name == whitening.name) return whitening;
    names << (names.tellp() > 0 ? ", '" : "'") << whitening.name << "'";
  }
  throw ValueError(message("name: expected one of ", names.str(), ", got '", name, "'"));
}

// whiten, or its backward where the forward's `result` and `rstd` are given. The first `apart` dimensions never share
// statistics, whatever the name says: vmap maps over them.
struct StandardiseCall {
  Tensor output, rstd;
  StandardiseArgs args{};

  StandardiseCall(const Tensor& x, const std::string& name, int64_t apart, double eps, const Tensor* result = nullptr,
                  const Tensor* forward_rstd = nullptr)
      : output(x), rstd(x) {
    const char* argument = result ? "grad_output" : "x";
    const Whitening& whitening = parse_whitening(name);
    check_float(argument, x);
    check_dims(argument, x, 2, "(..., N, C)");
    if (apart < 0 || apart > x.dim() - 2)
      throw ValueError(message("apart: expected a value from 0 to ", x.dim() - 2, ", got ", apart));
    if (!(eps >= 0)) throw ValueError(message("eps: expected a number of at least 0, got ", eps));
    const Sizes sizes = sizes_of(x), lead = leading(x, 2);

    Sizes saved = lead;
    if (!whitening.deviation)
      saved.push_back(0);
    else if (whitening.scope == Scope::channel)
      saved.push_back(x.size(-1));
    else if (whitening.scope == Scope::batch)
      saved.resize(apart);
    if (result) {
      check_alike("output", *result, argument, x);
      check_sizes("output", *result, sizes);
      check_saved("rstd", *forward_rstd, argument, x, saved);
      rstd = made_contiguous(*forward_rstd);
      result_.set(*result);
      args.result = result_.view;
    } else {
      rstd = dnl::empty(x, saved, accumulate_type(x));
    }
    output = empty_like_layout(result ? *result : x, sizes);

    input_.set(x);
    output_.set(output);
    args.input = input_.view;
    args.output = output_.view;
    args.dtype = input_.dtype;
    args.batches = static_cast<int64_t>(input_.offsets.size());
    args.positions = x.size(-2);
    args.channels = x.size(-1);
    args.eps = eps;
    if (whitening.scope == Scope::position) {
      std::swap(args.positions, args.channels);
      for (View* view : {&args.input, &args.result, &args.output}) std::swap(view->position, view->channel);
    }
    args.group = whitening.scope == Scope::sample ? args.channels : 1;
    if (whitening.scope == Scope::batch) args.group = args.channels * product_of(lead, apart, lead.size());
    if (whitening.deviation) args.rstd = rstd.data_ptr();
    if (empty() && !result) torch::stable::zero_(rstd);
  }

  bool empty() const { return args.batches == 0 || args.positions == 0 || args.channels == 0; }

 private:
  Operand input_, result_, output_;
};

}  // namespace dnl
