// Small kernels in pairs: one that is right, and a wrong twin with a single fault. All take (out, in); `in` holds
// in[i] = i. kWrong picks the twin.
#pragma once

// clang-format off
#include "emulator.h"
#include "device.h"
// clang-format on
#include "core/cuda/ptx.cuh"

namespace twins {

using namespace dnl;

constexpr int kBlock = 64;  // threads of most of them
constexpr int kVector = 4;  // floats of one cp.async
constexpr int kTile = kBlock * kVector;
constexpr int kTiles = 4;

// ---------------------------------------------------------------------------------------------------------------------
// Barriers
// ---------------------------------------------------------------------------------------------------------------------

// out: in, each block of it reversed.
template <bool kWrong>
__global__ void missing_barrier(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kBlock)
  const int t = threadIdx.x, first = blockIdx.x * kBlock;
  tile[t] = in[first + t];
  if (!kWrong) __syncthreads();
  out[first + t] = tile[kBlock - 1 - t];
}

// The same through static shared memory.
template <bool kWrong>
__global__ void missing_barrier_static(float* out, const float* in) {
  __shared__ float tile[kBlock];
  const int t = threadIdx.x, first = blockIdx.x * kBlock;
  tile[t] = in[first + t];
  if (!kWrong) __syncthreads();
  out[first + t] = tile[kBlock - 1 - t];
}

// The same, one block for all tiles: the next one must not come before everybody has read this one.
template <bool kWrong>
__global__ void overwritten_early(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kBlock)
  const int t = threadIdx.x;
  for (int first = 0; first < kTiles * kBlock; first += kBlock) {
    tile[t] = in[first + t];
    __syncthreads();
    out[first + t] = tile[kBlock - 1 - t];
    if (!kWrong) __syncthreads();
  }
}

template <bool kWrong>
__global__ void divergent_barrier(float* out, const float* in) {
  const int t = threadIdx.x;
  if (kWrong && t >= kWarp)
    __syncthreads();
  else
    __syncthreads();
  out[t] = in[t];
}

template <bool kWrong>
__global__ void skipped_barrier(float* out, const float* in) {
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i)
    if (!kWrong || i == 0 || t < kWarp) __syncthreads();
  out[t] = in[t];
}

// Pairs of warps exchange at barriers of their own. kFault 1: waits for more warps than come; 2: producer and consumer
// at different barriers; 3: part of a warp; 4: a number that no barrier has; 5: two opinions of how many come.
template <int kFault>
__global__ void named_barriers(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (4 warps)
  const int t = threadIdx.x, pair = t / (2 * kWarp), warp = t / kWarp;
  tile[t] = in[t];
  int id = 1 + pair, threads = 2 * kWarp;
  if (kFault == 1) threads = 3 * kWarp;
  if (kFault == 2) id = 1 + warp;
  if (kFault == 3) threads = 40;
  if (kFault == 4) id = 16;
  if (kFault == 5 && warp % 2) threads = 3 * kWarp;
  named_barrier(id, threads);
  out[t] = tile[t ^ kWarp];
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives of a warp
// ---------------------------------------------------------------------------------------------------------------------

// Every kind of shuffle and vote, over one warp.
__global__ inline void shuffles(float* out, const float* in) {
  const int lane = threadIdx.x;
  const float own = in[lane];
  out[lane] = __shfl_xor_sync(kAllLanes, own, 5);
  out[kWarp + lane] = __shfl_down_sync(kAllLanes, own, 3, 8);
  out[2 * kWarp + lane] = __shfl_up_sync(kAllLanes, own, 3, 8);
  out[3 * kWarp + lane] = __shfl_sync(kAllLanes, own, 9, 8);
  out[4 * kWarp + lane] = float(__ballot_sync(kAllLanes, lane % 8 == 0));
  out[5 * kWarp + lane] = float(__any_sync(kAllLanes, lane == 3) + 2 * __all_sync(kAllLanes, lane == 3));
  out[6 * kWarp + lane] = float(__shfl_xor_sync(kAllLanes, double(own), 31));
}

// kFault 1: half of the lanes do not come; 2: they come to another line; 3: to another collective; 4: a lane that is
// not in its own mask; 5: reads from a lane that takes no part.
template <int kFault>
__global__ void collectives(float* out, const float* in) {
  const int lane = threadIdx.x;
  const bool low = lane < kWarp / 2;
  float x = in[lane];
  if (kFault == 1) {
    if (low) x += __shfl_xor_sync(kAllLanes, x, 1);
  } else if (kFault == 2) {
    if (low)
      x += __shfl_xor_sync(kAllLanes, x, 1);
    else
      x += __shfl_xor_sync(kAllLanes, x, 1);
  } else if (kFault == 3) {
    x += low ? __shfl_xor_sync(kAllLanes, x, 1) : float(__ballot_sync(kAllLanes, 1));
  } else if (kFault == 4) {
    x += __shfl_xor_sync(0x0000ffffu, x, 1);
  } else if (kFault == 5) {
    if (low) x += __shfl_xor_sync(0x0000ffffu, x, 16);
  } else {
    // Two halves at once, each with its mask.
    x += __shfl_xor_sync(low ? 0x0000ffffu : 0xffff0000u, x, 1);
  }
  out[lane] = x;
}

// Neighbouring lanes exchange through memory: a vote brings them together, but orders nothing.
template <bool kWrong>
__global__ void missing_syncwarp(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kWarp)
  const int lane = threadIdx.x;
  tile[lane] = in[lane];
  if (kWrong)
    __ballot_sync(kAllLanes, 1);
  else
    __syncwarp();
  out[lane] = tile[lane ^ 1];
}

// One warp multiplies, kWrong: half of it.
template <bool kWrong>
__global__ void partial_product(float* out, const float*) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kWrong || threadIdx.x < 16) mma_m16n8k16<__nv_bfloat16>(d, a, b);
  out[threadIdx.x] = d[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies
// ---------------------------------------------------------------------------------------------------------------------

enum PipelineFault { kNone, kWaitOneShort, kNoBarrier, kRefilledEarly, kNoWaitAtEnd, kReadBeforeWait };

// Tiles through two stages of shared memory. Each thread reads what another warp has copied.
// out (kTiles, kBlock): the first element of each vector, each tile reversed.
template <PipelineFault kFault>
__global__ void pipeline(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, stages);  // (2, kTile)
  const int t = threadIdx.x;
  const auto load = [&](int tile) {
    cp_async_16(stages + tile % 2 * kTile + t * kVector, in + (tile < kTiles ? tile * kTile + t * kVector : 0),
                tile < kTiles);
    cp_async_commit();
  };
  load(0);
  for (int tile = 0; tile < kTiles; ++tile) {
    load(tile + 1);
    if (kFault == kReadBeforeWait) out[tile * kBlock + t] = stages[tile % 2 * kTile + t * kVector];
    if (kFault == kWaitOneShort)
      cp_async_wait<2>();
    else
      cp_async_wait<1>();
    if (kFault != kNoBarrier) __syncthreads();
    if (kFault != kReadBeforeWait) out[tile * kBlock + t] = stages[tile % 2 * kTile + (kBlock - 1 - t) * kVector];
    if (kFault != kRefilledEarly) __syncthreads();
  }
  if (kFault != kNoWaitAtEnd) cp_async_wait<0>();
}

// A copy that is not valid writes zeros and reads nothing.
__global__ inline void zero_fill(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kWarp * kVector)
  const int t = threadIdx.x;
  cp_async_16(tile + t * kVector, t % 2 ? in + 4 : nullptr, false);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kVector; ++i) out[t * kVector + i] = tile[t * kVector + i];
}

enum AddressFault { kGood, kSharedMisaligned, kSharedBeyond, kSharedBefore, kGlobalMisaligned, kNotShared };

template <AddressFault kFault>
__global__ void copy_addresses(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kWarp * kVector)
  const int t = threadIdx.x;
  float* to = tile + t * kVector;
  const float* from = in + t * kVector;
  if (kFault == kSharedMisaligned) to += 1;
  if (kFault == kSharedBeyond) to += kVector;
  if (kFault == kSharedBefore) to -= kVector;
  if (kFault == kGlobalMisaligned) from += 1;
  if (kFault == kNotShared) to = out;
  cp_async_16(to, from, true);
  cp_async_commit();
  cp_async_wait<0>();
  out[t] = tile[t * kVector];
}

template <AddressFault kFault>
__global__ void matrix_addresses(float* out, const float*) {
  DNL_DYNAMIC_SHARED(uint16_t, tile);  // (kWarp, 8)
  const int t = threadIdx.x;
  for (int i = 0; i < 8; ++i) tile[t * 8 + i] = 0;
  __syncwarp();
  const uint16_t* row = tile + t * 8;
  if (kFault == kSharedMisaligned) row += 4;
  if (kFault == kSharedBeyond) row += 8;
  uint32_t result[4];
  ldmatrix_x4(result, row);
  out[t] = float(result[0]);
}

// Rows of 64 or 72 elements: eight of the former begin in the same banks.
template <int kPitch>
__global__ void matrix_conflicts(float* out, const float*) {
  DNL_DYNAMIC_SHARED(uint16_t, tile);  // (8, kPitch)
  const int t = threadIdx.x;
  for (int i = t; i < 8 * kPitch; i += kWarp) tile[i] = 0;
  __syncwarp();
  uint32_t result[2];
  ldmatrix_x2(result, tile + t % 8 * kPitch + t / 8 % 2 * 8);
  out[t] = float(result[0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

// kWrong reads one element beyond the tile.
template <bool kWrong>
__global__ void beyond_shared(float* out, const float* in) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kWarp)
  const int t = threadIdx.x;
  tile[t] = in[t];
  __syncthreads();
  out[t] = tile[kWrong ? t + 1 : t];
}

template <bool kWrong>
__global__ void beyond_static_shared(float* out, const float* in) {
  __shared__ float tile[kWarp];
  const int t = threadIdx.x;
  tile[t] = in[t];
  __syncthreads();
  const float* element = tile + t + kWrong;  // a pointer: the bound of the array is out of sight
  out[t] = *element;
}

template <bool kWrong>
__global__ void beyond_global(float* out, const float* in) {
  out[threadIdx.x + kWrong] = in[threadIdx.x];
}

template <bool kWrong>
__global__ void misaligned_vector(float* out, const float* in) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + kWrong);
}

__global__ inline void not_initialised(float* out, const float*) {
  DNL_DYNAMIC_SHARED(float, tile);  // (kWarp)
  out[threadIdx.x] = tile[threadIdx.x];
}

template <int>
__global__ void not_initialised_static(float* out, const float*) {
  __shared__ float tile[kWarp];
  out[blockIdx.x * kWarp + threadIdx.x] = tile[threadIdx.x];
  tile[threadIdx.x] = 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks
// ---------------------------------------------------------------------------------------------------------------------

// Number of threads of the grid, counted by all blocks.
template <bool kWrong>
__global__ void racing_blocks(float* out, const float*) {
  if (kWrong) {
    if (threadIdx.x == 0) out[0] += float(blockDim.x);
  } else {
    atomicAdd(out, 1.0f);
  }
}

// out[b] = b + 1; kWrong: from what the block before wrote.
template <bool kWrong>
__global__ void ordered_blocks(float* out, const float* in) {
  const int b = blockIdx.x;
  if (threadIdx.x == 0) out[b] = kWrong && b ? out[b - 1] + 1 : in[b] + 1;
}

}  // namespace twins
