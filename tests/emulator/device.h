// launch() of the emulated devices, with the two forms of CudaDevice::launch.
#pragma once

#include "core/cuda/device.cuh"
#include "emulator.h"

namespace emulator {

struct Launcher {
  int64_t most_blocks = int64_t(1) << 30;  // fewer make blocks take several tasks

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const dnl::Tasks& tasks, const Arguments&... arguments) const {
    const int64_t blocks = std::min(tasks.count, most_blocks);
    launch(kernel, dnl::LaunchShape{blocks, dnl::kThreads, tasks.shared_bytes}, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const dnl::LaunchShape& shape, const Arguments&... arguments) const {
    if (shape.blocks == 0) return;
    machine().launch(shape.blocks, shape.threads, shape.shared_bytes, [&] { kernel(arguments...); });
  }
};

}  // namespace emulator
