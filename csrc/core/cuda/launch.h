// The machine behind the CUDA operators: launches and products on the current stream of a tensor's device.
//
// This is the only file that launches a kernel. Device guard and current stream, once for a call; return if empty,
// launch, launch check.
#pragma once

#include "core/cuda/memory.h"
#include "core/cuda/per_device.h"

// A test on the host has a CudaDevice of its own (tests/cpp/cuda_emulated.cpp).
#ifdef __CUDACC__

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "core/cuda/cublas.h"

namespace dnl {

class CudaDevice : public TensorMemory {
 public:
  // Until the object's end the device of `like` is the current one.
  explicit CudaDevice(const Tensor& like)
      : TensorMemory(like), index_(like.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}

  // The kernel takes further tasks in steps of the grid.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Tasks& tasks, const Arguments&... arguments) const {
    launch(kernel, LaunchShape{std::min(tasks.count, kMostBlocks), kThreads, tasks.shared_bytes}, arguments...);
  }

  // A grid of the kernel's own making; no blocks, no launch.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) const {
    if (shape.blocks == 0) return;
    if (shape.blocks > kMostBlocks)
      throw std::length_error(message("a launch of ", shape.blocks, " blocks: at most ", kMostBlocks, " are possible"));
    if (shape.shared_bytes > kSharedWithoutAsking)
      allow_shared(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
    kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, static_cast<size_t>(shape.shared_bytes), stream_>>>(
        arguments...);
    check_kernel(cudaGetLastError());
  }

  // c = a b, or c += a b, for every batch element (gemm.h). Extents are not zero.
  template <class T, class Out>
  void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches, int64_t m,
               int64_t n, int64_t k, bool accumulate = false) {
    if (!blas_) {
      void* handle = nullptr;
      if (torch_get_current_cuda_blas_handle(&handle)) throw_torch_error("asking for the handle of cuBLAS");
      blas_ = static_cast<cublasHandle_t>(handle);
    }
    cublas_gemm(blas_, gemm_of(a, b, c, batches, m, n, k), accumulate);
  }

  Gpu gpu() const {
    static PerDevice<Gpu> known;
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
      return value;
    };
    return known.get(index_, [&] {
      return Gpu{10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
                 attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    });
  }

 private:
  static constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;  // of gridDim.x
  static constexpr int64_t kSharedWithoutAsking = int64_t(48) << 10;

  // Of the first thing that is done with a kernel.
  static void check_kernel(cudaError_t error) {
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();  // takes it away
      throw NotImplementedError(
          "dnl_ext was not built for this GPU (compute capability 8.0 or later): rebuild it with "
          "TORCH_CUDA_ARCH_LIST, see `python -m dnl_ext doctor`");
    }
    STD_CUDA_CHECK(error);
  }

  static cudaStream_t current_stream(int index) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(index, &stream)) throw_torch_error("asking for the current stream");
    return static_cast<cudaStream_t>(stream);
  }

  // The attribute belongs to the kernel on one device.
  void allow_shared(const void* kernel, int64_t bytes) const {
    static Limits<std::pair<int, const void*>> allowed;
    allowed.at_least({index_, kernel}, bytes, [&] {
      check_kernel(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    });
  }

  const int index_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const cudaStream_t stream_;
  cublasHandle_t blas_ = nullptr;  // torch's, from the first product on
};

}  // namespace dnl

#endif
