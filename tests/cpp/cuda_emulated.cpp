// The whole CUDA route on CPU tensors: the operators' glue, drivers and kernels as they are, with kernels run by
// the emulator and products by torch's CPU bmm. Registered as dnl_cuda_emulated::*; tests/routes.py builds and loads
// it. It links to libdnl_ext.so for what operators ask of it: the settings of torch, and the path of a call.

// clang-format off
#include "emulator.h"
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <string>

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
#include "core/cuda/launch.h"
// clang-format on
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

  // torch's CPU bmm has no dtype_out: halves are widened first, which is exact. It has no TF32 either: where that is
  // allowed, floats are rounded to it first. DNL_EXT_EMULATED_PRODUCTS=torch: products as a GPU's operators ask for
  // them.
  template <class T, class Out>
  void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches, int64_t m,
               int64_t n, int64_t k) const {
    if (std::getenv("DNL_EXT_EMULATED_PRODUCTS") || std::is_same_v<T, double> ||
        (std::is_same_v<T, float> && !tf32_allowed())) {
      TensorMemory::product(a, b, c, batches, m, n, k);
    } else {
      TensorMemory memory(like_);
      const Matrix<float> left = widened(memory, a, batches, m, k), right = widened(memory, b, batches, k, n);
      const int64_t pitch = pitch_of(n);
      const Matrix<float> out = dense(memory.allocate<float>(batches * m * pitch), batches, m, pitch);
      memory.product(left.read(), right.read(), out, batches, m, n, k);
      for (int64_t e = 0; e < batches; ++e)
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) *c.element(e, i, j) = *out.element(e, i, j);
    }
  }

 private:
  template <class T>
  static float operand(T x) {
    if constexpr (std::is_same_v<T, float>)
      return wide(rounded<Tf32>(x));
    else
      return wide(x);
  }

  template <class T>
  static Matrix<float> widened(TensorMemory& memory, const Matrix<const T>& x, int64_t batches, int64_t rows,
                               int64_t columns) {
    const int64_t pitch = pitch_of(columns);
    const Matrix<float> copy = dense(memory.allocate<float>(batches * rows * pitch), batches, rows, pitch);
    for (int64_t e = 0; e < batches; ++e)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) *copy.element(e, i, j) = operand(*x.element(e, i, j));
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

// The same registrations under another name and for the key that CPU tensors have.
#define dnl_ext dnl_cuda_emulated
#define CUDA CPU
#include "ops/pairwise/pairwise_cuda.cu"
#include "ops/unary/unary_cuda.cu"
#include "ops/whiten/whiten_cuda.cu"
