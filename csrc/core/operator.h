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

// torch's numbers of the types that the operators take. Tensor::scalar_type asks for the number of one type after the
// other, each time, by a call into torch: a tensor is asked for its type some ten times in a call of an operator.
struct TypeCodes {
  const int32_t code[4] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                           aoti_torch_dtype_float16()};
  static constexpr ScalarType type[4] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  static const TypeCodes& all() {
    static const TypeCodes codes;
    return codes;
  }
};
inline ScalarType type_of(const Tensor& x) {
  int32_t code;
  if (aoti_torch_get_dtype(x.get(), &code)) throw_torch_error("reading the dtype of a tensor");
  const TypeCodes& codes = TypeCodes::all();
  for (int i = 0; i < 4; ++i)
    if (code == codes.code[i]) return codes.type[i];
  return x.scalar_type();
}
inline int32_t code_of(ScalarType type) {
  const TypeCodes& codes = TypeCodes::all();
  for (int i = 0; i < 4; ++i)
    if (type == codes.type[i]) return codes.code[i];
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// Kind and number of a device, as torch counts them.
struct Place {
  int32_t kind, index;
  explicit Place(const Tensor& x) {
    if (aoti_torch_get_device_type(x.get(), &kind) || aoti_torch_get_device_index(x.get(), &index))
      throw_torch_error("reading the device of a tensor");
  }
  bool operator!=(const Place& other) const { return kind != other.kind || index != other.index; }
};

inline DType dtype_of(const Tensor& x) {
  switch (type_of(x)) {
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
  return type_of(x) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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
  switch (type_of(x)) {
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
                               torch::headeronly::toString(type_of(x))));
  }
}

inline void check_dims(const char* name, const Tensor& x, int64_t least, const char* shape) {
  if (x.dim() < least) throw ValueError(message(name, ": expected shape ", shape, ", got ", to_string(sizes_of(x))));
}

inline void check_sizes(const char* name, const Tensor& x, const Sizes& expected) {
  const auto sizes = x.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()))
    throw ValueError(message(name, ": expected shape ", to_string(expected), ", got ", to_string(sizes_of(x))));
}

inline std::string device_name(const Tensor& x) {
  if (x.is_cuda()) return message("cuda:", x.get_device_index());
  return x.is_cpu() ? "cpu" : "neither cpu nor cuda";
}

// `x` must share dtype and device with `other`.
inline void check_alike(const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
  check_float(name, x);
  if (type_of(x) != type_of(other))
    throw ValueError(message(name, ": expected the dtype of ", other_name, " (",
                             torch::headeronly::toString(type_of(other)), "), got ",
                             torch::headeronly::toString(type_of(x))));
  if (Place(x) != Place(other))
    throw ValueError(
        message(name, ": expected the device of ", other_name, " (", device_name(other), "), got ", device_name(x)));
}

// `x` is what a forward returned beside its output: of the accumulate type and on the device of `like`.
inline void check_saved(const char* name, const Tensor& x, const char* like_name, const Tensor& like,
                        const Sizes& sizes) {
  check_float(name, x);
  const ScalarType expected = accumulate_type(like);
  if (Place(x) != Place(like))
    throw ValueError(
        message(name, ": expected the device of ", like_name, " (", device_name(like), "), got ", device_name(x)));
  if (type_of(x) != expected)
    throw ValueError(message(name, ": expected ", torch::headeronly::toString(expected),
                             ", as the forward returns it, got ", torch::headeronly::toString(type_of(x))));
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
  const Place place(like);
  const AOTITorchError failed = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code_of(type),
                                                         place.kind, place.index, &result);
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
  Tensor copy = empty(x, sizes_of(x), type_of(x));
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
  return empty_strided(x, sizes, strides, type_of(x));
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory for the kernels
// ---------------------------------------------------------------------------------------------------------------------

// A call's memory: a thread keeps kKept bytes, for torch to allocate some costs as much as a small call does.
class Workspace {
 public:
  Workspace(const Tensor& like, size_t bytes) {
    if (bytes <= kKept) {
      static thread_local struct Kept {
        alignas(64) char bytes[kKept];
      } kept;
      data_ = kept.bytes;
    } else {
      tensor_.emplace(empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
      data_ = tensor_->data_ptr();
    }
  }
  Workspace(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr size_t kKept = 65536;
  std::optional<Tensor> tensor_;
  void* data_;
};

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

// torch's thread pool. One thread inside another parallel region, as everywhere in torch, and no more than the work
// keeps busy: to start a thread takes as long as kWorkOfAThread elements. `work`: how many are read.
constexpr double kWorkOfAThread = 32768;
inline Executor torch_threads(double work) {
  Executor executor;
  const double most = std::max(1.0, work / kWorkOfAThread);
  executor.threads = static_cast<int>(std::min<double>(torch::stable::get_num_threads(), most));
  executor.run = [](int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return executor;
}

}  // namespace dnl
