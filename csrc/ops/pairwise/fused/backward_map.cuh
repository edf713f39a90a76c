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
};

// c += A B^T over the channels of one pair of tiles in shared memory.
template <class T, int kRowTiles, int kColumnTiles>
DNL_DEVICE void multiply_tiles(float (&c)[kColumnTiles][kRowTiles][2][4], const Tile<T>& left, const Tile<T>& right,
                               int row, int column, int depth_end) {
  const FragmentReader<T> rows(left), columns(right);
  for (int depth = 0; depth < depth_end; depth += kDepth<T>) {
    uint32_t a[kRowTiles][4];
    for (int m = 0; m < kRowTiles; ++m) rows.load(a[m], row + m * kFragmentRows, depth);
    for (int n = 0; n < kColumnTiles; ++n) {
      uint32_t b[4];
      columns.load(b, column + n * kFragmentRows, depth);
      multiply<T>(c[n], a, b);
    }
  }
}

// P' and dS' of the block from its products, and their way out.
template <class T, int kRowTiles, int kColumnTiles>
DNL_DEVICE void fused_backward_map_finish(const FusedMap<T>& op, const float (&s)[kColumnTiles][kRowTiles][2][4],
                                          const float (&dp)[kColumnTiles][kRowTiles][2][4], unsigned char* memory,
                                          int64_t b, int64_t first_row, int64_t first_column, int row, int column) {
  constexpr int kPitch = kMapTile + kLineElements<T>;
  constexpr float factor = 1 << kProbabilityExponent<T>;
  static_assert(2 * kMapTile * kPitch * sizeof(T) + kMapColumnWarps * kMapTile * sizeof(float) <= kMapSharedBytes,
                "two results and the row sums fit in place of the operands");
  const SoftmaxBackwardStep<T>& step = op.step;
  T *probability = reinterpret_cast<T*>(memory), *grad_logits = probability + kMapTile * kPitch;
  float* sums = reinterpret_cast<float*>(grad_logits + kMapTile * kPitch);  // (kMapColumnWarps, kMapTile)
  const float grad_scale = step.grad_scale ? step.grad_scale[b] : 1.0f;

  // Of this lane's columns: what makes P, and Delta.
  float shift[kColumnTiles][2][2], row_factor[kColumnTiles][2][2], delta[kColumnTiles][2][2];
  for (int n = 0; n < kColumnTiles; ++n)
    for (int half = 0; half < 2; ++half)
      for (int u = 0; u < 2; ++u) {
        const int64_t i = first_column + column + n * kFragmentRows + half * 8 + fragment_column() + u;
        const bool inside = i < step.columns;
        // Beyond the last query P is exp2(-inf) = 0.
        shift[n][half][u] = inside ? step.shift.element(b)[i] : std::numeric_limits<float>::infinity();
        row_factor[n][half][u] = inside ? step.row_factor.element(b)[i] : 0.0f;
        delta[n][half][u] = inside && step.grad_logits ? step.delta.element(b)[i] : 0.0f;
      }

#pragma unroll  // or `s` and `dp` are indexed, and leave the registers
  for (int m = 0; m < kRowTiles; ++m)
    for (int h = 0; h < 2; ++h) {
      const int r = row + m * kFragmentRows + fragment_row(h);
      const bool inside = first_row + r < step.rows;
      const float bias = step.bias.data && inside ? step.bias.element(b)[first_row + r] : 0.0f;
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
          store_rounded<T>(probability + at, factor * p[0], factor * p[1]);
          sum += store_rounded<T>(grad_logits + at, ds[0], ds[1]);
        }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (threadIdx.x % 4 == 0) sums[column / kMapWarpColumns * kMapTile + r] = sum;
    }
  __syncthreads();

  const int64_t left = step.rows - first_row;
  const int rows = left < kMapTile ? static_cast<int>(left) : kMapTile;
  if (op.row_part && static_cast<int>(threadIdx.x) < rows) {
    float sum = 0;
    for (int w = 0; w < kMapColumnWarps; ++w) sum += sums[w * kMapTile + threadIdx.x];
    const int64_t column_blocks = ceil_div_of(step.columns, kMapTile);
    op.row_part[(b * step.rows + first_row + threadIdx.x) * column_blocks + first_column / kMapTile] = sum;
  }
  constexpr int kLines = kMapTile / kLineElements<T>;
  for (int index = threadIdx.x; index < rows * kLines; index += kThreads) {
    const int r = index / kLines, c = index % kLines * kLineElements<T>;
    if (first_column + c >= step.pitch) continue;
    const int64_t to = (b * step.rows + first_row + r) * step.pitch + first_column + c;
    const auto copy = [&](T* out, const T* from) {
      *reinterpret_cast<Line<T>*>(out + to) = *reinterpret_cast<const Line<T>*>(from + r * kPitch + c);
    };
    if (step.probability) copy(step.probability, probability);
    if (step.grad_logits) copy(step.grad_logits, grad_logits);
  }
}

template <class T>
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

  const auto tile = [&](int chunk, int side, bool channel_first) {
    unsigned char* at = memory + (chunk % kMapStages * 2 + side) * kMapOperandBytes;
    return Tile<T>{reinterpret_cast<T*>(at), kMapTile, kMapDepth, channel_first, true};
  };
  const int logit_chunks = static_cast<int>(ceil_div_of(op.key.channels, kMapDepth));
  const int chunks = logit_chunks + (need_logits ? static_cast<int>(ceil_div_of(op.value.channels, kMapDepth)) : 0);
  const auto load = [&](int chunk) {
    const bool first = chunk < logit_chunks;
    const FusedOperand<T>&left = first ? op.key : op.value, &right = first ? op.query : op.grad;
    const int64_t channel = int64_t(first ? chunk : chunk - logit_chunks) * kMapDepth;
    load_tile(tile(chunk, 0, left.channel_first), left, left.x.element(b), first_row, channel);
    load_tile(tile(chunk, 1, right.channel_first), right, right.x.element(b), first_column, channel);
    cp_async_commit();
  };

  float s[kColumnTiles][kRowTiles][2][4] = {}, dp[kColumnTiles][kRowTiles][2][4] = {};
  load(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<0>();
    __syncthreads();  // this chunk is there; the other buffer is done with
    if (chunk + 1 < chunks) load(chunk + 1);
    const bool first = chunk < logit_chunks;
    const FusedOperand<T>&left = first ? op.key : op.value, &right = first ? op.query : op.grad;
    const Tile<T> a = tile(chunk, 0, left.channel_first), c = tile(chunk, 1, right.channel_first);
    const int64_t channels_left = left.channels - int64_t(first ? chunk : chunk - logit_chunks) * kMapDepth;
    const int depth = channels_left < kMapDepth ? static_cast<int>(channels_left) : kMapDepth;
    if (first)
      multiply_tiles<T>(s, a, c, row, column, depth);
    else
      multiply_tiles<T>(dp, a, c, row, column, depth);
  }
  __syncthreads();  // the operands are done with: results go out through their memory
  fused_backward_map_finish<T>(op, s, dp, memory, b, first_row, first_column, row, column);
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

// P', dS' and the sums of dS' of a chunk: step.logits and step.grad_probability are not read.
template <class T, class Device>
void fused_backward_map(Device& device, const SoftmaxBackwardStep<T>& step,
                        const FusedOperand<T>& key,    // (group, rows, width)
                        const FusedOperand<T>& query,  // (group, columns, width)
                        const FusedOperand<T>& value,  // (group, rows, channels)
                        const FusedOperand<T>& grad,   // (group, columns, channels)
                        float* row_part,               // (group, rows, tiles of columns), or null as step.row_sum is
                        int64_t group) {
  const int64_t row_blocks = ceil_div_of(step.rows, kMapTile), column_blocks = ceil_div_of(step.columns, kMapTile);
  const FusedMap<T> op{step, key, query, value, grad, row_part};
  device.launch(&fused_backward_map_kernel<T>,
                LaunchShape{group * row_blocks * column_blocks, kThreads, kMapSharedBytes}, op);
  if (step.row_sum) row_sums(device, PartSum{row_part, group, step.rows, column_blocks, step.row_sum}, false);
}

}  // namespace dnl
