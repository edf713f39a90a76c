// Memory and library products of the CUDA operators, through torch.
//
// Products go through the dispatcher to aten (bmm.out, and bmm.dtype_out for halves in and float out), so torch's own
// settings (allow_tf32, preferred BLAS library, workspaces, graph capture) hold for them. One cannot: where torch
// allows sums in float16 (allow_fp16_accumulation), it refuses products of float16 with float results. Those then
// multiply float copies of their operands, which are exact, and in TF32 too, where that is allowed. baddbmm is out of
// reach: the stable ABI cannot pass its Scalar arguments.
#pragma once

#include <array>
#include <deque>

#include "core/cuda/device.cuh"
#include "core/matmul_settings.h"
#include "core/operator.h"

namespace dnl {

template <class T>
constexpr ScalarType kScalarType = std::is_same_v<T, double>          ? ScalarType::Double
                                   : std::is_same_v<T, float>         ? ScalarType::Float
                                   : std::is_same_v<T, Tf32>          ? ScalarType::Float
                                   : std::is_same_v<T, __nv_bfloat16> ? ScalarType::BFloat16
                                                                      : ScalarType::Half;

// Tensors by address: what was allocated here, and what the caller named.
class TensorMemory {
 public:
  explicit TensorMemory(const Tensor& like) : like_(like) {}

  // `count` elements on the device of `like`, freed with this object. Uninitialised, aligned to 16 bytes and more.
  template <class T>
  T* allocate(int64_t count) {
    if (count == 0) return nullptr;
    tensors_.push_back(empty(like_, {count}, kScalarType<T>));
    return static_cast<T*>(tensors_.back().data_ptr());
  }

  // A tensor of the caller that products read.
  void know(const Tensor& x) { tensors_.push_back(x); }

  // c = a b for every batch element: a (batches, m, k), b (batches, k, n), c (batches, m, n), where Out is T, or float
  // for halves. Each has one batch stride; a and b are what is_product_operand accepts, or their transposes.
  template <class T, class Out>
  void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches, int64_t m,
               int64_t n, int64_t k) const {
    if (batches == 0 || m == 0 || n == 0) return;
    Tensor out = view(c, batches, m, n);
    if (k == 0) {
      torch::stable::zero_(out);
      return;
    }
    const Tensor left = view(a, batches, m, k), right = view(b, batches, k, n);
    using torch::stable::detail::from;
    if constexpr (std::is_same_v<T, Out>) {
      std::array<StableIValue, 3> stack{from(left), from(right), from(out)};
      call_bmm("out", stack.data());
    } else if (std::is_same_v<T, __half> && sums_in_float16()) {
      std::array<StableIValue, 3> stack{from(torch::stable::to(left, ScalarType::Float)),
                                        from(torch::stable::to(right, ScalarType::Float)), from(out)};
      call_bmm("out", stack.data());
    } else {
      std::array<StableIValue, 4> stack{from(left), from(right), from(kScalarType<Out>), from(out)};
      call_bmm("dtype_out", stack.data());
    }
  }

 protected:
  // A tensor over part of the storage of the one that holds x.
  template <class T>
  Tensor view(const Matrix<T>& x, int64_t batches, int64_t rows, int64_t columns) const {
    const auto* data = reinterpret_cast<const char*>(x.element(0));
    const Tensor& holder = holder_of(data);
    const int64_t bytes = data - static_cast<const char*>(holder.data_ptr());
    const int64_t sizes[] = {batches, rows, columns};
    const int64_t strides[] = {x.batch.dims ? x.batch.stride[0] : rows * columns, x.position, x.channel};
    AtenTensorHandle result;
    if (aoti_torch__reinterpret_tensor(holder.get(), 3, sizes, strides, bytes / static_cast<int64_t>(sizeof(T)),
                                       &result))
      throw_torch_error("a view of a buffer");
    return Tensor(result);
  }

  // Asked once, since asking takes Python's lock: a call has dozens of products.
  bool sums_in_float16() const {
    if (!sums_in_float16_) sums_in_float16_ = allowed(MatmulSetting::fp16_accumulation);
    return *sums_in_float16_;
  }

  const Tensor& like_;

 private:
  static void call_bmm(const char* overload, StableIValue* stack) {
    if (torch_call_dispatcher("aten::bmm", overload, stack, TORCH_ABI_VERSION))
      throw_torch_error(message("aten::bmm.", overload));
    torch::stable::detail::to<Tensor>(stack[0]);  // owns, and so frees, the returned reference
  }

  const Tensor& holder_of(const char* data) const {
    for (const Tensor& x : tensors_) {
      if (x.numel() == 0) continue;
      const char* begin = static_cast<const char*>(x.data_ptr());
      int64_t last = 0;  // offset of the last element
      for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
      if (data >= begin && data <= begin + last * static_cast<int64_t>(x.element_size())) return x;
    }
    throw std::logic_error("dnl_ext: a product was given memory that nobody named");
  }

  std::deque<Tensor> tensors_;
  mutable std::optional<bool> sums_in_float16_;
};

}  // namespace dnl
