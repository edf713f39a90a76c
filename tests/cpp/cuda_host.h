// CUDA kernels on a host compiler, for tests: the real kernel sources, one fiber per CUDA thread, one block at a time.
//
// Include it before any .cuh. It defines the names of CUDA that csrc/core/cuda/device.cuh allows a kernel to use:
// thread and block indices, static shared memory, __syncthreads, full-warp __shfl_xor_sync, bfloat16 and float16.
// Threads of a block run in a chosen order between barriers, so a missing barrier shows as a wrong value in one order
// or the other. Shared memory keeps what the last block left there. A block that cannot go on names its state and
// aborts.
#pragma once

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static thread_local

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit types
// ---------------------------------------------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? __builtin_nanf("") : sign * __builtin_inff();
  return sign * (exponent ? __builtin_ldexpf(1024 + fraction, exponent - 25) : __builtin_ldexpf(fraction, -24));
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7fff};
  const float size = __builtin_fabsf(x);
  if (size == 0) return {sign};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  __builtin_frexpf(size, &exponent);  // size = m 2^exponent, m in [0.5, 1)
  exponent = exponent < -13 ? -13 : exponent;
  // In units of the last place; rounding up to 2048 carries into the exponent by itself.
  const long units = __builtin_lrintf(__builtin_ldexpf(size, 11 - exponent));
  return {static_cast<uint16_t>(sign | (units + (exponent + 13 > 0 ? (exponent + 13) * 1024L : 0)))};
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads of a block
// ---------------------------------------------------------------------------------------------------------------------

namespace cuda_host {

struct Index {
  unsigned x;
};

enum class State { ready, at_barrier, in_shuffle, done };

struct Fiber {
  State state;
  ucontext_t context;
  jmp_buf point;
  bool started;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  unsigned arrived, phase;
  char slots[2][32][16];  // two sets in turn: a fast lane's next shuffle must not overwrite what a slow one still reads
};

enum class Order { ascending, descending };

struct Machine {
  static constexpr size_t kStack = 64 << 10;
  Order order = Order::ascending;
  unsigned max_blocks = 1u << 30;  // a smaller grid makes blocks take several tasks

  unsigned block = 0, blocks = 0, threads = 0, current = 0, alive = 0, waiting = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::function<void()> body;
  ucontext_t main_context;
  jmp_buf main_point;

  void launch(unsigned grid, unsigned count, std::function<void()> kernel) {
    body = std::move(kernel);
    blocks = grid;
    threads = count;
    if (fibers.size() < threads) fibers.resize(threads);
    for (block = 0; block < blocks; ++block) run_block();
  }

  void run_block() {
    alive = threads;
    waiting = 0;
    warps.assign((threads + 31) / 32, Warp{});
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      fiber.state = State::ready;
      fiber.started = false;
    }
    // A warp runs as far as it can before the next one gets its turn: it meets what slow warps have not yet done.
    for (bool moved = true; moved;) {
      moved = false;
      for (unsigned t = 0; t < threads; ++t) {
        current = order == Order::ascending ? t : threads - 1 - t;
        if (fibers[current].state == State::ready) {
          moved = true;
          resume();
        }
        if (t % 32 == 31 && warp_is_ready(t)) t -= 32;
      }
    }
    if (alive) {
      std::printf("block %u cannot go on: %u threads left, %u of them at a barrier\n", block, alive, waiting);
      std::abort();
    }
  }

  // Whether a thread of the warp of the t-th thread, in the chosen order, can go on.
  bool warp_is_ready(unsigned t) const {
    const unsigned warp = (order == Order::ascending ? t : threads - 1 - t) / 32 * 32;
    for (unsigned l = 0; l < 32; ++l)
      if (fibers[warp + l].state == State::ready) return true;
    return false;
  }

  void resume() {
    Fiber& fiber = fibers[current];
    if (_setjmp(main_point)) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::entry, 0);
    swapcontext(&main_context, &fiber.context);
  }

  void pause() {
    if (!_setjmp(fibers[current].point)) _longjmp(main_point, 1);
  }

  static void entry();

  void barrier() {
    if (++waiting < alive) {
      fibers[current].state = State::at_barrier;
      return pause();
    }
    release_barrier();
  }

  void release_barrier() {
    waiting = 0;
    for (Fiber& fiber : fibers)
      if (fiber.state == State::at_barrier) fiber.state = State::ready;
  }

  void finish() {
    fibers[current].state = State::done;
    if (--alive && waiting == alive) release_barrier();
    _longjmp(main_point, 1);
  }

  template <class T>
  T shuffle(T value, int mask) {
    static_assert(sizeof(T) <= 16, "a slot holds one value");
    const unsigned lane = current % 32;
    Warp& warp = warps[current / 32];
    const unsigned phase = warp.phase & 1;
    std::memcpy(warp.slots[phase][lane], &value, sizeof(T));
    if (++warp.arrived < 32) {
      fibers[current].state = State::in_shuffle;
      pause();
    } else {
      warp.arrived = 0;
      ++warp.phase;
      for (unsigned l = 0; l < 32; ++l) {
        Fiber& fiber = fibers[current / 32 * 32 + l];
        if (fiber.state == State::in_shuffle) fiber.state = State::ready;
      }
    }
    std::memcpy(&value, warp.slots[phase][lane ^ mask], sizeof(T));
    return value;
  }
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void Machine::entry() {
  machine().body();
  machine().finish();
}

}  // namespace cuda_host

#define threadIdx (::cuda_host::Index{::cuda_host::machine().current})
#define blockIdx (::cuda_host::Index{::cuda_host::machine().block})
#define gridDim (::cuda_host::Index{::cuda_host::machine().blocks})

inline void __syncthreads() { cuda_host::machine().barrier(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::machine().shuffle(value, mask);
}
