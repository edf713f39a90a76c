// Hopper's instructions: layouts against tables written from the PTX ISA and the CUDA programming guide, and kernels in
// pairs (sm90_twins.h).
#include <cmath>
#include <limits>
#include <random>

// clang-format off
#include "sm90_twins.h"
#include "twin_test.h"
// clang-format on

namespace {

using namespace dnl;
using namespace twins;

// CUDA C++ programming guide, "Swizzle modes", CU_TENSOR_MAP_SWIZZLE_128B: for each 128-byte row of the pattern, which
// 16-byte chunk of the row lies in each of its eight places.
constexpr int kChunkAt[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
                                {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                                {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};

// Byte offset of 16-bit element `column` of 128-byte row `row`, by that table.
int placed(int row, int column) {
  const int chunk = column / 8;
  for (int place = 0; place < 8; ++place)
    if (kChunkAt[row % 8][place] == chunk) return row * 128 + place * 16 + column % 8 * 2;
  return -1;
}

// PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": row and column of d_i in thread t of the warpgroup.
struct Position {
  int row, column;
};
Position accumulator(int t, int i) {
  static const Position within[4] = {{0, 0}, {0, 1}, {8, 0}, {8, 1}};  // of d0 to d3
  const int warp = t / 32, group_id = t % 32 >> 2, thread_in_group = t % 4;
  return {16 * warp + group_id + within[i % 4].row, 8 * (i / 4) + 2 * thread_in_group + within[i % 4].column};
}
// And of a_i, eight of them, two to a register.
Position left_operand(int t, int i) {
  static const Position within[8] = {{0, 0}, {0, 1}, {8, 0}, {8, 1}, {0, 8}, {0, 9}, {8, 8}, {8, 9}};
  const int warp = t / 32, group_id = t % 32 >> 2, thread_in_group = t % 4;
  return {16 * warp + group_id + within[i].row, 2 * thread_in_group + within[i].column};
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kInner = 64;
constexpr int kGroups = kInner / 8;  // of eight 128-byte rows, where k runs over the rows
constexpr int kStride = 2048;        // from one group of eight rows to the next: apart, so that a wrong stride shows

// Bytes of an operand of `count` elements along m or n.
constexpr int image_bytes(int count, Along along) {
  return along == Along::k ? count / 8 * kStride : (count + 63) / 64 * kGroups * kStride;
}

// d (128 threads, N / 2) = a b for operands whose image is copied to shared memory as it is.
template <class T, int N, Along kA, Along kB, bool kRegisters>
__global__ void product_kernel(float* d, const uint16_t* a_image, const uint16_t* b_image,
                               const uint32_t* a_registers) {  // (128 threads, slices, 4)
  constexpr int kA_bytes = image_bytes(64, kA), kB_bytes = image_bytes(N, kB);
  DNL_DYNAMIC_SHARED_TILES(unsigned char, shared);
  auto *a = reinterpret_cast<uint16_t*>(shared), *b = reinterpret_cast<uint16_t*>(shared + kA_bytes);
  for (int i = threadIdx.x; i < kA_bytes / 2; i += kWarpgroup) a[i] = a_image[i];
  for (int i = threadIdx.x; i < kB_bytes / 2; i += kWarpgroup) b[i] = b_image[i];
  fence_async_proxy();
  __syncthreads();
  float sums[N / 2];
  uint32_t fragment[kInner / 16][4];
  wgmma_fence();
  for (int slice = 0; slice < kInner / 16; ++slice) {
    // 16 k: 32 bytes along a row, or two groups of rows.
    const auto descriptor = [&](const unsigned char* image, Along along) {
      return along == Along::k ? wgmma_descriptor(image + slice * 32, 0, kStride)
                               : wgmma_descriptor(image + slice * 2 * kStride, kGroups * kStride, kStride);
    };
    const uint64_t b_operand = descriptor(shared + kA_bytes, kB);
    if constexpr (kRegisters) {
      for (int r = 0; r < 4; ++r) fragment[slice][r] = a_registers[(threadIdx.x * (kInner / 16) + slice) * 4 + r];
      wgmma<T, N, kB>(sums, fragment[slice], b_operand, slice > 0);
    } else {
      wgmma<T, N, kA, kB>(sums, descriptor(shared, kA), b_operand, slice > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) d[threadIdx.x * N / 2 + i] = sums[i];
}

// The bytes of an operand (count, kInner) in shared memory. Along k: 128-byte rows of 64 k. Otherwise blocks of 64
// elements, each with a row for every k.
std::vector<uint16_t> image_of(const std::vector<uint16_t>& matrix, int count, Along along) {
  std::vector<uint16_t> image(image_bytes(count, along) / 2);
  const auto offset_of = [](int row, int column) {  // of rows in groups of eight
    return row / 8 * kStride + placed(row % 8, column);
  };
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < kInner; ++k) {
      const int offset = along == Along::k ? offset_of(i, k) : i / 64 * kGroups * kStride + offset_of(k, i % 64);
      image[offset / 2] = matrix[i * kInner + k];
    }
  return image;
}

template <class T, int N, Along kA, Along kB, bool kRegisters>
void test_product() {
  std::mt19937 generator(3);
  std::uniform_int_distribution<int> digit(-9, 9);
  const auto random = [&](int count) {
    std::vector<uint16_t> matrix(count * kInner);
    for (uint16_t& x : matrix) x = rounded<T>(float(digit(generator))).bits;
    return matrix;
  };
  const auto a = random(64), b = random(N);
  std::vector<uint32_t> registers(kWarpgroup * (kInner / 16) * 4);
  for (int t = 0; t < kWarpgroup; ++t)
    for (int slice = 0; slice < kInner / 16; ++slice)
      for (int i = 0; i < 8; ++i) {
        const Position p = left_operand(t, i);
        registers[(t * (kInner / 16) + slice) * 4 + i / 2] |= uint32_t(a[p.row * kInner + slice * 16 + p.column])
                                                              << 16 * (i % 2);
      }
  const auto a_image = image_of(a, 64, kA), b_image = image_of(b, N, kB);
  std::vector<float> d(kWarpgroup * N / 2, std::numeric_limits<float>::quiet_NaN());
  emulator::Launcher().launch(&product_kernel<T, N, kA, kB, kRegisters>,
                              LaunchShape{1, kWarpgroup, image_bytes(64, kA) + image_bytes(N, kB)}, d.data(),
                              a_image.data(), b_image.data(), static_cast<const uint32_t*>(registers.data()));
  const auto value = [](uint16_t bits) { return wide(T{bits}); };
  int wrong = 0;
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < N / 2; ++i) {
      const Position p = accumulator(t, i);
      float want = 0;
      for (int k = 0; k < kInner; ++k) want += value(a[p.row * kInner + k]) * value(b[p.column * kInner + k]);
      wrong += d[t * N / 2 + i] != want;
    }
  CHECK(wrong == 0, "%d of %d results, N %d, a along %d, b along %d, registers %d", wrong, 64 * N, N, int(kA), int(kB),
        kRegisters);
}

template <class T>
void test_products() {
  test_product<T, 64, Along::k, Along::k, false>();
  test_product<T, 64, Along::mn, Along::k, false>();
  test_product<T, 64, Along::k, Along::mn, false>();
  test_product<T, 32, Along::k, Along::k, false>();
  test_product<T, 128, Along::mn, Along::mn, false>();
  test_product<T, 128, Along::k, Along::mn, true>();
  test_product<T, 256, Along::k, Along::k, true>();
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA
// ---------------------------------------------------------------------------------------------------------------------

// The bytes that a load leaves in shared memory.
template <int>
__global__ void load_kernel(uint16_t* out, const __grid_constant__ TensorMap map, int batch, int row, int column) {
  DNL_DYNAMIC_SHARED_TILES(unsigned char, shared);
  auto* barrier = reinterpret_cast<uint64_t*>(shared + kTileBytes);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 16 * 64 * 2);
    tma_load_3d(shared, map, column, row, batch, barrier);
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 16 * 64; i += kWarp) out[i] = reinterpret_cast<uint16_t*>(shared)[i];
}

void test_load() {
  constexpr int kBatches = 3, kRows = 19, kColumns = 70, kPitch = 72, kBatch = 20 * kPitch;
  alignas(16) static uint16_t data[(kBatches - 1) * kBatch + (kRows - 1) * kPitch + kColumns];  // to the last element
  for (int i = 0; i < int(sizeof(data) / 2); ++i) data[i] = uint16_t(i + 1);
  const int firsts[][3] = {{0, 0, 0},  {1, 8, 3},   {2, -5, -9}, {2, 12, 40},
                           {1, 30, 0}, {0, 0, 100}, {3, 0, 0},   {-1, 0, 0}};
  for (bool swizzle : {true, false}) {
    const auto map =
        emulator::TensorMap::make(data, 2, kBatches, kRows, kColumns, kBatch * 2, kPitch * 2, 16, 64, swizzle);
    for (const auto& first : firsts) {
      std::vector<uint16_t> out(16 * 64);
      emulator::Launcher().launch(&load_kernel<0>, LaunchShape{1, kWarp, kTileBytes + 8}, out.data(), map, first[0],
                                  first[1], first[2]);
      int wrong = 0;
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 64; ++c) {
          const int batch = first[0], row = first[1] + r, column = first[2] + c;
          const bool inside =
              batch >= 0 && batch < kBatches && row >= 0 && row < kRows && column >= 0 && column < kColumns;
          const int offset = swizzle ? placed(r, c) : r * 128 + c * 2;
          wrong += out[offset / 2] != (inside ? data[batch * kBatch + row * kPitch + column] : 0);
        }
      CHECK(wrong == 0, "%d elements of the box at (%d, %d, %d), swizzle %d", wrong, first[0], first[1], first[2],
            swizzle);
    }
  }
  const auto error = [](int64_t pitch, int box_columns, bool swizzle, int64_t batch = 4096) {
    return error_of([=] {
      return emulator::TensorMap::make(data, 2, kBatches, kRows, 64, batch, pitch, 16, box_columns, swizzle).swizzle;
    });
  };
  CHECK(error(128, 64, true) == "no error", "a good one");
  CHECK(has(error(140, 64, true), "rows are 140 bytes apart"), "pitch");
  CHECK(has(error(112, 64, true), "rows overlap"), "pitch of less than a row");
  CHECK(has(error(128, 64, true, 4104), "matrices are 4104 bytes apart"), "stride of the batch");
  CHECK(has(error(128, 64, true, 0), "a batch without a stride"), "stride of the batch");
  CHECK(has(error(128, 32, true), "a swizzled box has 128 bytes a row, not 64"), "box");
  CHECK(has(error(128, 12, false), "a box of 24 bytes a row"), "box of partial chunks");
}

void test_the_rest() {
  test_products<__nv_bfloat16>();
  test_products<__half>();
  test_load();
}

// ---------------------------------------------------------------------------------------------------------------------
// Pairs of kernels
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kTiles = 4, kRows = kTiles * kTile;

// Q and K, (kRows, kTile) of small integers.
struct Inputs {
  std::vector<Element> q{kRows * kTile}, k{kRows * kTile};
  TensorMap q_map, k_map;

  Inputs() {
    for (int i = 0; i < kRows * kTile; ++i) {
      q[i] = rounded<Element>(float(i * 7 % 11 - 5));
      k[i] = rounded<Element>(float(i * 5 % 13 - 6));
    }
    q_map = TensorMap::make(q.data(), 2, 1, kRows, kTile, 0, kTile * 2, kTile, kTile, true);
    k_map = TensorMap::make(k.data(), 2, 1, kRows, kTile, 0, kTile * 2, kTile, kTile, true);
  }
  // Of rows i of Q and j of K.
  float dot(int i, int j) const {
    float sum = 0;
    for (int c = 0; c < kTile; ++c) sum += wide(q[i * kTile + c]) * wide(k[j * kTile + c]);
    return sum;
  }
};
const Inputs& inputs() {
  static const Inputs instance;
  return instance;
}

using Kernel = void (*)(float*, TensorMap, TensorMap, int);

std::function<bool()> tile_of(Kernel kernel, int threads, int argument, std::function<float(int, int)> want) {
  return [=] {
    std::vector<float> out(kTile * kTile, std::numeric_limits<float>::quiet_NaN());
    emulator::Launcher().launch(kernel, LaunchShape{1, threads, 4 * kTileBytes + 64}, out.data(), inputs().q_map,
                                inputs().k_map, argument);
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j)
        if (!(out[i * kTile + j] == want(i, j))) return false;
    return true;
  };
}

template <Fault kFault>
std::function<bool()> one(int threads = kWarpgroup) {
  constexpr int kFirst = 224;  // half of the tile lies beyond the matrix, and is 0
  return tile_of(&one_tile<kFault>, threads, kFirst,
                 [](int i, int j) { return kFirst + j < kRows ? inputs().dot(i, kFirst + j) : 0; });
}

// Q K^T of the first tiles, copied to shared memory by the threads.
template <bool kFenced, bool kOverwritten = false>
std::function<bool()> written() {
  return [] {
    std::vector<float> out(kTile * kTile, std::numeric_limits<float>::quiet_NaN());
    emulator::Launcher().launch(&written_tiles<kFenced, kOverwritten>, LaunchShape{1, kWarpgroup, 2 * kTileBytes},
                                out.data(), inputs().q.data(), inputs().k.data());
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j)
        if (!(out[i * kTile + j] == inputs().dot(i, j))) return false;
    return true;
  };
}

template <RegisterFault kFault>
std::function<bool()> handed() {
  return [] {
    std::vector<int> out(3 * kWarpgroup);
    emulator::Launcher().launch(&hand_registers<kFault>, LaunchShape{1, 3 * kWarpgroup, 16}, out.data());
    return std::count(out.begin(), out.end(), 1) == 3 * kWarpgroup;
  };
}

template <PipelineFault kFault>
std::function<bool()> piped() {
  return tile_of(&pipeline<kFault>, kWarpgroup + kWarp, kTiles, [](int i, int j) {
    float sum = 0;
    for (int t = 0; t < kTiles; ++t) sum += inputs().dot(t * kTile + i, t * kTile + j);
    return sum;
  });
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Twin> list = {
      {"no wait for the load", one<kNone>(), one<kNoLoadWait>(), By::values_or_race},
      {"wrong parity", one<kNone>(), one<kWrongParity>(), By::values_or_race},
      {"too many bytes", one<kNone>(), one<kTooManyBytes>(), By::message, "0 of 1 arrivals and 16 bytes are missing"},
      {"no barrier after init", one<kNone>(), one<kNoInitBarrier>(), By::sometimes, "mbarrier: used before its init"},
      {"too many arrivals", one<kNone>(), one<kTooManyArrivals>(), By::message, "one arrival more than the 1"},
      {"load never waited for", one<kNone>(), one<kNeverWaited>(), By::message, "ended with a TMA load under way"},
      {"misaligned tile", one<kNone>(), one<kTileMisaligned>(), By::message, "is not a multiple of 1024"},
      {"overwritten mbarrier", one<kNone>(), one<kBarrierOverwritten>(), By::message, "something else was written"},
      {"no wait for the product", one<kNone>(), one<kNoProductWait>(), By::values},
      {"no commit", one<kNone>(), one<kNoCommit>(), By::message, "ended with a wgmma under way in thread"},
      {"operand overwritten", one<kNone>(), one<kOperandOverwritten>(), By::values_or_race},
      {"other operands", one<kNone>(), one<kOtherOperands>(), By::message, "came with different operands"},
      {"missing warp", one<kNone>(), one<kMissingWarp>(), By::message, "came to different fences, commits or waits"},
      {"a wait of one warp", one<kNone>(), one<kOneWarpWaits>(), By::message, "ended with fewer wgmmas in thread 0"},
      {"operand one row low", one<kNone>(), one<kOneRowLow>(), By::message, "does not begin in the first row"},
      {"no fence before the product", one<kNone>(), one<kNoFence>(), By::message, "no wgmma_fence since"},
      {"left operand overwritten", written<true>(), written<true, true>(), By::message, "changed before the wait"},
      {"no fence of the proxy", written<true>(), written<false>(), By::message, "without fence.proxy.async"},
      {"part of a warpgroup", one<kNone>(), one<kNone>(96), By::message, "the warpgroup is not whole"},
      {"stage not emptied", piped<kRight>(), piped<kNotEmptied>(), By::sometimes, "mbarrier"},
      {"stage released early", piped<kRight>(), piped<kReleasedEarly>(), By::values_or_race},
      {"stale stage", piped<kRight>(), piped<kReadStale>(), By::sometimes, "cannot go on"},
      {"registers of three warps", handed<kHanded>(), handed<kThreeWarps>(), By::message, "ended with 168 registers"},
      {"registers that nobody gave", handed<kHanded>(), handed<kNobodyGave>(), By::message, "threads ask for 82944"},
      {"fewer registers by the wrong name", handed<kHanded>(), handed<kWrongWay>(), By::message, "are not more than"},
  };
  return test_twins(list, argc, argv, &test_the_rest);
}
