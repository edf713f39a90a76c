// What the emulator tells AddressSanitizer and ThreadSanitizer, in one place; without them, nothing.
//
// ThreadSanitizer is told of every switch between fibers, and that the switch orders nothing: two CUDA threads are
// ordered by what a kernel says (barriers, __syncwarp, mbarriers, the end of a launch) and by nothing else. So a race
// is found whatever order the fibers happened to run in.
#pragma once

#include <cstddef>
#include <vector>

#ifndef __has_feature
#define __has_feature(x) 0
#endif

#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#define EMULATOR_TSAN 1
// Declared here, since some distributions of clang have ThreadSanitizer's library without sanitizer/tsan_interface.h.
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_java_init(unsigned long begin, unsigned long bytes);
void __tsan_java_alloc(unsigned long begin, unsigned long bytes);
void __tsan_java_free(unsigned long begin, unsigned long bytes);
}
// A function whose accesses ThreadSanitizer does not see. Not inlined: its body would be instrumented in the caller.
#define EMULATOR_UNSEEN __attribute__((noinline, no_sanitize("thread"))) inline
#else
#define EMULATOR_UNSEEN inline
#endif

namespace emulator {

#ifdef EMULATOR_TSAN
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// While one lives, ThreadSanitizer sees no access of this fiber: the emulator's own state is shared by all of them and
// is no business of the kernel. Must not live across a switch of fibers.
class Unseen {
 public:
#ifdef EMULATOR_TSAN
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
  ~Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// An address that carries order between threads: what came before release() happens before what follows acquire().
// Each meeting of threads takes a new one. Were an address used again, a fast thread's next arrival would be taken for
// something the slow thread has waited for, and hide a race.
class Order {
 public:
#ifdef EMULATOR_TSAN
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif
  int leaving = 0;  // threads that have yet to acquire; the last one frees it
};

// ThreadSanitizer's part of finished fibers. It has to outlive the launch: a race with a fiber whose trace is gone
// cannot be reported. There is room for some of them only, so a large launch loses the oldest blocks.
class Traces {
 public:
  ~Traces() { free(); }
#ifdef EMULATOR_TSAN
  void keep(void* fiber) {
    constexpr size_t kMost = 4096;  // ThreadSanitizer has room for 8128 threads
    if (fibers_.size() == kMost) free();
    fibers_.push_back(fiber);
  }
  void free() {
    for (void* fiber : fibers_) __tsan_destroy_fiber(fiber);
    fibers_.clear();
  }

 private:
  std::vector<void*> fibers_;
#else
  void keep(void*) {}
  void free() {}
#endif
};

// Forgets who accessed a range of memory, as if it were new. ThreadSanitizer offers that for one heap per process.
inline void forget_accesses(char* begin, char* end) {
#ifdef EMULATOR_TSAN
  constexpr unsigned long kCell = 8;
  const unsigned long first = reinterpret_cast<unsigned long>(begin) / kCell * kCell;
  const unsigned long bytes = (reinterpret_cast<unsigned long>(end) - first + kCell - 1) / kCell * kCell;
  static const bool once = (__tsan_java_init(first, bytes), true);
  (void)once;
  __tsan_java_free(first, bytes);
  __tsan_java_alloc(first, bytes);
#else
  (void)begin, (void)end;
#endif
}

}  // namespace emulator
