// What every operator needs between torch and the kernels: checks, layouts, batch offsets, threads.
//
// Written against the LibTorch stable ABI (torch/csrc/stable), so that one binary serves several torch versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/boxed.h"
#include "core/errors.h"
#include "core/torch_errors.h"
#include "core/types.h"

namespace dnl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// ---------------------------------------------------------------------------------------------------------------------
// Reading a tensor
// ---------------------------------------------------------------------------------------------------------------------

inline Sizes sizes_of(const Tensor& x) { return Sizes(x.sizes().begin(), x.sizes().end()); }
inline Sizes strides_of(const Tensor& x) { return Sizes(x.strides().begin(), x.strides().end()); }

inline std::string to_string(const Sizes& sizes) {
  std::ostringstream stream;
  stream << '(';
  for (size_t i = 0; i < sizes.size(); ++i) stream << (i ? ", " : "") << sizes[i];
  stream << (sizes.size() == 1 ? ",)" : ")");
  return stream.str();
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw ValueError("unsupported dtype");  // check_float comes first, with the argument's name
  }
}

// Type of sums and softmax statistics.
inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t product_of(const Sizes& sizes, size_t begin, size_t end) {
  int64_t result = 1;
  for (size_t i = begin; i < end; ++i) result *= sizes[i];
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks: each names the argument, what was wanted and what came
// ---------------------------------------------------------------------------------------------------------------------

inline void check_float(const char* name, const Tensor& x) {
  // None passed to torch.ops arrives as an undefined tensor: every other query of it would be an error of its own.
  if (!x.defined()) throw TypeError(message(name, ": expected a torch.Tensor, got None"));
  switch (x.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return;
    case ScalarType::ComplexHalf:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexDouble:
      throw NotImplementedError(message(name, ": expected a real float tensor, got a complex one"));
    default:
      throw ValueError(message(name, ": expected float64, float32, bfloat16 or float16, got ",
                               torch::headeronly::toString(x.scalar_type())));
  }
}

inline void check_dims(const char* name, const Tensor& x, int64_t least, const char* shape) {
  if (x.dim() < least) throw ValueError(message(name, ": expected shape ", shape, ", got ", to_string(sizes_of(x))));
}

inline void check_sizes(const char* name, const Tensor& x, const Sizes& expected) {
  if (sizes_of(x) != expected)
    throw ValueError(message(name, ": expected shape ", to_string(expected), ", got ", to_string(sizes_of(x))));
}

inline std::string device_name(const Tensor& x) {
  if (x.is_cuda()) return message("cuda:", x.get_device_index());
  return x.is_cpu() ? "cpu" : "neither cpu nor cuda";
}

// `x` must share dtype and device with `other`.
inline void check_alike(const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
  check_float(name, x);
  if (x.scalar_type() != other.scalar_type())
    throw ValueError(message(name, ": expected the dtype of ", other_name, " (",
                             torch::headeronly::toString(other.scalar_type()), "), got ",
                             torch::headeronly::toString(x.scalar_type())));
  if (x.device() != other.device())
    throw ValueError(
        message(name, ": expected the device of ", other_name, " (", device_name(other), "), got ", device_name(x)));
}

// `x` is what a forward returned beside its output: of the accumulate type and on the device of `like`.
inline void check_saved(const char* name, const Tensor& x, const char* like_name, const Tensor& like,
                        const Sizes& sizes) {
  check_float(name, x);
  const ScalarType expected = accumulate_type(like);
  if (x.device() != like.device())
    throw ValueError(
        message(name, ": expected the device of ", like_name, " (", device_name(like), "), got ", device_name(x)));
  if (x.scalar_type() != expected)
    throw ValueError(message(name, ": expected ", torch::headeronly::toString(expected),
                             ", as the forward returns it, got ", torch::headeronly::toString(x.scalar_type())));
  check_sizes(name, x, sizes);
}

inline Sizes leading(const Tensor& x, int64_t trailing) {
  Sizes sizes = sizes_of(x);
  sizes.resize(sizes.size() - trailing);
  return sizes;
}

inline Sizes operator+(Sizes sizes, std::initializer_list<int64_t> more) {
  sizes.insert(sizes.end(), more);
  return sizes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Making tensors
// ---------------------------------------------------------------------------------------------------------------------

inline Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType type) {
  AtenTensorHandle result;
  const auto device = like.device();
  const AOTITorchError failed = aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &result);
  if (failed) {
    const std::string tried = message("allocating a tensor of shape ", to_string(sizes), " and dtype ",
                                      torch::headeronly::toString(type), " on ", device_name(like));
    like.is_cuda() ? throw_torch_error<OutOfMemoryError>(tried) : throw_torch_error(tried);
  }
  return Tensor(result);
}

inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided(like, sizes, strides, type);
}

// `x`, or a contiguous copy. Not torch::stable::contiguous, whose errors have no text.
inline Tensor made_contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;
  Tensor copy = empty(x, sizes_of(x), x.scalar_type());
  torch::stable::copy_(copy, x);
  return copy;
}

// A dense tensor of `sizes` whose dimensions are ordered in memory as those of `x`: channel-first in, channel-first
// out. Dimensions of size 1 or stride 0 keep their place. The same rule stands in dnl_ext/ops/_common.py for tracing.
inline Tensor empty_like_layout(const Tensor& x, const Sizes& sizes) {
  const Sizes stride = strides_of(x), size = sizes_of(x);
  std::vector<size_t> order(size.size());
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 1; i < order.size(); ++i) {
    for (size_t j = i; j > 0; --j) {
      const size_t outer = order[j - 1], inner = order[j];
      if (stride[outer] == 0 || stride[inner] == 0 || stride[outer] >= stride[inner]) break;
      if (size[outer] == 1 || size[inner] == 1) break;
      std::swap(order[j - 1], order[j]);
    }
  }
  Sizes strides(size.size());
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = step;
    step *= std::max<int64_t>(sizes[order[i]], 1);
  }
  return empty_strided(x, sizes, strides, x.scalar_type());
}

// ---------------------------------------------------------------------------------------------------------------------
// Views for the kernels
// ---------------------------------------------------------------------------------------------------------------------

// Offsets, in elements, of each flattened index over the dimensions listed in `dims`.
inline std::vector<int64_t> offsets_over(const Tensor& x, const std::vector<int64_t>& dims) {
  std::vector<int64_t> offsets{0};
  for (int64_t dim : dims) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * x.size(dim));
    for (int64_t base : offsets)
      for (int64_t i = 0; i < x.size(dim); ++i) next.push_back(base + i * x.stride(dim));
    offsets.swap(next);
  }
  return offsets;
}

// A View and the offsets it points to. `trailing` = 2 for (..., N, C), 1 for (..., N) with one channel.
struct Operand {
  View view;
  std::vector<int64_t> offsets;
  DType dtype = DType::f32;

  Operand() = default;
  Operand(const Operand&) = delete;
  Operand(Operand&&) = delete;
  explicit Operand(const Tensor& x, int64_t trailing = 2) { set(x, trailing); }

  void set(const Tensor& x, int64_t trailing = 2) {
    std::vector<int64_t> dims(x.dim() - trailing);
    std::iota(dims.begin(), dims.end(), 0);
    offsets = offsets_over(x, dims);
    const int64_t first = x.dim() - trailing;
    view = View{x.data_ptr(), offsets.data(), x.stride(first), trailing == 2 ? x.stride(first + 1) : 1};
    dtype = dtype_of(x);
  }
};

// torch's thread pool. One thread inside another parallel region, as everywhere in torch.
inline Executor torch_threads() {
  Executor executor;
  executor.threads = static_cast<int>(torch::stable::get_num_threads());
  executor.run = [](int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return executor;
}

}  // namespace dnl
