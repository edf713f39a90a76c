// The whole CUDA route on CPU tensors: the operators' glue, drivers and kernels as they are, with kernels run by
// the emulator and products by torch's CPU bmm. Registered as dnl_cuda_emulated::*; tests/routes.py builds and loads
// it.

// clang-format off
#define DNL_EXT_HOPPER
#include "emulator.h"
#include "sm90.h"
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Every tensor that the operators make begins as NaN, results and buffers alike: what no kernel writes shows.
inline AOTITorchError poisoned_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                             int32_t device_type, int32_t device_index, AtenTensorHandle* result) {
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
#include "core/tf32.cpp"  // the whole library is this file
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
  // allowed, floats are rounded to it first.
  template <class T, class Out>
  void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches, int64_t m,
               int64_t n, int64_t k) const {
    if (std::is_same_v<T, double> || (std::is_same_v<T, float> && !tf32_allowed())) {
      if constexpr (std::is_same_v<T, Out>) TensorMemory::product(a, b, c, batches, m, n, k);
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

// Whether products of float may use TF32: as torch.backends.cuda.matmul has it, or whatever a test says.
extern "C" __attribute__((visibility("default"))) void set_emulated_tf32_query(dnl::Tf32Query query) {
  dnl::set_tf32_query(query);
}

// The same registrations under another name and for the key that CPU tensors have.
#define dnl_ext dnl_cuda_emulated
#define CUDA CPU
#include "ops/pairwise/hopper/backward_map.cuh"
#include "ops/pairwise/hopper/forward.cuh"
#include "ops/pairwise/pairwise_cuda.cu"
#include "ops/unary/unary_cuda.cu"
#include "ops/whiten/whiten_cuda.cu"
