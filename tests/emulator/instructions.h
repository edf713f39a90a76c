// The instructions behind csrc/core/cuda/ptx.cuh: ldmatrix, mma.sync, cp.async. Which lane holds which element is
// written here as loops over the matrices; tests/emulator/test_fragments.cpp holds it against the tables of PTX's
// documentation.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "scalars.h"

namespace emulator {

// The bytes at `address` must lie in the block's dynamic shared memory, and be aligned.
inline void check_shared(const char* what, const void* address, int64_t bytes, int64_t alignment, const Site& site) {
  const Unseen unseen;
  const Machine& self = machine();
  const char* begin = static_cast<const char*>(address);
  const int64_t offset = begin - self.shared_begin();
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    self.fail(text(what, ": byte ", offset, " of shared memory is not a multiple of ", alignment), site);
  if (!self.shared_begin() || offset < 0 || offset + bytes > self.shared_bytes())
    self.fail(text(what, ": bytes ", offset, " to ", offset + bytes - 1, " are not in the block's ",
                   self.shared_bytes(), " bytes of dynamic shared memory"),
              site);
}

// ---------------------------------------------------------------------------------------------------------------------
// ldmatrix: 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kMatrix = 8;  // rows and columns

struct LoadMatrix {
  uint16_t row[kMatrix] = {};  // the one whose address this lane gave
  const void* address = nullptr;
  uint32_t result[4] = {};
};

template <int kCount, bool kTransposed>
void load_matrices(LoadMatrix* const (&lanes)[kWarpLanes]) {
  for (int m = 0; m < kCount; ++m) {
    // Eight rows of 16 bytes fill all 32 banks once, if they lie in different 16-byte groups.
    unsigned groups = 0;
    for (int r = 0; r < kMatrix; ++r) {
      const unsigned group = 1u << reinterpret_cast<uintptr_t>(lanes[m * kMatrix + r]->address) / 16 % 8;
      if (groups & group) ++machine().statistics.matrix_conflicts;
      groups |= group;
    }
    ++machine().statistics.matrix_rows;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      uint32_t pair = 0;
      for (int half = 0; half < 2; ++half) {
        const int i = lane / 4, j = lane % 4 * 2 + half;
        const uint32_t element = kTransposed ? lanes[m * kMatrix + j]->row[i] : lanes[m * kMatrix + i]->row[j];
        pair |= element << 16 * half;
      }
      lanes[lane]->result[m] = pair;
    }
  }
}

template <int kCount, bool kTransposed>
void ldmatrix(uint32_t (&result)[kCount], const void* address, const Site& site) {
  LoadMatrix argument;
  if (machine().lane() < kMatrix * kCount) {
    check_shared("ldmatrix", address, sizeof(argument.row), 16, site);
    argument.address = address;
    // Read by the lane that named it, where the sanitizers see it.
    const auto* row = static_cast<const uint16_t*>(address);
    for (int j = 0; j < kMatrix; ++j) argument.row[j] = row[j];
  }
  machine().meet("ldmatrix", kEveryLane, argument, &load_matrices<kCount, kTransposed>, site);
  for (int m = 0; m < kCount; ++m) result[m] = argument.result[m];
}

// ---------------------------------------------------------------------------------------------------------------------
// mma.sync: d += a b for a (16, K), b (K, 8), d (16, 8). A register holds two 16-bit elements or one of TF32.
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
constexpr int kPerRegister = 2;
template <>
constexpr int kPerRegister<float> = 1;

template <class T>
float element_of(uint32_t bits, int which) {
  const auto half = static_cast<uint16_t>(bits >> 16 * which);
  if constexpr (std::is_same_v<T, float>)
    return __uint_as_float(bits & ~0x1fffu);  // TF32: the tensor core does not see the last 13 bits
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float({half});
  else
    return __bfloat162float({half});
}

struct Multiply {
  const uint32_t *a, *b;
  float* d;
};

// K = 4 registers of a quad of lanes side by side, twice: 16 for 16-bit types, 8 for TF32.
template <class T>
void multiply(Multiply* const (&lanes)[kWarpLanes]) {
  constexpr int kRows = 16, kColumns = 8, kInner = 8 * kPerRegister<T>, kSpan = 4 * kPerRegister<T>;
  float a[kRows][kInner], b[kColumns][kInner];
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int e = 0; e < kPerRegister<T>; ++e) {
      const int k = member * kPerRegister<T> + e;
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][k + r / 2 * kSpan] = element_of<T>(lanes[lane]->a[r], e);
      for (int r = 0; r < 2; ++r) b[group][k + r * kSpan] = element_of<T>(lanes[lane]->b[r], e);
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane)
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      float sum = lanes[lane]->d[r];
      for (int k = 0; k < kInner; ++k) sum += a[row][k] * b[column][k];
      lanes[lane]->d[r] = sum;
    }
}

template <class T>
void mma(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
  Multiply argument{a, b, d};
  machine().meet(name, kEveryLane, argument, &multiply<T>, site);
}

// To 10 bits of fraction, ties away from zero.
inline uint32_t to_tf32(float x) {
  if (x != x) return 0x7fffffff;
  return (__float_as_uint(x) + 0x1000u) & ~0x1fffu;  // infinity stays: its fraction is 0
}

inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0 : y;
}

inline void named_barrier(int id, int threads, const Site& site) {
  if (id < 1 || threads < 1) machine().fail(text("named_barrier(", id, ", ", threads, ")"), site);
  machine().barrier(id, static_cast<unsigned>(threads), site);
}

// ---------------------------------------------------------------------------------------------------------------------
// cp.async: the worst case that the rules allow. The destination is NaN from the moment of the copy until the wait that
// covers it; only then is the source read.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kCopyBytes = 16;

inline void cp_async(void* to, const void* from, bool valid, const Site& site) {
  check_shared("cp.async", to, kCopyBytes, kCopyBytes, site);
  if (reinterpret_cast<uintptr_t>(from) % kCopyBytes)
    machine().fail("cp.async: the global address is not a multiple of 16", site);
  auto* words = static_cast<uint32_t*>(to);
  for (int i = 0; i < 4; ++i) words[i] = 0xffffffffu;
  const Unseen unseen;
  machine().current().copies.push_back({to, from, valid});
}

inline void cp_async_commit() {
  const Unseen unseen;
  Thread& thread = machine().current();
  size_t committed = 0;
  for (size_t group : thread.groups) committed += group;
  thread.groups.push_back(thread.copies.size() - committed);
}

// Waits until at most `left` of the calling thread's groups have not landed.
inline void cp_async_wait(size_t left) {
  std::vector<Copy> landing;
  {
    const Unseen unseen;
    Thread& thread = machine().current();
    size_t count = 0;
    while (thread.groups.size() > left) {
      count += thread.groups.front();
      thread.groups.erase(thread.groups.begin());
    }
    landing.assign(thread.copies.begin(), thread.copies.begin() + count);
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
  }
  for (const Copy& copy : landing) {
    const auto* from = static_cast<const uint32_t*>(copy.from);
    auto* to = static_cast<uint32_t*>(copy.to);
    for (int i = 0; i < 4; ++i) to[i] = copy.valid ? from[i] : 0;
  }
}

}  // namespace emulator
