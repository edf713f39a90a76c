// A checked call of mean_subtract, shared by the CPU and CUDA routes.
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

}  // namespace dnl
