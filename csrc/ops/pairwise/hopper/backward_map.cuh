// The map of the backward for halves on Hopper (sm_90a): what fused/backward_map.cuh computes, by TMA and wgmma.
//
// A block walks over tiles of 128 keys x 128 queries of both S' = K Q^T and dP' = V dO^T. One thread loads 64 channels
// of both operands at a time into a ring of four stages; two warpgroups multiply, 64 keys each, so that a thread holds
// 64 + 64 floats:
//
//                      queries ->
//     keys   0 -  63   | warpgroup 0: four warps of 16 keys x 128 queries |
//     keys  64 - 127   | warpgroup 1                                      |
//
//   loading thread   stage, stage, stage, ...                of one tile after another, without a break
//   warpgroup        S' ... | dP', and while it runs P' from S' to memory | dS' = P' (dP' - Delta) to memory
//
// 64 channels of both operands are 32 KB, which the tensor cores multiply in 512 cycles: L2 brings less. So a block
// keeps its keys, up to 256 channels of them, and walks over tiles of queries beside them (MapWalk); a stage of S' is
// then 128 channels of queries alone.
//
// A warp has whole rows of the tile: sums of dS' over the tile's queries need no other warp, and P' and dS' leave
// through shared memory that no other warp touches, one after the other. They are rounded once; the sums are added in
// order by a second kernel.
#pragma once

#include "ops/pairwise/fused/backward_map.cuh"
#include "ops/pairwise/hopper/hopper.h"
#include "ops/pairwise/hopper/ring.cuh"

namespace dnl {

constexpr int kMapOperand = kMapTile / kBox * kBoxBytes;  // bytes of 128 positions x 64 channels
constexpr int kKeyChunks = 4;                             // of 64 channels: keys of more do not stay
using MapRing = Ring<4, 2 * kMapOperand>;
using KeyRing = Ring<1, kKeyChunks * kMapOperand>;
constexpr int kMapLead = 3;  // stages of dP' that are under way while P' is made
static_assert(kMapTile == 2 * kBox && kMapLead < MapRing::kStages, "a warpgroup has a box of keys; loads go on");

// Where things lie in shared memory, in bytes.
constexpr int kMapKeys = MapRing::kBytes;
constexpr int kMapResult = kMapKeys + KeyRing::kBytes;                // P' or dS' of a tile
constexpr int kMapStatistics = kMapResult + kMapTile * kMapTile * 2;  // shift, factor and Delta of each query
constexpr int kMapBarriers = kMapStatistics + 3 * kMapTile * int(sizeof(float));  // of the ring, then of the keys
constexpr int kHopperMapBytes = kMapBarriers + MapRing::kBarrierBytes + KeyRing::kBarrierBytes;
static_assert(kHopperMapBytes <= 227 << 10, "what a block can have on compute capability 9.0");

template <class T>
struct HopperMap {
  SoftmaxBackwardStep<T> step;
  TmaOperand key, query;           // (group, rows, width), (group, columns, width)
  TmaOperand value, grad;          // (group, rows, channels), (group, columns, channels)
  int logit_chunks, value_chunks;  // of 64 channels; value_chunks is 0 where only P' is wanted
  bool keys_stay;                  // logit_chunks are not more than kKeyChunks
  float* row_part;                 // (group, rows, column tiles): sums of dS', or null
  int64_t tiles;                   // of all bands
  int group, row_tiles, column_tiles;
  int band, bands;  // tiles of keys of a band, and bands; the last one may go beyond the keys
};

// A tile of the map.
struct MapPlace {
  int b = -1, first_row = 0, first_column = 0;

  DNL_DEVICE bool exists() const { return b >= 0; }
  DNL_DEVICE bool has_keys_of(const MapPlace& other) const { return b == other.b && first_row == other.first_row; }
};

// The tiles of this block, in order. All tiles are counted by keys first, within a band of at most as many tiles of
// keys as there are blocks, then by queries, then by bands; in each step the grid takes as many of them as it has
// blocks. Of `band` tiles that follow one another each has other keys, so as many blocks as there is room for keep
// theirs from step to step, and what is left over goes to the others. Blocks share the queries of a step, and a block's
// own values are read again in the next one, so that both come from L2. A division is a long chain of instructions that
// nothing hides, so from tile to tile there is none.
template <class T>
class MapWalk {
 public:
  DNL_DEVICE explicit MapWalk(const HopperMap<T>& map)
      : op(map), columns(gridDim.x / op.band), rest(gridDim.x % op.band) {
    const int block = blockIdx.x;
    row = turn = block % op.band, column = block / op.band;
    keeps = column < columns;
  }

  // The next tile; one that does not exist at the end.
  DNL_DEVICE MapPlace next() {
    while (true) {
      for (; column >= op.column_tiles; column -= op.column_tiles)
        if (++band == op.bands) band = 0, ++b;
      if (b >= op.group) return {};
      const int row_tile = band * op.band + row;
      const MapPlace found{b, row_tile * kMapTile, column * kMapTile};
      advance();
      if (row_tile < op.row_tiles) return found;
    }
  }

 private:
  // A step is `columns` times a band and `rest` tiles. A block that keeps its keys has the one tile of its run of
  // `band` tiles that has them: number `turn`.
  DNL_DEVICE void advance() {
    column += columns;
    if (keeps) {
      turn -= rest;
      if (turn < 0) turn += op.band, ++column;
    } else {
      row += rest;
      if (row >= op.band) row -= op.band, ++column;
    }
  }

  const HopperMap<T>& op;
  const int columns, rest;
  bool keeps;
  int row, column, band = 0, b = 0, turn;
};

// By one thread: all stages of all tiles of the block.
template <class T>
DNL_DEVICE void load_map_stages(const HopperMap<T>& op, const MapRing& ring, const KeyRing& key_ring) {
  RingProducer<MapRing> producer{ring, {}};
  RingProducer<KeyRing> key_producer{key_ring, {}};
  MapWalk<T> walk(op);
  MapPlace last;
  for (MapPlace at = walk.next(); at.exists(); last = at, at = walk.next()) {
    const auto load_both = [&](const TmaOperand& left, const TmaOperand& right, int chunks) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        producer.fill(2 * kMapOperand, [&](unsigned char* stage, uint64_t* barrier) {
          left.load<kMapTile>(stage, at.b, at.first_row, chunk * kBox, barrier);
          right.load<kMapTile>(stage + kMapOperand, at.b, at.first_column, chunk * kBox, barrier);
        });
    };
    // `chunks` from `first` on, side by side.
    const auto load_run = [&](auto& to, const TmaOperand& operand, int64_t position, int first, int chunks) {
      to.fill(chunks * kMapOperand, [&](unsigned char* stage, uint64_t* barrier) {
        for (int chunk = 0; chunk < chunks; ++chunk)
          operand.load<kMapTile>(stage + chunk * kMapOperand, at.b, position, (first + chunk) * kBox, barrier);
      });
    };
    if (op.keys_stay) {
      if (!at.has_keys_of(last)) load_run(key_producer, op.key, at.first_row, 0, op.logit_chunks);
      for (int chunk = 0; chunk < op.logit_chunks; chunk += 2)
        load_run(producer, op.query, at.first_column, chunk, chunk + 1 < op.logit_chunks ? 2 : 1);
    } else {
      load_both(op.key, op.query, op.logit_chunks);
    }
    load_both(op.value, op.grad, op.value_chunks);
  }
}

// d (64 keys x 128 queries) over 64 channels, or plus d. Under way when this returns.
template <class T, Along kLeft, Along kRight>
DNL_DEVICE void multiply_chunk(float (&d)[kMapTile / 2], const unsigned char* keys, const unsigned char* queries,
                               bool accumulate) {
  const uint64_t left = tile_descriptor<kLeft>(keys + threadIdx.x / kWarpgroup * kBoxBytes);
  const uint64_t right = tile_descriptor<kRight>(queries);
  wgmma_fence();
  for (int slice = 0; slice < kBox / kProductDepth; ++slice)
    wgmma<T, kMapTile, kLeft, kRight>(d, later(left, slice * kNextDepth<kLeft>),
                                      later(right, slice * kNextDepth<kRight>), accumulate || slice > 0);
  wgmma_commit();
}
// Of a stage that holds both operands.
template <class T, Along kLeft, Along kRight>
DNL_DEVICE void multiply_stage(float (&d)[kMapTile / 2], const unsigned char* stage, bool accumulate) {
  multiply_chunk<T, kLeft, kRight>(d, stage, stage + kMapOperand, accumulate);
}

// What a thread of the two warpgroups that multiply does with its part of a tile: rows row and row + 8, and columns
// column(n) and column(n) + 1 of each group n of eight; element [4 n + 2 h + u] of a result is at row + 8 h and
// column(n) + u.
template <class T>
struct MapConsumer {
  static constexpr int kGroups = kMapTile / 8;
  static constexpr int kLines = kMapTile / kLineElements<T>;  // 16 bytes each, of a row of P' or dS'
  static constexpr int kTogether = 4;  // groups, and lines, whose loads are ahead of their stores
  const HopperMap<T>& op;
  const SoftmaxBackwardStep<T>& step;
  unsigned char* memory;
  RingConsumer<MapRing> ring;
  RingConsumer<KeyRing> key_ring;
  const unsigned char* keys = nullptr;  // that stay
  float *shift, *factor, *delta;        // of the tile's queries, in shared memory
  int lane, warp_row, row;              // of the tile; warp_row is the warp's first

  DNL_DEVICE MapConsumer(const HopperMap<T>& map, unsigned char* shared, const MapRing& stages, const KeyRing& kept)
      : op(map), step(map.step), memory(shared), ring{stages, {}, {}}, key_ring{kept, {}, {}} {
    shift = reinterpret_cast<float*>(shared + kMapStatistics);
    factor = shift + kMapTile;
    delta = factor + kMapTile;
    lane = threadIdx.x % kWarp;
    warp_row = threadIdx.x / kWarp * 16;
    row = warp_row + lane / 4;
  }

  DNL_DEVICE int column(int group) const { return group * 8 + lane % 4 * 2; }

  // What a tile asks of memory beside its operands. It is loaded while the tile before is made.
  struct Statistics {
    // Of the query threadIdx.x. Beyond the last one P is exp2(-inf) = 0.
    float shift = std::numeric_limits<float>::infinity(), factor = 0, delta = 0;
    float bias[2] = {};  // of this thread's keys
    float grad_scale = 1;
  };
  DNL_DEVICE Statistics load_statistics(const MapPlace& at) const {
    Statistics found;
    if (!at.exists()) return found;
    const int64_t i = int64_t(at.first_column) + threadIdx.x;
    if (threadIdx.x < kMapTile && i < step.columns) {
      found.shift = step.shift.element(at.b)[i];
      found.factor = step.row_factor.element(at.b)[i];
      if (step.grad_logits) found.delta = step.delta.element(at.b)[i];
    }
    for (int h = 0; h < 2; ++h) {
      const int64_t j = int64_t(at.first_row) + row + 8 * h;
      if (step.bias.data && j < step.rows) found.bias[h] = step.bias.element(at.b)[j];
    }
    if (step.grad_scale) found.grad_scale = step.grad_scale[at.b];
    return found;
  }
  DNL_DEVICE void share(const Statistics& own) const {
    named_barrier(kConsumerBarrier, kConsumers);  // those of the last tile are done with
    if (threadIdx.x < kMapTile)
      shift[threadIdx.x] = own.shift, factor[threadIdx.x] = own.factor, delta[threadIdx.x] = own.delta;
    named_barrier(kConsumerBarrier, kConsumers);
  }
  // Of the two columns of this thread in a group.
  DNL_DEVICE Neighbours<float> both(const float* of_queries, int group) const {
    return *reinterpret_cast<const Neighbours<float>*>(of_queries + column(group));
  }

  // The 32 bits at (r, c) and (r, c + 1) of P' or dS' in shared memory, where c is even: 16-byte lines of a row change
  // places by the row, so that what a warp writes or reads at once lies in different banks.
  DNL_DEVICE unsigned char* place(int r, int c) const {
    constexpr int kRowBytes = kMapTile * sizeof(T);
    return memory + kMapResult + r * kRowBytes + (c / kLineElements<T> ^ r % 8) * kLine +
           c % kLineElements<T> * sizeof(T);
  }

  // Probabilities in place of S', and P' as rounded to shared memory. Groups are taken several at a time: what is read
  // after a store to shared memory waits for it, and a thread has nothing else to do.
  DNL_DEVICE void make_probability(float (&s)[kMapTile / 2], const Statistics& own) const {
    constexpr float kStored = 1 << kProbabilityExponent<T>;
#pragma unroll  // or `s` is indexed, and leaves the registers
    for (int first = 0; first < kGroups; first += kTogether) {
      Neighbours<float> off[kTogether], by[kTogether];
      for (int k = 0; k < kTogether; ++k) off[k] = both(shift, first + k), by[k] = both(factor, first + k);
      for (int k = 0; k < kTogether; ++k)
        for (int e = 0; e < 4; ++e) {
          float& p = s[4 * (first + k) + e];
          const float exponent = (p * step.sign + own.bias[e / 2] - (e % 2 ? off[k].hi : off[k].lo)) * step.magnitude;
          p = (e % 2 ? by[k].hi : by[k].lo) * exp2_approx(not_positive(exponent));
        }
      for (int k = 0; k < kTogether; ++k)
        for (int h = 0; h < 2; ++h) {
          const float* p = s + 4 * (first + k) + 2 * h;
          *reinterpret_cast<uint32_t*>(place(row + 8 * h, column(first + k))) =
              pack2<T>(kStored * p[0], kStored * p[1]);
        }
    }
  }

  // dS' as rounded to shared memory, and its sums over the tile's queries.
  DNL_DEVICE void make_gradient(const MapPlace& at, const float (&p)[kMapTile / 2], float (&dp)[kMapTile / 2],
                                const Statistics& own) const {
    float sum[2] = {};
#pragma unroll
    for (int first = 0; first < kGroups; first += kTogether) {
      Neighbours<float> mean[kTogether];
      for (int k = 0; k < kTogether; ++k) mean[k] = both(delta, first + k);
      for (int k = 0; k < kTogether; ++k)
        for (int e = 0; e < 4; ++e) {
          float& ds = dp[4 * (first + k) + e];
          ds = own.grad_scale * softmax_jacobian(p[4 * (first + k) + e], ds, e % 2 ? mean[k].hi : mean[k].lo);
        }
      for (int k = 0; k < kTogether; ++k)
        for (int h = 0; h < 2; ++h) {
          const float* ds = dp + 4 * (first + k) + 2 * h;
          *reinterpret_cast<uint32_t*>(place(row + 8 * h, column(first + k))) = round_both<T>(ds[0], ds[1], sum[h]);
        }
    }
    for (int h = 0; h < 2; ++h) {
      for (int other = 1; other <= 2; other *= 2) sum[h] += __shfl_xor_sync(kAllLanes, sum[h], other);
      const int64_t j = int64_t(at.first_row) + row + 8 * h;
      if (op.row_part && lane % 4 == 0 && j < step.rows)
        op.row_part[(at.b * step.rows + j) * op.column_tiles + at.first_column / kMapTile] = sum[h];
    }
  }

  // The warp's rows of P' or dS', in lines, from shared memory to `out`. Stages are given back before the other result
  // takes its place, which brings the warp together.
  DNL_DEVICE void write(T* out, const MapPlace& at) const {
    constexpr int kRows = kWarp / kLines, kTurns = 16 / kRows;  // rows that a warp writes at once
    __syncwarp();
    const int r = warp_row + lane / kLines, c = lane % kLines * kLineElements<T>;
    if (at.first_column + c >= step.pitch) return;
    const int left = at_most_of(step.rows - at.first_row - r, kMapTile);
    out += (at.b * step.rows + at.first_row + r) * step.pitch + at.first_column + c;
    const auto line = [&](int turn) { return *reinterpret_cast<const Line<T>*>(place(r + turn * kRows, c)); };
    const auto store = [&](int turn, Line<T> x) { *reinterpret_cast<Line<T>*>(out + turn * kRows * step.pitch) = x; };
    static_assert(kTogether == 4);
    int turn = 0;
#pragma unroll
    for (; turn < kTurns; turn += kTogether) {
      if ((turn + kTogether - 1) * kRows >= left) break;
      // As an array, or each with a condition of its own, nvcc stores them word by word.
      const Line<T> w = line(turn), x = line(turn + 1), y = line(turn + 2), z = line(turn + 3);
      store(turn, w), store(turn + 1, x), store(turn + 2, y), store(turn + 3, z);
    }
#pragma unroll 1
    for (; turn < kTurns && turn * kRows < left; ++turn) store(turn, line(turn));
  }
  DNL_DEVICE void write_probability(const MapPlace& at) const {
    if (step.probability) write(step.probability, at);
  }

  // S' of a tile.
  template <Along kKey, Along kQuery>
  DNL_DEVICE void multiply_logits(float (&s)[kMapTile / 2]) {
    const unsigned char* stage = ring.next();
    const unsigned char* left = op.keys_stay ? keys : stage;
    multiply_chunk<T, kKey, kQuery>(s, left, op.keys_stay ? stage : stage + kMapOperand, false);
    for (int chunk = 1; chunk < op.logit_chunks; ++chunk) {
      const bool of_same_stage = op.keys_stay && chunk % 2;
      if (!of_same_stage) stage = ring.next();
      left = op.keys_stay ? left + kMapOperand : stage;
      multiply_chunk<T, kKey, kQuery>(s, left, op.keys_stay && !of_same_stage ? stage : stage + kMapOperand, true);
      wgmma_wait<1>();
      if (!of_same_stage) ring.release();  // the one before
    }
    wgmma_wait<0>();
    ring.release();
  }

  // dP' of a tile, and P' from S' while its first stages are multiplied.
  template <Along kValue, Along kGrad>
  DNL_DEVICE void multiply_values(const MapPlace& at, float (&s)[kMapTile / 2], float (&dp)[kMapTile / 2],
                                  const Statistics& own) {
    const int lead = op.value_chunks < kMapLead ? op.value_chunks : kMapLead;
    multiply_stage<T, kValue, kGrad>(dp, ring.next(), false);
    for (int chunk = 1; chunk < lead; ++chunk) multiply_stage<T, kValue, kGrad>(dp, ring.next(), true);
    make_probability(s, own);
    write_probability(at);
    for (int chunk = lead; chunk < op.value_chunks; ++chunk) {
      multiply_stage<T, kValue, kGrad>(dp, ring.next(), true);
      wgmma_wait<1>();
      for (int left = chunk == lead ? lead : 1; left > 0; --left) ring.release();
    }
    wgmma_wait<0>();
    for (int left = op.value_chunks == lead ? lead : 1; left > 0; --left) ring.release();
  }

  DNL_DEVICE void run() {
    MapWalk<T> walk(op);
    MapPlace at, then = walk.next();
    Statistics next = load_statistics(then);
    while (then.exists()) {
      if (op.keys_stay && !then.has_keys_of(at)) keys = key_ring.next();
      at = then;
      then = walk.next();
      const Statistics own = next;
      share(own);
      next = load_statistics(then);
      float s[kMapTile / 2], dp[kMapTile / 2];
      by_order(op.key.channel_first, op.query.channel_first,
               [&](auto left, auto right) { multiply_logits<decltype(left)::value, decltype(right)::value>(s); });
      if (op.keys_stay && !then.has_keys_of(at)) key_ring.release();
      if (op.value_chunks) {
        by_order(op.value.channel_first, op.grad.channel_first, [&](auto left, auto right) {
          multiply_values<decltype(left)::value, decltype(right)::value>(at, s, dp, own);
        });
        make_gradient(at, s, dp, own);
        write(step.grad_logits, at);
      } else {
        make_probability(s, own);
        write_probability(at);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_backward_map_kernel(const __grid_constant__ HopperMap<T> op) {
  DNL_DYNAMIC_SHARED_TILES(unsigned char, memory);
  const MapRing ring(memory, memory + kMapBarriers);
  const KeyRing keys(memory + kMapKeys, memory + kMapBarriers + MapRing::kBarrierBytes);
  if (threadIdx.x == 0) {
    ring.init();
    keys.init();
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) load_map_stages(op, ring, keys);
  } else {
    more_registers<kConsumerRegisters>();
    MapConsumer<T>(op, memory, ring, keys).run();
  }
}

template <class T, class Device>
void hopper_backward_map(Device& device, const SoftmaxBackwardStep<T>& step, const Matrix<const T>& key,
                         const Matrix<const T>& query, const Matrix<const T>& value, const Matrix<const T>& grad,
                         float* row_part, int64_t group, int64_t width, int64_t channels, int multiprocessors) {
  HopperMap<T> op{};
  op.step = step;
  op.row_part = row_part;
  op.group = static_cast<int>(group);
  op.row_tiles = static_cast<int>(ceil_div_of(step.rows, kMapTile));
  op.column_tiles = static_cast<int>(ceil_div_of(step.columns, kMapTile));
  op.bands = static_cast<int>(ceil_div_of(op.row_tiles, multiprocessors));
  op.band = static_cast<int>(ceil_div_of(op.row_tiles, op.bands));
  op.tiles = group * op.bands * op.band * op.column_tiles;
  if constexpr (kRuns<Device>) {
    op.key = {key, group, step.rows, width, kMapTile};
    op.query = {query, group, step.columns, width, kMapTile};
  }
  op.logit_chunks = static_cast<int>(ceil_div_of(width, kBox));
  op.keys_stay = op.logit_chunks <= kKeyChunks;
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
