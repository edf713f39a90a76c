// Kernels in pairs, as in twins.h, for Hopper's instructions: S = Q K^T of bfloat16, in tiles of 64 x 64, with 64 k.
#pragma once

// clang-format off
#include "emulator.h"
#include "sm90.h"
#include "device.h"
// clang-format on
#include "core/cuda/ptx_sm90.cuh"

namespace twins {

using namespace dnl;
using Element = __nv_bfloat16;

constexpr int kTile = 64;                                    // rows, columns and k of a tile
constexpr int kTileBytes = kTile * kTile * sizeof(Element);  // 128 bytes a row
constexpr int kPattern = 8 * 128;                            // bytes of the swizzle's pattern
constexpr int kSlices = kTile / 16;                          // wgmmas of a tile
constexpr int kSliceBytes = 16 * sizeof(Element);

// The products of one tile, under way when this returns.
DNL_DEVICE void multiply_tiles(float (&d)[kTile / 2], const unsigned char* q, const unsigned char* k, bool accumulate,
                               bool fenced = true) {
  if (fenced) wgmma_fence();
  for (int slice = 0; slice < kSlices; ++slice)
    wgmma<Element, kTile>(d, wgmma_descriptor(q + slice * kSliceBytes, 0, kPattern),
                          wgmma_descriptor(k + slice * kSliceBytes, 0, kPattern), accumulate || slice > 0);
}

DNL_DEVICE void store_tile(float* out, const float (&d)[kTile / 2]) {  // (kTile, kTile)
  const int t = threadIdx.x % kWarpgroup;
  for (int i = 0; i < kTile / 2; ++i)
    out[(t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)) * kTile + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
}

enum Fault {
  kNone,
  kNoLoadWait,       // reads the tiles before the load has landed
  kWrongParity,      // waits for a phase that counts as complete
  kTooManyBytes,     // announces more than comes
  kNoInitBarrier,    // the other threads may come before the init
  kTooManyArrivals,  // two arrivals where the init says one
  kNeverWaited,      // ends with a load under way
  kTileMisaligned,   // a tile that does not begin with the pattern
  kBarrierOverwritten,
  kNoFence,             // nothing orders the registers of d before the product
  kNoProductWait,       // reads d before the wait
  kNoCommit,            // waits for a group that was never closed
  kOperandOverwritten,  // writes to a tile that a product still reads
  kOtherOperands,       // one warp of the warpgroup brings another tile
  kMissingWarp,         // one does not come
  kOneWarpWaits,        // one waits once more
  kOneRowLow            // an operand that begins in the second row of the pattern
};

// One tile: Q's rows from 0 and K's from `first`, by one warpgroup.
template <Fault kFault>
__global__ void one_tile(float* out,  // (kTile, kTile)
                         const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, int first) {
  DNL_DYNAMIC_SHARED_TILES(unsigned char, shared);  // two tiles and an mbarrier
  unsigned char *q_tile = shared, *k_tile = shared + kTileBytes;
  auto* barrier = reinterpret_cast<uint64_t*>(shared + 2 * kTileBytes);
  if (kFault == kTileMisaligned) k_tile += 128;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  if (kFault != kNoInitBarrier) __syncthreads();
  if (kFault == kBarrierOverwritten && threadIdx.x == 0) *barrier = 1;
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 2 * kTileBytes + (kFault == kTooManyBytes ? 16 : 0));
    if (kFault == kTooManyArrivals) mbarrier_arrive(barrier);
    tma_load_3d(q_tile, q, 0, 0, 0, barrier);
    tma_load_3d(k_tile, k, 0, first, 0, barrier);
  }
  if (kFault == kNeverWaited) return;
  if (kFault != kNoLoadWait) mbarrier_wait(barrier, kFault == kWrongParity ? 1 : 0);
  float d[kTile / 2] = {};
  if (kFault == kOtherOperands && warp == 3) k_tile = q_tile;
  if (kFault == kOneRowLow) k_tile += 128;
  if (kFault != kMissingWarp || warp != 3) multiply_tiles(d, q_tile, k_tile, false, kFault != kNoFence);
  if (kFault != kNoCommit) wgmma_commit();
  if (kFault == kOperandOverwritten) reinterpret_cast<Element*>(k_tile)[threadIdx.x] = rounded<Element>(0);
  if (kFault == kNoProductWait) store_tile(out, d);
  wgmma_wait<0>();
  if (kFault == kOneWarpWaits && warp == 3) wgmma_wait<0>();
  if (kFault != kNoProductWait) store_tile(out, d);
  if (kFault == kNoLoadWait || kFault == kWrongParity) mbarrier_wait(barrier, 0);  // so that nothing is under way
}

// Q K^T of tiles that the threads write themselves, a row of the pattern each. Q goes to the products in registers.
template <bool kFenced, bool kOverwritten>
__global__ void written_tiles(float* out, const Element* q, const Element* k) {  // (kTile, kTile) each
  DNL_DYNAMIC_SHARED_TILES(unsigned char, shared);
  const int tile = threadIdx.x / kTile, row = threadIdx.x % kTile;
  for (int chunk = 0; chunk < kTile / 8; ++chunk)
    for (int e = 0; e < 8; ++e)
      reinterpret_cast<Element*>(shared + tile * kTileBytes + row * 128 + (chunk ^ row % 8) * 16)[e] =
          (tile ? k : q)[row * kTile + chunk * 8 + e];
  if (kFenced) fence_async_proxy();
  __syncthreads();
  float d[kTile / 2] = {};
  uint32_t a[kSlices][4];
  const int first = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4, member = threadIdx.x % 4;
  for (int slice = 0; slice < kSlices; ++slice)
    for (int r = 0; r < 4; ++r)
      std::memcpy(&a[slice][r], q + (first + r % 2 * 8) * kTile + slice * 16 + member * 2 + r / 2 * 8, 4);
  wgmma_fence();
  for (int slice = 0; slice < kSlices; ++slice)
    wgmma<Element, kTile>(d, a[slice], wgmma_descriptor(shared + kTileBytes + slice * kSliceBytes, 16, kPattern), true);
  wgmma_commit();
  if (kOverwritten) a[kSlices - 1][3] ^= 1;
  wgmma_wait<0>();
  store_tile(out, d);
}

enum RegisterFault { kHanded, kThreeWarps, kNobodyGave, kWrongWay };

// Two warpgroups take the registers of a third. Writes 1 for each thread.
template <RegisterFault kFault>
__global__ void hand_registers(int* out) {  // (3 kWarpgroup)
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x < 2 * kWarpgroup) {
    if (kFault == kWrongWay)
      more_registers<24>();
    else if (kFault != kThreeWarps || warp != 7)
      more_registers<240>();
  } else if (kFault != kNobodyGave) {
    fewer_registers<24>();
  }
  out[threadIdx.x] = 1;
}

enum PipelineFault { kRight, kNotEmptied, kReleasedEarly, kReadStale };

// Sum over `tiles` of Q_t K_t^T, through two stages: warp 4 loads, the warpgroup multiplies.
template <PipelineFault kFault>
__global__ void pipeline(float* out,  // (kTile, kTile)
                         const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, int tiles) {
  constexpr int kStages = 2;
  DNL_DYNAMIC_SHARED_TILES(unsigned char, shared);  // two tiles a stage, then mbarriers
  auto* full = reinterpret_cast<uint64_t*>(shared + kStages * 2 * kTileBytes);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], kWarpgroup);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x > kWarpgroup) return;
    for (int t = 0; t < tiles; ++t) {
      const int s = t % kStages, round = t / kStages;
      unsigned char* stage = shared + s * 2 * kTileBytes;
      if (kFault != kNotEmptied) mbarrier_wait(&empty[s], (round & 1) ^ 1);
      mbarrier_arrive_expect(&full[s], 2 * kTileBytes);
      tma_load_3d(stage, q, 0, t * kTile, 0, &full[s]);
      tma_load_3d(stage + kTileBytes, k, 0, t * kTile, 0, &full[s]);
    }
    return;
  }
  float d[kTile / 2] = {};
  for (int t = 0; t < tiles; ++t) {
    const int s = t % kStages, round = t / kStages;
    const unsigned char* stage = shared + s * 2 * kTileBytes;
    mbarrier_wait(&full[s], kFault == kReadStale ? 0 : round & 1);
    multiply_tiles(d, stage, stage + kTileBytes, t > 0);
    wgmma_commit();
    if (kFault == kReleasedEarly) mbarrier_arrive(&empty[s]);
    wgmma_wait<0>();
    if (kFault != kReleasedEarly) mbarrier_arrive(&empty[s]);
  }
  store_tile(out, d);
}

}  // namespace twins
