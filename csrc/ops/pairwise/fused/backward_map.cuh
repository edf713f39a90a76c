// The map of the backward for halves in one kernel (sm_80 and later): both products of a chunk stay in registers, and
// only P' and dS', in 16 bits, reach memory. The rest of the backward is the chain's (chain/backward.cuh).
//
// A block makes 128 keys x 128 queries of both S' = K Q^T and dP' = V dO^T. Eight warps, 64 keys x 32 queries each:
//
//                     queries ->
//     keys   0 - 63   | w0 | w1 | w2 | w3 |      per warp 4 x 2 fragments of 16 x 16, twice: 128 floats a thread
//     keys  64 - 127  | w4 | w5 | w6 | w7 |
//
// It walks over the channels of K and Q, then of V and dO, 64 at a time in two buffers: one loads while the other is
// multiplied, with one barrier for each 64 channels. So any width will do. Then P' and
// dS' = P' (dP' - Delta) are rounded in registers and leave through shared memory in lines of 16 bytes. Sums of dS'
// over the block's queries are written per block, and added in order by a second kernel.
#pragma once

#include "ops/pairwise/chain/backward_map.cuh"
#include "ops/pairwise/fused/tile.cuh"

namespace dnl {

constexpr int kMapWarpRows = 64, kMapWarpColumns = 32;
constexpr int kMapColumnWarps = kMapTile / kMapWarpColumns;
static_assert(kMapTile / kMapWarpRows * kMapColumnWarps == kWarps, "every warp has a piece of the tile");

template <class T>
struct FusedMap {
  static_assert(kHalf<T>, "float needs P normalised anew");
  SoftmaxBackwardStep<T> step;
  FusedOperand<T> key, query;   // (group, rows, width), (group, columns, width)
  FusedOperand<T> value, grad;  // (group, rows, channels), (group, columns, channels)
  float* row_part;              // (group, rows, column tiles): sums of dS', or null
  int stages;                   // buffers of operands
};

// In shared memory beside the operands: what makes P and dS', of a block's rows and columns; sums of dS'.
struct MapSums {
  float bias[kMapTile];  // of rows
  float shift[kMapTile], factor[kMapTile], delta[kMapTile];
  float of_warps[kMapColumnWarps][kMapTile];
};
static_assert(sizeof(MapSums) == kMapSumsBytes, "as the plan has it");

// This thread's share of what MapSums has from global memory: half of the threads have a row each, the others a column.
template <class T>
struct MapSumsLoad {
  static_assert(kThreads == 2 * kMapTile);
  float bias = 0;
  // Beyond the last query P is exp2(-inf) = 0.
  float shift = std::numeric_limits<float>::infinity(), factor = 0, delta = 0;

  DNL_DEVICE MapSumsLoad(const SoftmaxBackwardStep<T>& step, int64_t b, int64_t first_row, int64_t first_column) {
    const int at = threadIdx.x % kMapTile;
    const int64_t i = (of_row() ? first_row : first_column) + at;
    if (of_row()) {
      if (step.bias.data && i < step.rows) bias = step.bias.element(b)[i];
    } else if (i < step.columns) {
      shift = step.shift.element(b)[i];
      factor = step.row_factor.element(b)[i];
      if (step.grad_logits) delta = step.delta.element(b)[i];
    }
  }
  DNL_DEVICE void store(MapSums& sums) const {
    const int at = threadIdx.x % kMapTile;
    if (of_row())
      sums.bias[at] = bias;
    else
      sums.shift[at] = shift, sums.factor[at] = factor, sums.delta[at] = delta;
  }
  static DNL_DEVICE bool of_row() { return threadIdx.x < kMapTile; }
};

// P' and dS' of the block from its products, and their way out.
template <class T, int kRowTiles, int kColumnTiles>
DNL_DEVICE void fused_backward_map_finish(const FusedMap<T>& op, const float (&s)[kColumnTiles][kRowTiles][2][4],
                                          const float (&dp)[kColumnTiles][kRowTiles][2][4], unsigned char* memory,
                                          MapSums& sums, int64_t b, int64_t first_row, int64_t first_column, int row,
                                          int column) {
  constexpr int kPitch = kMapTile + kLineElements<T>;
  constexpr float factor = 1 << kProbabilityExponent<T>;
  static_assert(2 * kMapTile * kPitch * sizeof(T) <= 4 * kMapOperandBytes, "two results fit in place of two buffers");
  const SoftmaxBackwardStep<T>& step = op.step;
  T *probability = reinterpret_cast<T*>(memory), *grad_logits = probability + kMapTile * kPitch;
  const float grad_scale = kScaledGradient<T> && step.grad_scale ? step.grad_scale[b] : 1.0f;

  // Of this lane's columns: what makes P, and Delta.
  float shift[kColumnTiles][2][2], row_factor[kColumnTiles][2][2], delta[kColumnTiles][2][2];
  for (int n = 0; n < kColumnTiles; ++n)
    for (int half = 0; half < 2; ++half)
      for (int u = 0; u < 2; ++u) {
        const int i = column + n * kFragmentRows + half * 8 + fragment_column() + u;
        shift[n][half][u] = sums.shift[i];
        row_factor[n][half][u] = sums.factor[i];
        delta[n][half][u] = sums.delta[i];
      }

#pragma unroll  // or `s` and `dp` are indexed, and leave the registers
  for (int m = 0; m < kRowTiles; ++m)
    for (int h = 0; h < 2; ++h) {
      const int r = row + m * kFragmentRows + fragment_row(h);
      const float bias = sums.bias[r];
      float sum = 0;
      for (int n = 0; n < kColumnTiles; ++n)
        for (int half = 0; half < 2; ++half) {
          const int at = r * kPitch + column + n * kFragmentRows + half * 8 + fragment_column();
          float p[2], ds[2];
          for (int u = 0; u < 2; ++u) {
            const float exponent = (s[n][m][half][2 * h + u] * step.sign + bias - shift[n][half][u]) * step.magnitude;
            p[u] = row_factor[n][half][u] * exp2_approx(not_positive(exponent));
            ds[u] = grad_scale * softmax_jacobian(p[u], dp[n][m][half][2 * h + u], delta[n][half][u]);
          }
          float unused = 0;
          *reinterpret_cast<Packed<T>*>(probability + at) = round_both<T>(factor * p[0], factor * p[1], unused);
          *reinterpret_cast<Packed<T>*>(grad_logits + at) = round_both<T>(ds[0], ds[1], sum);
        }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (threadIdx.x % 4 == 0) sums.of_warps[column / kMapWarpColumns][r] = sum;
    }
  __syncthreads();

  const int64_t left = step.rows - first_row;
  const int rows = left < kMapTile ? static_cast<int>(left) : kMapTile;
  if (op.row_part && static_cast<int>(threadIdx.x) < rows) {
    float sum = 0;
    for (int w = 0; w < kMapColumnWarps; ++w) sum += sums.of_warps[w][threadIdx.x];
    const int64_t column_blocks = ceil_div_of(step.columns, kMapTile);
    op.row_part[(b * step.rows + first_row + threadIdx.x) * column_blocks + first_column / kMapTile] = sum;
  }
  constexpr int kLines = kMapTile / kLineElements<T>, kStep = kThreads / kLines;
  const int c = threadIdx.x % kLines * kLineElements<T>;
  if (first_column + c >= step.pitch) return;
  const auto leave = [&](T* out, const T* from) {
    int r = threadIdx.x / kLines;
    const T* line = from + r * kPitch + c;
    T* to = out + (b * step.rows + first_row + r) * step.pitch + first_column + c;
#pragma unroll 4
    for (; r < rows; r += kStep, line += kStep * kPitch, to += kStep * step.pitch)
      *reinterpret_cast<Line<T>*>(to) = *reinterpret_cast<const Line<T>*>(line);
  };
  if (step.probability) leave(step.probability, probability);
  if (step.grad_logits) leave(step.grad_logits, grad_logits);
}

template <class T, bool kChannelFirst>
__global__ void __launch_bounds__(kThreads, 1) fused_backward_map_kernel(FusedMap<T> op) {
  constexpr int kRowTiles = kMapWarpRows / kFragmentRows, kColumnTiles = kMapWarpColumns / kFragmentRows;
  const SoftmaxBackwardStep<T>& step = op.step;
  const bool need_logits = step.grad_logits;
  DNL_DYNAMIC_SHARED(unsigned char, memory);

  const int64_t row_blocks = ceil_div_of(step.rows, kMapTile), column_blocks = ceil_div_of(step.columns, kMapTile);
  const int64_t row_block = blockIdx.x % row_blocks, column_block = blockIdx.x / row_blocks % column_blocks;
  const int64_t b = blockIdx.x / row_blocks / column_blocks;
  const int64_t first_row = row_block * kMapTile, first_column = column_block * kMapTile;
  const int warp = threadIdx.x / kWarp;
  const int row = warp / kMapColumnWarps * kMapWarpRows, column = warp % kMapColumnWarps * kMapWarpColumns;

  using Operand = Tile<T, kMapTile, kChannelFirst, true>;
  using Loader = TileLoader<T, Operand, kThreads, true>;
  const auto tile = [&](int buffer, int side) {
    return Operand{reinterpret_cast<T*>(memory + (2 * buffer + side) * kMapOperandBytes), kMapDepth};
  };
  const int logit_chunks = static_cast<int>(ceil_div_of(op.key.channels, kMapDepth));
  const int chunks = logit_chunks + (need_logits ? static_cast<int>(ceil_div_of(op.value.channels, kMapDepth)) : 0);
  Loader row_loader(tile(0, 0), op.key, b, first_row, 0), column_loader(tile(0, 1), op.query, b, first_column, 0);
  int loaded = 0, left = static_cast<int>(op.key.channels);  // chunks; channels of the operand that are not loaded
  // Begins with a buffer's copies of the next chunk, makes one, ends: kCopies, of a thread and side.
  constexpr int kCopies = kMapTile * kMapDepth / kLineElements<T> / kThreads;
  static_assert(kCopies == kStepFragments, "a copy of each side for each product");
  const auto begin = [&](int buffer) {
    if (loaded == logit_chunks) {
      row_loader = Loader(tile(0, 0), op.value, b, first_row, 0);
      column_loader = Loader(tile(0, 1), op.grad, b, first_column, 0);
      left = static_cast<int>(op.value.channels);
    }
    row_loader.tile = tile(buffer, 0), column_loader.tile = tile(buffer, 1);
    row_loader.begin(at_most_of(left, kMapDepth)), column_loader.begin(at_most_of(left, kMapDepth));
  };
  const auto copy = [&](int number) { row_loader.copy(number), column_loader.copy(number); };
  const auto end = [&] {
    row_loader.end(), column_loader.end();
    ++loaded, left -= kMapDepth;
    cp_async_commit();
  };

  float s[kColumnTiles][kRowTiles][2][4] = {}, dp[kColumnTiles][kRowTiles][2][4] = {};
  const MapSumsLoad<T> sums_load(step, b, first_row, first_column);
#pragma unroll 1
  for (int buffer = 0; buffer + 1 < op.stages; ++buffer) {
    if (loaded < chunks) {
      begin(buffer);
      for (int number = 0; number < kCopies; ++number) copy(number);
    }
    end();
  }
  MapSums& sums = *reinterpret_cast<MapSums*>(memory + op.stages * 2 * kMapOperandBytes);
  sums_load.store(sums);  // there are barriers before the results need it
  int buffer = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (op.stages == 2)
      cp_async_wait<0>();
    else
      cp_async_wait<kMapStages - 2>();
    __syncthreads();  // this chunk is there; the one before is done with
    const bool loads = loaded < chunks;
    const auto load = [&](int number) {
      if (loads && number == 0) begin(buffer ? buffer - 1 : op.stages - 1);
      if (loads) copy(number);
    };
    const FragmentReader<T, Operand::kAcross, false> rows(tile(buffer, 0), row);
    const FragmentReader<T, Operand::kAcross, true> columns(tile(buffer, 1), column);
    if (chunk < logit_chunks)  // by a branch: `s` and `dp` by an address would leave the registers
      multiply_tiles<T, kStepFragments>(s, rows, columns, kMapDepth, load);
    else
      multiply_tiles<T, kStepFragments>(dp, rows, columns, kMapDepth, load);
    end();
    buffer = buffer + 1 < op.stages ? buffer + 1 : 0;
  }
  __syncthreads();  // the operands are done with: results go out through their memory
  fused_backward_map_finish<T>(op, s, dp, memory, sums, b, first_row, first_column, row, column);
}

// out(b, j) = sum over parts, in their order
struct PartSum {
  using Sum = float;
  const float* part;  // (batches, positions, channels)
  int64_t batches, positions, channels;
  float* out;  // (batches, positions)

  struct Term {
    const float* part;
    int64_t channels;

    DNL_HOST_DEVICE float operator()(int64_t j, int64_t c) const { return part[j * channels + c]; }
  };
  DNL_HOST_DEVICE Term at(int64_t b) const { return {part + b * positions * channels, channels}; }
  DNL_HOST_DEVICE void store(int64_t b, int64_t j, float sum) const { out[b * positions + j] = sum; }
};

// Operands of the map, (batches, positions, channels), in the order of most of them; the others as copies.
template <class T>
struct MapOperands {
  Matrix<const T> key, query, value, grad;
  bool channel_first = false;

  template <class Device>
  void in_one_order(Device& device, const PairwiseArgs& args) {
    const auto first = [](const Matrix<const T>& x, int64_t positions, int64_t channels) {
      return position_is_fast(x, positions, channels);
    };
    channel_first = first(key, args.keys, args.width) + first(query, args.queries, args.width) +
                        first(value, args.keys, args.channels) + first(grad, args.queries, args.channels) >=
                    2;
    const auto put = [&](Matrix<const T>& x, int64_t positions, int64_t channels) {
      x = fused_operand(device, x, args.batches, positions, channels, channel_first, kReadsWorthACopy).x;
    };
    put(key, args.keys, args.width), put(query, args.queries, args.width);
    put(value, args.keys, args.channels), put(grad, args.queries, args.channels);
  }
};

// P', dS' and the sums of dS' of a chunk: step.logits and step.grad_probability are not read.
template <class T, class Device>
void fused_backward_map(Device& device, const SoftmaxBackwardStep<T>& step,
                        const MapOperands<T>& in,  // key and value: (group, rows, .); query, grad: (group, columns, .)
                        int64_t width, int64_t channels,
                        float* row_part,  // (group, rows, tiles of columns), or null as step.row_sum is
                        int64_t group) {
  const int64_t row_blocks = ceil_div_of(step.rows, kMapTile), column_blocks = ceil_div_of(step.columns, kMapTile);
  const int stages = map_stages(device.gpu());
  const auto operand = [&](const Matrix<const T>& x, int64_t positions, int64_t count) {
    return FusedOperand<T>(x, positions, count, in.channel_first);
  };
  const FusedMap<T> op{step,
                       operand(in.key, step.rows, width),
                       operand(in.query, step.columns, width),
                       operand(in.value, step.rows, channels),
                       operand(in.grad, step.columns, channels),
                       row_part,
                       stages};
  device.launch(in.channel_first ? &fused_backward_map_kernel<T, true> : &fused_backward_map_kernel<T, false>,
                LaunchShape{group * row_blocks * column_blocks, kThreads, map_shared_bytes(stages)}, op);
  if (step.row_sum) row_sums(device, PartSum{row_part, group, step.rows, column_blocks, step.row_sum}, false);
}

}  // namespace dnl
