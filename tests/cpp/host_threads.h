// How a host test runs a kernel's tasks: on threads of its own, in a workspace of the exact size.
#pragma once

#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "core/types.h"

inline dnl::Executor host_threads(int count) {
  static int n;
  n = count;
  dnl::Executor executor;
  executor.threads = count;
  executor.run = [](int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> pool;
    for (int t = 0; t < n; ++t) pool.emplace_back([=] { body(tasks * t / n, tasks * (t + 1) / n, context); });
    for (auto& thread : pool) thread.join();
  };
  return executor;
}

// Full of NaN: nothing may be read before it is written.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : data_(::operator new(bytes, std::align_val_t(64))) {
    std::memset(data_, 0xff, bytes);
  }
  ~Workspace() { ::operator delete(data_, std::align_val_t(64)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};
