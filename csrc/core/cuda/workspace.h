// The memory of a call beyond its results: one allocation, cut into pieces. An allocation costs the host microseconds,
// which small maps would wait for.
//
// A driver asks for memory where it needs it. It therefore runs twice: on a WorkspaceSize, which adds up what is asked
// for and does nothing else, and on the device. What it asks for must not depend on where it lies.
#pragma once

#include <stdexcept>

#include "core/cuda/device.cuh"

namespace dnl {

constexpr int64_t kPieceAlignment = 256;  // bytes

template <class T>
constexpr int64_t piece_bytes(int64_t count) {
  return round_up_to(count * static_cast<int64_t>(sizeof(T)), kPieceAlignment);
}

// A device on which nothing runs.
class WorkspaceSize {
 public:
  explicit WorkspaceSize(const Gpu& gpu) : gpu_(gpu) {}

  // An address that nobody may read, aligned as the real one will be.
  template <class T>
  T* allocate(int64_t count) {
    if (count == 0) return nullptr;
    bytes_ += piece_bytes<T>(count);
    return reinterpret_cast<T*>(static_cast<uintptr_t>(bytes_));
  }
  template <class... Arguments>
  void launch(const Arguments&...) const {}
  template <class... Arguments>
  void product(const Arguments&...) const {}

  Gpu gpu() const { return gpu_; }
  int64_t bytes() const { return bytes_; }

 private:
  Gpu gpu_;
  int64_t bytes_ = 0;
};

// A run of memory, given away from its start.
class Pieces {
 public:
  Pieces() = default;
  Pieces(void* data, int64_t bytes) : next_(static_cast<char*>(data)), left_(bytes) {}

  // The next `count` elements, aligned to kPieceAlignment if the run is.
  template <class T>
  T* take(int64_t count) {
    if (count == 0) return nullptr;
    const int64_t bytes = piece_bytes<T>(count);
    if (bytes > left_) throw std::logic_error("dnl_ext: a driver asks for more memory than it said it would");
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  char* next_ = nullptr;
  int64_t left_ = 0;
};

// run(device) for a driver that is generic in its device.
template <class Device, class Run>
void with_workspace(Device& device, const Run& run) {
  WorkspaceSize size(device.gpu());
  run(size);
  device.reserve(size.bytes());
  run(device);
}

}  // namespace dnl
