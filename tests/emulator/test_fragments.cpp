// Which lane holds which element, against the layouts that the PTX ISA documents.
//
// The maps below are the formulae of the PTX ISA 8.5, chapter "Warp Level Matrix Multiply-Accumulate Instructions", in
// its names: %laneid gives groupID = %laneid >> 2 and threadID_in_group = %laneid % 4, and fragment element a_i lies at
// (row, col). They are written from the documentation and not from instructions.h, which loops the other way round.
#include <algorithm>
#include <random>
#include <vector>

// clang-format off
#include "emulator.h"
#include "device.h"
// clang-format on
#include "check.h"
#include "core/cuda/ptx.cuh"

namespace {

using namespace dnl;

struct Position {
  int row, col;
};

// Figures "MMA .m16n8k16 fragment layout for matrix A / B / C / D with .f16 / .bf16 types".
struct M16N8K16 {
  static constexpr int kInner = 16, kA = 8, kB = 4;  // elements of a lane, two to a register
  static Position a(int lane, int i) {
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group_id : group_id + 8;
    const int col = i < 4 ? (thread_in_group * 2) + (i & 1) : (thread_in_group * 2) + (i & 1) + 8;
    return {row, col};
  }
  static Position b(int lane, int i) {
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    const int row = i < 2 ? (thread_in_group * 2) + (i & 1) : (thread_in_group * 2) + (i & 1) + 8;
    return {row, group_id};
  }
};

// Figures "MMA .m16n8k8 fragment layout for matrix A / B with .tf32 type".
struct M16N8K8 {
  static constexpr int kInner = 8, kA = 4, kB = 2;  // one to a register
  static Position a(int lane, int i) {
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    const int row = i == 0 || i == 2 ? group_id : group_id + 8;
    const int col = i == 0 || i == 1 ? thread_in_group : thread_in_group + 4;
    return {row, col};
  }
  static Position b(int lane, int i) {
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    return {i == 0 ? thread_in_group : thread_in_group + 4, group_id};
  }
};

// "Accumulators (C or D)" of both.
Position accumulator(int lane, int i) {
  const int group_id = lane >> 2, thread_in_group = lane % 4;
  return {i < 2 ? group_id : group_id + 8, (thread_in_group * 2) + (i & 1)};
}

template <class T>
void set_element(uint32_t* registers, int i, float value) {
  if constexpr (kHalf<T>)
    registers[i / 2] |= uint32_t(rounded<T>(value).bits) << (i % 2 ? 16 : 0);
  else
    registers[i] = to_tf32(value);
}

template <class T>
__global__ void product_kernel(const uint32_t* a, const uint32_t* b, float* d) {  // (32 lanes, registers)
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_d[4];
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i], fragment_d[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
  if constexpr (kHalf<T>)
    mma_m16n8k16<T>(fragment_d, fragment_a, fragment_b);
  else
    mma_m16n8k8_tf32(fragment_d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = fragment_d[i];
}

// Small integers, so that every type and every order of summation is exact.
template <class T, class Layout>
void test_product(const char* name) {
  constexpr int kRows = 16, kColumns = 8, kLanes = 32, K = Layout::kInner;
  std::mt19937 generator(7);
  std::uniform_int_distribution<int> digit(-9, 9);
  int a[kRows][K], b[K][kColumns], d[kRows][kColumns];
  for (auto& row : a)
    for (int& x : row) x = digit(generator);
  for (auto& row : b)
    for (int& x : row) x = digit(generator);
  for (auto& row : d)
    for (int& x : row) x = digit(generator);
  std::vector<uint32_t> a_registers(kLanes * 4), b_registers(kLanes * 2);
  std::vector<float> d_registers(kLanes * 4);
  int seen_a = 0, seen_b = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < Layout::kA; ++i, ++seen_a) {
      const Position p = Layout::a(lane, i);
      set_element<T>(&a_registers[lane * 4], i, float(a[p.row][p.col]));
    }
    for (int i = 0; i < Layout::kB; ++i, ++seen_b) {
      const Position p = Layout::b(lane, i);
      set_element<T>(&b_registers[lane * 2], i, float(b[p.row][p.col]));
    }
    for (int i = 0; i < 4; ++i) {
      const Position p = accumulator(lane, i);
      d_registers[lane * 4 + i] = float(d[p.row][p.col]);
    }
  }
  CHECK(seen_a == kRows * K && seen_b == K * kColumns, "%s: every element is placed once", name);
  emulator::Launcher().launch(&product_kernel<T>, LaunchShape{1, kLanes},
                              static_cast<const uint32_t*>(a_registers.data()),
                              static_cast<const uint32_t*>(b_registers.data()), d_registers.data());
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Position p = accumulator(lane, i);
      int want = d[p.row][p.col];
      for (int k = 0; k < K; ++k) want += a[p.row][k] * b[k][p.col];
      const float got = d_registers[lane * 4 + i];
      CHECK(got == float(want), "%s: lane %d, d%d: %g, expected %d", name, lane, i, got, want);
    }
}

// "ldmatrix": thread T of the warp receives from row T / 4 of each matrix the elements 2 (T % 4) and 2 (T % 4) + 1;
// with .trans, from each matrix transposed. Threads 8 m to 8 m + 7 hold the row addresses of matrix m.
template <int kCount, bool kTransposed>
__global__ void load_kernel(uint32_t* out) {  // (32 lanes, kCount)
  DNL_DYNAMIC_SHARED(uint16_t, matrices);     // (4, 8, 8)
  const int lane = threadIdx.x;
  for (int j = 0; j < 8; ++j) matrices[lane * 8 + j] = static_cast<uint16_t>(lane * 8 + j);
  __syncwarp();
  uint32_t result[kCount];
  const uint16_t* row = matrices + lane % (8 * kCount) * 8;
  if constexpr (kCount == 4)
    kTransposed ? ldmatrix_x4_trans(result, row) : ldmatrix_x4(result, row);
  else
    kTransposed ? ldmatrix_x2_trans(result, row) : ldmatrix_x2(result, row);
  for (int m = 0; m < kCount; ++m) out[lane * kCount + m] = result[m];
}

template <int kCount, bool kTransposed>
void test_load() {
  std::vector<uint32_t> out(32 * kCount);
  emulator::Launcher().launch(&load_kernel<kCount, kTransposed>, LaunchShape{1, 32, 4 * 64 * 2}, out.data());
  for (int thread = 0; thread < 32; ++thread)
    for (int m = 0; m < kCount; ++m)
      for (int e = 0; e < 2; ++e) {
        const int row = thread / 4, column = 2 * (thread % 4) + e;
        const int want = m * 64 + (kTransposed ? column * 8 + row : row * 8 + column);
        const int got = out[thread * kCount + m] >> 16 * e & 0xffff;
        CHECK(got == want, "ldmatrix x%d: thread %d, matrix %d: %d, expected %d", kCount, thread, m, got, want);
      }
}

void test_rounding() {
  CHECK(to_tf32(1.0f) == 0x3f800000u, "1 is a TF32 value");
  CHECK(to_tf32(__uint_as_float(0x3f800fff)) == 0x3f800000u, "below the tie");
  CHECK(to_tf32(__uint_as_float(0x3f801000)) == 0x3f802000u, "ties go away from zero");
  CHECK(to_tf32(__uint_as_float(0xbf801000)) == 0xbf802000u, "ties go away from zero, below it too");
  CHECK(to_tf32(INFINITY) == 0x7f800000u, "infinity");
  CHECK((to_tf32(NAN) & 0x7fffffffu) > 0x7f800000u, "not a number");
  CHECK(exp2_approx(3) == 8 && exp2_approx(-INFINITY) == 0 && exp2_approx(-126) > 0 && exp2_approx(-127) == 0,
        "results that are not normal are 0");
  const auto [lo, hi] = unpack2<__nv_bfloat16>(pack2<__nv_bfloat16>(1.5f, -3));
  CHECK(lo == 1.5f && hi == -3, "bfloat16 pairs");
  CHECK(pack2<__half>(1, 2) == 0x40003c00u, "the first of a pair is in the low half");
}

}  // namespace

int main() {
  test_product<__nv_bfloat16, M16N8K16>("bf16");
  test_product<__half, M16N8K16>("f16");
  test_product<float, M16N8K8>("tf32");
  test_load<4, false>();
  test_load<4, true>();
  test_load<2, false>();
  test_load<2, true>();
  test_rounding();
  return report();
}
