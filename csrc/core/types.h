// Types shared by operators and kernels. No torch header: kernels compile alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dnl {

enum class DType : int { f64, f32, bf16, f16 };

// A (positions x channels) matrix per batch element, anywhere in memory.
// Element (b, i, c) lies at data + (batch[b] + i * position + c * channel) elements.
struct View {
  void* data = nullptr;
  const int64_t* batch = nullptr;  // (batches) element offsets, one per flattened leading index
  int64_t position = 0;            // stride between positions, in elements
  int64_t channel = 0;             // stride between channels, in elements
};

// What the choice of a CUDA kernel depends on.
struct Gpu {
  int capability = 0;  // 10 major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  // most that a block can ask for
};

// How a CPU kernel runs `tasks` independent pieces: the operators pass torch's thread pool, host tests their own.
struct Executor {
  int threads = 1;
  void (*run)(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* context), void* context) = nullptr;

  template <class F>
  void parallel(int64_t tasks, const F& f) const {
    auto body = [](int64_t begin, int64_t end, void* context) {
      for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
    };
    if (tasks == 1 || threads == 1) return body(0, tasks, const_cast<F*>(&f));
    run(tasks, body, const_cast<F*>(&f));
  }
};

}  // namespace dnl
