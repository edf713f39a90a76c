// The machine behind the CUDA operators: launches on the current stream of a tensor's device.
//
// This is the only file that launches a kernel. Device guard, return if empty, current stream, launch, launch check.
#pragma once

#include "core/cuda/memory.h"
#include "core/cuda/per_device.h"

// A test on the host has a CudaDevice of its own (tests/cpp/cuda_emulated.cpp).
#ifdef __CUDACC__

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace dnl {

class CudaDevice : public TensorMemory {
 public:
  using TensorMemory::TensorMemory;

  // Blocks of kThreads threads for `tasks` tasks; the kernel takes further tasks in steps of the grid.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t tasks, const Arguments&... arguments) const {
    launch(kernel, LaunchShape{std::min(tasks, kMostBlocks), kThreads}, arguments...);
  }

  // A grid of the kernel's own making; no blocks, no launch.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) const {
    const torch::stable::accelerator::DeviceGuard guard(like_.get_device_index());
    if (shape.blocks == 0) return;
    if (shape.blocks > kMostBlocks)
      throw std::length_error(message("a launch of ", shape.blocks, " blocks: at most ", kMostBlocks, " are possible"));
    // Set for the current device only, so at every launch.
    if (shape.shared_bytes > kSharedWithoutAsking)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shape.shared_bytes)));
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(like_.get_device_index(), &stream))
      throw_torch_error("asking for the current stream");
    kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, static_cast<size_t>(shape.shared_bytes),
             static_cast<cudaStream_t>(stream)>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice)
      throw NotImplementedError(
          "dnl_ext was not built for this GPU (compute capability 8.0 or later): rebuild it with "
          "TORCH_CUDA_ARCH_LIST, see `python -m dnl_ext doctor`");
    STD_CUDA_CHECK(error);
  }

  Gpu gpu() const {
    static PerDevice<Gpu> known;
    const int device = like_.get_device_index();
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
      return value;
    };
    return known.get(device, [&] {
      return Gpu{10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
                 attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    });
  }

 private:
  static constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;  // of gridDim.x
  static constexpr int64_t kSharedWithoutAsking = int64_t(48) << 10;
};

}  // namespace dnl

#endif
