// A stack of its own for every CUDA thread, and the switch between it and the scheduler.
//
// On x86-64 the switch saves the six registers that a call must keep, in a few instructions; elsewhere it is
// swapcontext, which also saves the signal mask and is some twenty times slower.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "sanitizers.h"

#if defined(EMULATOR_TSAN) && defined(_LIBCPP_VERSION)
#define EMULATOR_OWN_EXCEPTIONS 1
#include <cxxabi.h>
#endif

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_SWAPCONTEXT 1
#include <ucontext.h>
#endif

#ifdef EMULATOR_OWN_EXCEPTIONS
// libc++'s runtime keeps a list of caught exceptions per operating-system thread. Where the runtime is instrumented as
// well, as zig's is, fibers that throw would seem to race in it. So each fiber has a list of its own.
namespace __cxxabiv1 {
struct __cxa_eh_globals {
  void* caught;
  unsigned uncaught;
};
inline __cxa_eh_globals exceptions_of_scheduler;
inline __cxa_eh_globals* exceptions = &exceptions_of_scheduler;
extern "C" {
EMULATOR_UNSEEN __attribute__((used)) __cxa_eh_globals* __cxa_get_globals() { return exceptions; }
EMULATOR_UNSEEN __attribute__((used)) __cxa_eh_globals* __cxa_get_globals_fast() { return exceptions; }
}
}  // namespace __cxxabiv1
#endif

namespace emulator {

#ifdef EMULATOR_SWAPCONTEXT
using Context = ucontext_t;
EMULATOR_UNSEEN void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#else
using Context = void*;  // the stack pointer; the registers lie on the stack
__attribute__((naked, noinline, no_sanitize("address", "undefined", "thread"))) inline void switch_context(Context&,
                                                                                                           Context&) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

// The scheduler's side of a switch.
struct Home {
  Context context;
#ifdef EMULATOR_ASAN
  void* fake_stack = nullptr;
  const void* stack = nullptr;  // of the OS thread, learnt at the first switch
  size_t stack_bytes = 0;
#endif
#ifdef EMULATOR_TSAN
  void* fiber = nullptr;
#endif
};

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  Fiber() {
    void* mapped = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped, kGuardBytes, PROT_NONE);  // an overflow faults
    stack_ = static_cast<char*>(mapped) + kGuardBytes;
  }
  ~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next enter() begin at `entry`, which must end with leave(home, true).
  void prepare(void (*entry)()) {
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(stack_, kStackBytes);  // the last user never returned from its frames
#endif
#ifdef EMULATOR_TSAN
    // New pages: what the last user of this stack did is forgotten.
    mmap(stack_, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    fiber_ = __tsan_create_fiber(0);
#endif
#ifdef EMULATOR_SWAPCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes - kTopBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // What switch_context() pops: six registers, the address it returns to, and there a return address of nobody.
    auto* top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes - kTopBytes) - 2;
    static_assert((kStackBytes - kTopBytes) % 16 == 0, "a function begins 8 bytes below a multiple of 16");
    *--top = 0;
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    context_ = top;
#endif
  }

  // Scheduler to fiber.
  EMULATOR_UNSEEN void enter(Home& home) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&home.fake_stack, stack_, kStackBytes);
#endif
#ifdef EMULATOR_TSAN
    home.fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber_, kNoOrder);
#endif
#ifdef EMULATOR_OWN_EXCEPTIONS
    abi::exceptions = reinterpret_cast<abi::__cxa_eh_globals*>(stack_ + kStackBytes - kTopBytes);
#endif
    switch_context(home.context, context_);
#ifdef EMULATOR_OWN_EXCEPTIONS
    abi::exceptions = &abi::exceptions_of_scheduler;
#endif
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);
#endif
  }

  // To be called first in `entry`.
  EMULATOR_UNSEEN static void arrive(Home& home) {
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &home.stack, &home.stack_bytes);
#endif
    (void)home;
  }

  // Fiber to scheduler; returns at the next enter(), unless `for_good`.
  EMULATOR_UNSEEN void leave(Home& home, bool for_good) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, home.stack, home.stack_bytes);
#endif
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(home.fiber, kNoOrder);
#endif
    (void)for_good;
    switch_context(context_, home.context);
#ifdef EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &home.stack, &home.stack_bytes);
#endif
  }

  // What Traces keeps.
#ifdef EMULATOR_TSAN
  void* trace() { return fiber_; }
#else
  void* trace() { return nullptr; }
#endif

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kTopBytes = 16;  // above the stack: the fiber's list of exceptions, zeros in new pages
#ifdef EMULATOR_TSAN
  static constexpr unsigned kNoOrder = 1;  // __tsan_switch_to_fiber_no_sync
  void* fiber_ = nullptr;
#endif
#ifdef EMULATOR_ASAN
  void* fake_stack_ = nullptr;
#endif
  char* stack_;
  Context context_;
};

}  // namespace emulator
