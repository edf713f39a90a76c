// The map of the backward for halves on Hopper (sm_90a): what fused/backward_map.cuh computes, by TMA and wgmma.
//
// A block walks over tiles of 128 keys x 128 queries of both S' = K Q^T and dP' = V dO^T. One thread loads 64 channels
// of both operands at a time into a ring of five stages; two warpgroups multiply, 64 keys each, so that a thread holds
// 64 + 64 floats:
//
//                      queries ->
//     keys   0 -  63   | warpgroup 0: four warps of 16 keys x 128 queries |
//     keys  64 - 127   | warpgroup 1                                      |
//
//   loading thread   stage, stage, stage, ...                          of one tile after another, without a break
//   warpgroup        S' ... | dP', and P' from S' while it runs | dS' = P' (dP' - Delta) | P', dS' to memory
//
// A warp has whole rows of the tile: sums of dS' over the tile's queries need no other warp, and P' and dS' leave
// through shared memory that no other warp touches. They are rounded once; the sums are added in order by a second
// kernel.
#pragma once

#include "ops/pairwise/fused/backward_map.cuh"
#include "ops/pairwise/hopper/hopper.h"
#include "ops/pairwise/hopper/ring.cuh"

namespace dnl {

constexpr int kMapOperand = kMapTile / kBox * kBoxBytes;  // bytes of 128 positions x 64 channels
using MapRing = Ring<5, 2 * kMapOperand>;
constexpr int kMapLead = 3;  // stages of dP' that are under way while P' is made
static_assert(kMapTile == 2 * kBox && kMapLead < MapRing::kStages, "a warpgroup has a box of keys; loads go on");

// Where things lie in shared memory, in bytes.
constexpr int kMapResult = kMapTile * kMapTile * 2;  // P' or dS' of a tile
constexpr int kMapProbability = MapRing::kBytes, kMapGradient = kMapProbability + kMapResult;
constexpr int kMapStatistics = kMapGradient + kMapResult;  // shift, factor and Delta of each query
constexpr int kMapBarriers = kMapStatistics + 3 * kMapTile * int(sizeof(float));
constexpr int kHopperMapBytes = kMapBarriers + MapRing::kBarrierBytes;
static_assert(kHopperMapBytes <= 227 << 10, "what a block can have on compute capability 9.0");

template <class T>
struct HopperMap {
  SoftmaxBackwardStep<T> step;
  TmaOperand key, query;           // (group, rows, width), (group, columns, width)
  TmaOperand value, grad;          // (group, rows, channels), (group, columns, channels)
  int logit_chunks, value_chunks;  // of 64 channels; value_chunks is 0 where only P' is wanted
  float* row_part;                 // (group, rows, column tiles): sums of dS', or null
  int64_t row_tiles, column_tiles, tiles;
};

// A tile of the map.
struct MapPlace {
  int64_t b, first_row, first_column, column_tile;

  // Neighbouring blocks share queries: tiles of keys go first.
  template <class T>
  DNL_DEVICE MapPlace(const HopperMap<T>& op, int64_t tile) {
    first_row = tile % op.row_tiles * kMapTile;
    tile /= op.row_tiles;
    column_tile = tile % op.column_tiles;
    first_column = column_tile * kMapTile;
    b = tile / op.column_tiles;
  }
};

// By one thread: all stages of all tiles of the block.
template <class T>
DNL_DEVICE void load_map_stages(const HopperMap<T>& op, const MapRing& ring) {
  RingProducer<MapRing> producer{ring, {}};
  for (int64_t tile = blockIdx.x; tile < op.tiles; tile += gridDim.x) {
    const MapPlace at(op, tile);
    const auto load = [&](const TmaOperand& left, const TmaOperand& right, int chunks) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        producer.fill(2 * kMapOperand, [&](unsigned char* stage, uint64_t* barrier) {
          left.load<kMapTile>(stage, at.b, at.first_row, chunk * kBox, barrier);
          right.load<kMapTile>(stage + kMapOperand, at.b, at.first_column, chunk * kBox, barrier);
        });
    };
    load(op.key, op.query, op.logit_chunks);
    load(op.value, op.grad, op.value_chunks);
  }
}

// d (64 keys x 128 queries) over the 64 channels of a stage, or plus d. Under way when this returns.
template <class T, Along kLeft, Along kRight>
DNL_DEVICE void multiply_stage(float (&d)[kMapTile / 2], const unsigned char* stage, bool accumulate) {
  const uint64_t left = tile_descriptor<kLeft>(stage + threadIdx.x / kWarpgroup * kBoxBytes);
  const uint64_t right = tile_descriptor<kRight>(stage + kMapOperand);
  wgmma_fence();
  for (int slice = 0; slice < kBox / kProductDepth; ++slice)
    wgmma<T, kMapTile, kLeft, kRight>(d, later(left, slice * kNextDepth<kLeft>),
                                      later(right, slice * kNextDepth<kRight>), accumulate || slice > 0);
  wgmma_commit();
}

// What a thread of the two warpgroups that multiply does with its part of a tile: rows row and row + 8, and columns
// column(n) and column(n) + 1 of each group n of eight; element [4 n + 2 h + u] of a result is at row + 8 h and
// column(n) + u.
template <class T>
struct MapConsumer {
  static constexpr int kGroups = kMapTile / 8;
  static constexpr int kLines = kMapTile / kLineElements<T>;  // 16 bytes each, of a row of P' or dS'
  const HopperMap<T>& op;
  const SoftmaxBackwardStep<T>& step;
  unsigned char* memory;
  RingConsumer<MapRing> ring;
  float *shift, *factor, *delta;  // of the tile's queries, in shared memory
  int lane, warp_row, row;        // of the tile; warp_row is the warp's first

  DNL_DEVICE MapConsumer(const HopperMap<T>& map, unsigned char* shared, const MapRing& stages)
      : op(map), step(map.step), memory(shared), ring{stages, {}, {}} {
    shift = reinterpret_cast<float*>(shared + kMapStatistics);
    factor = shift + kMapTile;
    delta = factor + kMapTile;
    lane = threadIdx.x % kWarp;
    warp_row = threadIdx.x / kWarp * 16;
    row = warp_row + lane / 4;
  }

  DNL_DEVICE int column(int group) const { return group * 8 + lane % 4 * 2; }

  // Of the tile's queries: what makes P, and Delta.
  DNL_DEVICE void load_statistics(const MapPlace& at) const {
    named_barrier(kConsumerBarrier, kConsumers);  // those of the last tile are done with
    const int64_t i = at.first_column + threadIdx.x;
    if (threadIdx.x < kMapTile) {
      const bool inside = i < step.columns;
      // Beyond the last query P is exp2(-inf) = 0.
      shift[threadIdx.x] = inside ? step.shift.element(at.b)[i] : std::numeric_limits<float>::infinity();
      factor[threadIdx.x] = inside ? step.row_factor.element(at.b)[i] : 0.0f;
      delta[threadIdx.x] = inside && step.grad_logits ? step.delta.element(at.b)[i] : 0.0f;
    }
    named_barrier(kConsumerBarrier, kConsumers);
  }

  // The 32 bits at (r, c) and (r, c + 1) of P' or dS' in shared memory, where c is even: 16-byte lines of a row change
  // places by the row, so that what a warp writes or reads at once lies in different banks.
  DNL_DEVICE unsigned char* place(int result, int r, int c) const {
    constexpr int kRowBytes = kMapTile * sizeof(T);
    return memory + result + r * kRowBytes + (c / kLineElements<T> ^ r % 8) * kLine + c % kLineElements<T> * sizeof(T);
  }

  // Probabilities in place of S', and P' as rounded to shared memory.
  DNL_DEVICE void make_probability(const MapPlace& at, float (&s)[kMapTile / 2]) const {
    constexpr float kStored = 1 << kProbabilityExponent<T>;
    float bias[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t j = at.first_row + row + 8 * h;
      bias[h] = step.bias.data && j < step.rows ? step.bias.element(at.b)[j] : 0.0f;
    }
#pragma unroll  // or `s` is indexed, and leaves the registers
    for (int n = 0; n < kGroups; ++n)
      for (int h = 0; h < 2; ++h) {
        float* p = s + 4 * n + 2 * h;
        for (int u = 0; u < 2; ++u) {
          const int i = column(n) + u;
          const float exponent = (p[u] * step.sign + bias[h] - shift[i]) * step.magnitude;
          p[u] = factor[i] * exp2_approx(not_positive(exponent));
        }
        *reinterpret_cast<uint32_t*>(place(kMapProbability, row + 8 * h, column(n))) =
            pack2<T>(kStored * p[0], kStored * p[1]);
      }
  }

  // dS' as rounded to shared memory, and its sums over the tile's queries.
  DNL_DEVICE void make_gradient(const MapPlace& at, const float (&p)[kMapTile / 2],
                                const float (&dp)[kMapTile / 2]) const {
    const float grad_scale = step.grad_scale ? step.grad_scale[at.b] : 1.0f;
    float sum[2] = {};
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
      for (int h = 0; h < 2; ++h) {
        float ds[2];
        for (int u = 0; u < 2; ++u)
          ds[u] = grad_scale * softmax_jacobian(p[4 * n + 2 * h + u], dp[4 * n + 2 * h + u], delta[column(n) + u]);
        *reinterpret_cast<uint32_t*>(place(kMapGradient, row + 8 * h, column(n))) = round_both<T>(ds[0], ds[1], sum[h]);
      }
    for (int h = 0; h < 2; ++h) {
      for (int other = 1; other <= 2; other *= 2) sum[h] += __shfl_xor_sync(kAllLanes, sum[h], other);
      const int64_t j = at.first_row + row + 8 * h;
      if (op.row_part && lane % 4 == 0 && j < step.rows)
        op.row_part[(at.b * step.rows + j) * op.column_tiles + at.column_tile] = sum[h];
    }
  }

  // The warp's rows of P' and dS', in lines. The next tile's take their place after stages were given back, which
  // brings the warp together.
  DNL_DEVICE void write(const MapPlace& at) const {
    __syncwarp();
    for (int index = lane; index < 16 * kLines; index += kWarp) {
      const int r = warp_row + index / kLines, c = index % kLines * kLineElements<T>;
      if (at.first_row + r >= step.rows || at.first_column + c >= step.pitch) continue;
      const int64_t to = (at.b * step.rows + at.first_row + r) * step.pitch + at.first_column + c;
      const auto copy = [&](T* out, int result) {
        *reinterpret_cast<Line<T>*>(out + to) = *reinterpret_cast<const Line<T>*>(place(result, r, c));
      };
      if (step.probability) copy(step.probability, kMapProbability);
      if (step.grad_logits) copy(step.grad_logits, kMapGradient);
    }
  }

  // S' of a tile.
  template <Along kKey, Along kQuery>
  DNL_DEVICE void multiply_logits(float (&s)[kMapTile / 2]) {
    multiply_stage<T, kKey, kQuery>(s, ring.next(), false);
    for (int chunk = 1; chunk < op.logit_chunks; ++chunk) {
      multiply_stage<T, kKey, kQuery>(s, ring.next(), true);
      wgmma_wait<1>();
      ring.release();
    }
    wgmma_wait<0>();
    ring.release();
  }

  // dP' of a tile, and P' from S' while its first stages are multiplied.
  template <Along kValue, Along kGrad>
  DNL_DEVICE void multiply_values(const MapPlace& at, float (&s)[kMapTile / 2], float (&dp)[kMapTile / 2]) {
    const int lead = op.value_chunks < kMapLead ? op.value_chunks : kMapLead;
    multiply_stage<T, kValue, kGrad>(dp, ring.next(), false);
    for (int chunk = 1; chunk < lead; ++chunk) multiply_stage<T, kValue, kGrad>(dp, ring.next(), true);
    make_probability(at, s);
    for (int chunk = lead; chunk < op.value_chunks; ++chunk) {
      multiply_stage<T, kValue, kGrad>(dp, ring.next(), true);
      wgmma_wait<1>();
      for (int left = chunk == lead ? lead : 1; left > 0; --left) ring.release();
    }
    wgmma_wait<0>();
    for (int left = op.value_chunks == lead ? lead : 1; left > 0; --left) ring.release();
  }

  DNL_DEVICE void run() {
    for (int64_t tile = blockIdx.x; tile < op.tiles; tile += gridDim.x) {
      const MapPlace at(op, tile);
      load_statistics(at);
      float s[kMapTile / 2], dp[kMapTile / 2];
      by_order(op.key.channel_first, op.query.channel_first,
               [&](auto left, auto right) { multiply_logits<decltype(left)::value, decltype(right)::value>(s); });
      if (op.value_chunks) {
        by_order(op.value.channel_first, op.grad.channel_first, [&](auto left, auto right) {
          multiply_values<decltype(left)::value, decltype(right)::value>(at, s, dp);
        });
        make_gradient(at, s, dp);
      } else {
        make_probability(at, s);
      }
      write(at);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_backward_map_kernel(const __grid_constant__ HopperMap<T> op) {
  DNL_DYNAMIC_SHARED_TILES(unsigned char, memory);
  const MapRing ring(memory, memory + kMapBarriers);
  if (threadIdx.x == 0) {
    ring.init();
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) load_map_stages(op, ring);
  } else {
    more_registers<kConsumerRegisters>();
    MapConsumer<T>(op, memory, ring).run();
  }
}

template <class T, class Device>
void hopper_backward_map(Device& device, const SoftmaxBackwardStep<T>& step, const Matrix<const T>& key,
                         const Matrix<const T>& query, const Matrix<const T>& value, const Matrix<const T>& grad,
                         float* row_part, int64_t group, int64_t width, int64_t channels, int multiprocessors) {
  HopperMap<T> op{};
  op.step = step;
  op.row_part = row_part;
  op.row_tiles = ceil_div_of(step.rows, kMapTile), op.column_tiles = ceil_div_of(step.columns, kMapTile);
  op.tiles = group * op.row_tiles * op.column_tiles;
  if constexpr (kRuns<Device>) {
    op.key = {key, group, step.rows, width, kMapTile};
    op.query = {query, group, step.columns, width, kMapTile};
  }
  op.logit_chunks = static_cast<int>(ceil_div_of(width, kBox));
  if (step.grad_logits) {
    if constexpr (kRuns<Device>) {
      op.value = {value, group, step.rows, channels, kMapTile};
      op.grad = {grad, group, step.columns, channels, kMapTile};
    }
    op.value_chunks = static_cast<int>(ceil_div_of(channels, kBox));
  }
  device.launch(&hopper_backward_map_kernel<T>,
                LaunchShape{std::min<int64_t>(op.tiles, multiprocessors), kHopperThreads, kHopperMapBytes}, op);
  if (step.row_sum) row_sums(device, PartSum{row_part, group, step.rows, op.column_tiles, step.row_sum}, false);
}

}  // namespace dnl
