// Shared memory of a block: dynamic, of its exact size and alignment, and static. Both begin as NaN.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "state.h"

// Static shared memory of every kernel, one after another, where the compiler lets us say so (see README.md).
#ifdef __clang__
extern "C" {
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
}
#endif

namespace emulator {

class DynamicShared {
 public:
  ~DynamicShared() { release(); }

  char* begin() const { return begin_; }  // nullptr until the kernel asks for it
  size_t alignment() const { return alignment_; }

  // Exactly as many bytes as were asked for, at an address that has no larger alignment by luck.
  void allocate(size_t bytes, size_t alignment) {
    const size_t before = alignment;  // the block's memory follows, at an odd multiple of `alignment`
#ifdef EMULATOR_TSAN
    // New pages for every block: two blocks that use the same addresses do not race.
    mapped_ = before + bytes + 2 * alignment;
    memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
#else
    if (posix_memalign(&memory_, 2 * alignment, before + bytes)) throw std::bad_alloc();
#endif
    alignment_ = alignment;
    begin_ = static_cast<char*>(memory_) + before;
    std::memset(begin_, kPoison, bytes);
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(memory_, before);
#endif
  }

  void release() {
    if (!begin_) return;
#ifdef EMULATOR_TSAN
    munmap(memory_, mapped_);
#else
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(memory_, alignment_);
#endif
    std::free(memory_);
#endif
    begin_ = nullptr;
  }

 private:
  void* memory_ = nullptr;
  char* begin_ = nullptr;
  size_t alignment_ = 0;
#ifdef EMULATOR_TSAN
  size_t mapped_ = 0;
#endif
};

// Before a block runs.
inline void renew_static_shared() {
#ifdef __clang__
  if (!__start_emulated_shared) return;
  std::memset(__start_emulated_shared, kPoison, __stop_emulated_shared - __start_emulated_shared);
  forget_accesses(__start_emulated_shared, __stop_emulated_shared);
#endif
}

}  // namespace emulator
