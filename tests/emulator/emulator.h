// CUDA kernels on a CPU: include this before any .cuh of the project. See README.md beside it.
//
// It defines the names of CUDA that kernels use, for one-dimensional blocks and grids.
#pragma once

#include <cmath>

#include "instructions.h"
#include "machine.h"
#include "scalars.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__
#ifdef __clang__
#define __shared__ static __attribute__((section("emulated_shared")))
#else
#define __shared__ static
#endif

namespace emulator {

struct Index {
  unsigned x;
};

}  // namespace emulator

#define threadIdx (::emulator::Index{::emulator::machine().thread_index()})
#define blockIdx (::emulator::Index{::emulator::machine().block_index()})
#define blockDim (::emulator::Index{::emulator::machine().threads()})
#define gridDim (::emulator::Index{::emulator::machine().block_count()})

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::machine().barrier(0, 0, site); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Atomics are relaxed, as CUDA's are.
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline float atomicAdd(float* address, float value) {
  auto* bits = reinterpret_cast<uint32_t*>(address);
  uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + value), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return __uint_as_float(old);
}
inline int atomicMax(int* address, int value) {
  int old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
