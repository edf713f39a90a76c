// The machine behind the CUDA operators: launches on the current stream of a tensor's device.
//
// This is the only file that launches a kernel. Device guard, return if empty, current stream, launch, launch check.
#pragma once

#include "core/cuda/memory.h"

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
    const torch::stable::accelerator::DeviceGuard guard(like_.get_device_index());
    if (tasks == 0) return;
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like_.get_device_index(), &stream));
    const auto blocks = static_cast<unsigned>(std::min(tasks, kMaxBlocks));
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  static constexpr int64_t kMaxBlocks = int64_t(1) << 30;  // below the limit of gridDim.x, 2^31 - 1
};

}  // namespace dnl

#endif
