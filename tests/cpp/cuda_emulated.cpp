// The whole CUDA route on CPU tensors: the operators' glue, drivers and kernels as they are, with kernels run by
// the emulator and products by torch's CPU bmm. Registered as dnl_cuda_emulated::*; tests/routes.py builds and loads
// it. It links to libdnl_ext.so for what operators ask of it: the settings of torch, and the path of a call.

// clang-format off
#include "emulator.h"
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <string>

// What the operators' glue asks of torch, each of which costs the host microseconds.
struct HostWork {
  int64_t allocations = 0, dispatcher_calls = 0, views = 0;
};
inline HostWork host_work;

// torch/csrc/shim_exception_state.h, which the stable ABI hides. Absent before 2.13.
namespace torch::csrc::shim::details {
__attribute__((weak, visibility("default"))) void set_torch_exception_what_without_backtrace(const std::string& text);
}

// What the C API does where torch throws c10::OutOfMemoryError.
inline AOTITorchError out_of_memory() {
  using torch::csrc::shim::details::set_torch_exception_what_without_backtrace;
  if (set_torch_exception_what_without_backtrace)
    set_torch_exception_what_without_backtrace("CUDA out of memory. Tried to allocate 2.00 GiB.");
  return 1;
}

// Every tensor that the operators make begins as NaN, results and buffers alike: what no kernel writes shows.
// DNL_EXT_EMULATED_FULL: there is no memory.
inline AOTITorchError poisoned_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                             int32_t device_type, int32_t device_index, AtenTensorHandle* result) {
  ++host_work.allocations;
  if (std::getenv("DNL_EXT_EMULATED_FULL")) return out_of_memory();
  if (const AOTITorchError error =
          aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, result))
    return error;
  void* data = nullptr;
  int64_t bytes = 0;
  if (const AOTITorchError error = aoti_torch_get_data_ptr(*result, &data)) return error;
  if (const AOTITorchError error = aoti_torch_get_storage_size(*result, &bytes)) return error;
  if (bytes) std::memset(data, emulator::kPoison, bytes);
  return 0;
}
#define aoti_torch_empty_strided poisoned_empty_strided

inline AOTITorchError counted_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  ++host_work.dispatcher_calls;
  return torch_call_dispatcher(name, overload, stack, version);
}
#define torch_call_dispatcher counted_dispatcher

template <class... Arguments>
AOTITorchError counted_view(Arguments... arguments) {
  ++host_work.views;
  return aoti_torch__reinterpret_tensor(arguments...);
}
#define aoti_torch__reinterpret_tensor counted_view
#include "core/cuda/launch.h"
// clang-format on
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "core/cuda/gemm.h"
#include "core/cuda/ptx.cuh"
#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

class CudaDevice : public TensorMemory, public emulator::Launcher {
 public:
  using TensorMemory::TensorMemory;

  // DNL_EXT_EMULATED_GPU: its compute capability and number of multiprocessors, "80,4" if not set.
  Gpu gpu() const {
    const char* text = std::getenv("DNL_EXT_EMULATED_GPU");
    Gpu gpu{80, 4, 0};
    if (text && std::sscanf(text, "%d,%d", &gpu.capability, &gpu.multiprocessors) != 2)
      throw ValueError(
          message("DNL_EXT_EMULATED_GPU: expected a capability and a number, like '80,4', got '", text, "'"));
    gpu.shared_bytes = shared_bytes_of(gpu.capability);
    emulator::machine().options.max_shared_bytes = gpu.shared_bytes;
    return gpu;
  }

  // By torch's CPU products, which have none of halves with float results and no TF32: those operands are widened
  // first, which is exact, or rounded.
  template <class T, class Out>
  void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches, int64_t m,
               int64_t n, int64_t k, bool accumulate = false) const {
    const Gemm<T, Out> x = gemm_of(a, b, c, batches, m, n, k);
    if constexpr (std::is_same_v<T, Out>)
      if (std::is_same_v<T, double> || !tf32_allowed()) return multiply(x, accumulate);
    if constexpr (!std::is_same_v<T, double>) {
      std::vector<float> left = widened(x.a, x.batches, x.transpose_a, x.m, x.k, x.lda, x.stride_a);
      std::vector<float> right = widened(x.b, x.batches, x.transpose_b, x.k, x.n, x.ldb, x.stride_b);
      multiply(Gemm<float, float>{x.batches, x.m, x.n, x.k, false, false, left.data(), right.data(), x.c, x.m, x.k,
                                  x.ldc, x.m * x.k, x.k * x.n, x.stride_c},
               accumulate);
    }
  }

 private:
  // A tensor (batches, rows, columns) over a column-major matrix, or a transposed one.
  template <class T>
  static Tensor tensor_of(const T* data, int64_t batches, bool transpose, int64_t rows, int64_t columns,
                          int64_t leading, int64_t stride) {
    const int64_t sizes[] = {batches, rows, columns};
    const int64_t strides[] = {stride, transpose ? leading : 1, transpose ? 1 : leading};
    AtenTensorHandle result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<T*>(data), 3, sizes, strides, 0,
        std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
        aoti_torch_device_type_cpu(), 0, &result));
    return Tensor(result);
  }

  template <class T>
  static void multiply(const Gemm<T, T>& x, bool accumulate) {
    const Tensor a = tensor_of(x.a, x.batches, x.transpose_a, x.m, x.k, x.lda, x.stride_a);
    const Tensor b = tensor_of(x.b, x.batches, x.transpose_b, x.k, x.n, x.ldb, x.stride_b);
    const Tensor c = tensor_of(x.c, x.batches, false, x.m, x.n, x.ldc, x.stride_c);
    TORCH_ERROR_CODE_CHECK(accumulate ? aoti_torch_cpu_baddbmm_out(c.get(), c.get(), a.get(), b.get(), 1, 1)
                                      : aoti_torch_cpu_bmm_out(c.get(), a.get(), b.get()));
  }

  template <class T>
  static float operand(T x) {
    if constexpr (std::is_same_v<T, float>)
      return wide(rounded<Tf32>(x));
    else
      return wide(x);
  }

  template <class T>
  static std::vector<float> widened(const T* x, int64_t batches, bool transpose, int64_t rows, int64_t columns,
                                    int64_t leading, int64_t stride) {
    std::vector<float> copy;
    copy.reserve(batches * rows * columns);
    for (int64_t e = 0; e < batches; ++e)
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < rows; ++i)
          copy.push_back(operand(x[e * stride + (transpose ? j + i * leading : i + j * leading)]));
    return copy;
  }
};

}  // namespace dnl

// For tests/routes.py: in which order threads and blocks get their turns (emulator::Turns), and how many threads a
// block may have.
extern "C" __attribute__((visibility("default"))) void configure_emulator(int turns, uint64_t seed,
                                                                          int64_t max_threads) {
  emulator::Options& options = emulator::machine().options;
  options.turns = static_cast<emulator::Turns>(turns);
  options.seed = seed;
  options.max_threads = max_threads;
}

// What the glue has asked of torch since the last call of this.
extern "C" __attribute__((visibility("default"))) void take_host_work(HostWork* work) {
  *work = std::exchange(host_work, {});
}

// The same registrations under another name and for the key that CPU tensors have.
#define dnl_ext dnl_cuda_emulated
#define CUDA CPU
#include "ops/pairwise/pairwise_cuda.cu"
#include "ops/unary/unary_cuda.cu"
#include "ops/whiten/whiten_cuda.cu"
