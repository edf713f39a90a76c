// Forward of whitened pairwise attention on CUDA in one kernel (fp16, bf16, and float in TF32; sm_80 and later): the
// map never leaves the chip.
//
// A block owns a tile of queries and a slice of the value channels, and passes once over the keys (or over its split of
// them) in tiles. Eight warps; each owns a 32 x 128 piece of the output in registers, and a piece of each tile of S:
//
//   64 x 64 tile, 512 channels            S, 64 x 64 (keys ->)         O, 64 x 512 (channels ->)
//     queries  0 - 31                     | w0 | w1 | w2 | w3 |        |  w0  |  w1  |  w2  |  w3  |
//     queries 32 - 63                     | w4 | w5 | w6 | w7 |        |  w4  |  w5  |  w6  |  w7  |
//
//   128 x 64 tile, 256 channels: four row groups of two warps.  64 x 32 tile: S in pieces of 16 x 16.
//
// So a row of P is made by several warps and read by all of its row group: P goes through shared memory as rounded, the
// maxima of a row and its sums through a few floats beside it. Per tile of keys, with one buffer each for K and V:
//
//   wait for K | load V | S = Q K^T, maxima | barrier | load K' | P = 2^(c (t - max)) | wait for V, barrier | O += P V
//
// Statistics are float. Scores become t = sign S + bias where they are, and exponents of 2 when the maximum is off
// (pairwise.h). y is divided by the sum of P as rounded, the statistics have the sum before rounding
// (docs/numerics.md). Channels beyond a slice take further passes that know the maximum of each row, so that nothing is
// rescaled there. Splits of the keys leave their unnormalised O and statistics in float to a second kernel, which
// merges them in a fixed order. Traded away: one buffer each for K and V leaves a load one product's time to arrive.
#pragma once

#include "ops/pairwise/fused/output.cuh"

namespace dnl {

template <class T, class Tiling>
__global__ void __launch_bounds__(kThreads, 1) fused_forward_kernel(FusedForward<T> op) {
  constexpr int kRowTiles = kWarpRows / kFragmentRows, kChannelTiles = kWarpChannels / kFragmentRows;
  constexpr int kScoreRowTiles = Tiling::kScoreRowTiles, kScoreColumnTiles = Tiling::kScoreColumnTiles;
  constexpr int kQueries = Tiling::kQueries, kKeys = Tiling::kKeys;
  const float kLowest = -std::numeric_limits<float>::infinity();

  DNL_DYNAMIC_SHARED(unsigned char, memory);
  const auto shared = [&](int offset) { return reinterpret_cast<T*>(memory + offset); };
  const Tile<T> query_tile{shared(op.shared.query), kQueries, op.width, op.query.channel_first, true};
  const Tile<T> key_tile{shared(op.shared.key), kKeys, op.width, op.key.channel_first, true};
  const Tile<T> value_tile{shared(op.shared.value), kKeys, op.slice_channels, op.value.channel_first, false};
  const Tile<T> probability_tile{shared(op.shared.probability), kQueries, kKeys, false, true};
  float* statistics = reinterpret_cast<float*>(memory + op.shared.statistics);  // (2, kScoreGroups, kQueries)

  const ForwardPlace<Tiling> at(op);
  const bool known = at.known();
  const int lane = threadIdx.x % kWarp;
  const T *query = op.query.x.element(at.b), *key = op.key.x.element(at.b), *value = op.value.x.element(at.b);
  const float* bias = op.bias.data ? op.bias.element(at.b) : nullptr;
  load_tile(query_tile, op.query, query, at.first_query, 0);
  load_tile(key_tile, op.key, key, at.begin * kKeys, 0);
  cp_async_commit();

  const FragmentReader<T> queries(query_tile), keys(key_tile), values(value_tile), probabilities(probability_tile);
  float out[kChannelTiles][kRowTiles][2][4] = {};
  // Of the rows of `out`: what P is relative to. Of the rows of the scores: sums of P, before and after rounding.
  float most[kRowTiles][2], sum[kScoreRowTiles][2] = {}, stored[kScoreRowTiles][2] = {};
  for (int m = 0; m < kRowTiles; ++m)
    for (int h = 0; h < 2; ++h) {
      most[m][h] = kLowest;
      const int64_t i = at.first_query + at.row + m * kFragmentRows + fragment_row(h);
      if (known && i < op.queries) most[m][h] = op.maxima[at.b * op.queries + i];
    }

  for (int64_t tile = at.begin; tile < at.end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there; V, P and the maxima of the last tile are done with
    load_tile(value_tile, op.value, value, tile * kKeys, at.first_channel);
    cp_async_commit();

    float scores[kScoreColumnTiles][kScoreRowTiles][2][4] = {};
    for (int depth = 0; depth < op.width; depth += kDepth<T>) {
      uint32_t a[kScoreRowTiles][4];
      for (int m = 0; m < kScoreRowTiles; ++m) queries.load(a[m], at.score_row + m * kFragmentRows, depth);
      for (int n = 0; n < kScoreColumnTiles; ++n) {
        uint32_t f[4];
        keys.load(f, at.score_key + n * kFragmentRows, depth);
        multiply<T>(scores[n], a, f);
      }
    }

    // t; -inf beyond the last key.
    for (int n = 0; n < kScoreColumnTiles; ++n)
      for (int half = 0; half < 2; ++half)
        for (int u = 0; u < 2; ++u) {
          const int64_t j = tile * kKeys + at.score_key + n * kFragmentRows + half * 8 + fragment_column() + u;
          const float more = bias && j < op.keys ? bias[j] : 0.0f;
          for (int m = 0; m < kScoreRowTiles; ++m)
            for (int h = 0; h < 2; ++h) {
              float& s = scores[n][m][half][2 * h + u];
              s = j >= op.keys ? kLowest : s * op.sign + more;
            }
        }

    float correction[kRowTiles][2];
    if (!known) {
      for (int m = 0; m < kScoreRowTiles; ++m)
        for (int h = 0; h < 2; ++h) {
          float largest = kLowest;
          for (int n = 0; n < kScoreColumnTiles; ++n)
            for (int e = 0; e < 4; ++e) {
              const float x = scores[n][m][e / 2][2 * h + e % 2];
              largest = x > largest ? x : largest;
            }
          for (int step = 1; step <= 2; step *= 2) {
            const float other = __shfl_xor_sync(kAllLanes, largest, step);
            largest = other > largest ? other : largest;
          }
          if (lane % 4 == 0)
            statistics[at.score_group * kQueries + at.score_row + m * kFragmentRows + fragment_row(h)] = largest;
        }
    }
    __syncthreads();  // the maxima are there; the keys are done with
    if (tile + 1 < at.end) load_tile(key_tile, op.key, key, (tile + 1) * kKeys, 0);
    cp_async_commit();

    if (!known) {
      for (int m = 0; m < kRowTiles; ++m)
        for (int h = 0; h < 2; ++h) {
          const float before = most[m][h];
          for (int g = 0; g < Tiling::kScoreGroups; ++g) {
            const float x = statistics[g * kQueries + at.row + m * kFragmentRows + fragment_row(h)];
            most[m][h] = x > most[m][h] ? x : most[m][h];
          }
          const float off = most[m][h] == kLowest ? 0.0f : most[m][h];  // -inf less -inf would be NaN
          correction[m][h] = exp2_approx((before - off) * op.magnitude);
        }
    }

    for (int m = 0; m < kScoreRowTiles; ++m)
      for (int h = 0; h < 2; ++h) {
        const bool second = at.second_half();
        const float relative = second ? most[1][h] : most[m][h];
        const float off = relative == kLowest ? 0.0f : relative;
        if (!known) {
          const float factor = second ? correction[1][h] : correction[m][h];
          sum[m][h] *= factor;
          stored[m][h] *= factor;
        }
        T* to = probability_tile.data +
                (at.score_row + m * kFragmentRows + fragment_row(h)) * probability_tile.pitch() + at.score_key +
                fragment_column();
        for (int n = 0; n < kScoreColumnTiles; ++n)
          for (int half = 0; half < 2; ++half) {
            const float* s = &scores[n][m][half][2 * h];
            const float low = exp2_approx((s[0] - off) * op.magnitude);
            const float high = exp2_approx((s[1] - off) * op.magnitude);
            sum[m][h] += low + high;
            stored[m][h] += store_rounded<T>(to + n * kFragmentRows + half * 8, low, high);
          }
      }
    cp_async_wait<1>();
    __syncthreads();  // P and V are there

    if (!known) {
      for (int n = 0; n < kChannelTiles; ++n)
        for (int m = 0; m < kRowTiles; ++m)
          for (int e = 0; e < 8; ++e) out[n][m][e / 4][e % 4] *= correction[m][e % 4 / 2];
    }
    for (int depth = 0; depth < kKeys; depth += kDepth<T>) {
      uint32_t a[kRowTiles][4];
      for (int m = 0; m < kRowTiles; ++m) probabilities.load(a[m], at.row + m * kFragmentRows, depth);
      for (int n = 0; n < kChannelTiles; ++n) {
        if (n * kFragmentRows >= op.group_channels) break;
        uint32_t f[4];
        values.load(f, at.channel + n * kFragmentRows, depth);
        multiply<T>(out[n], a, f);
      }
    }
  }
  cp_async_wait<0>();
  fused_forward_finish<T, Tiling>(op, out, most, sum, stored, at, memory);
}

// ---------------------------------------------------------------------------------------------------------------------
// Driver
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void (*fused_forward_kernel_of(int tile))(FusedForward<T>) {
  static_assert(std::size(kForwardTiles) == 3, "one kernel per tile of the plan");
  switch (tile) {
    case 0:
      return &fused_forward_kernel<T, ForwardTiling<kForwardTiles[0].queries, kForwardTiles[0].keys>>;
    case 1:
      return &fused_forward_kernel<T, ForwardTiling<kForwardTiles[1].queries, kForwardTiles[1].keys>>;
    default:
      return &fused_forward_kernel<T, ForwardTiling<kForwardTiles[2].queries, kForwardTiles[2].keys>>;
  }
}

// What the plan of a call depends on.
template <class T>
PairwiseShape shape_of(const PairwiseArgs& args) {
  const auto channel_first = [](const View& view, int64_t positions, int64_t channels) {
    Matrix<const T> x;
    x.position = view.position, x.channel = view.channel;
    return position_is_fast(x, positions, channels);
  };
  PairwiseShape shape;
  shape.dtype = args.dtype;
  shape.batches = args.batches, shape.queries = args.queries, shape.keys = args.keys;
  shape.width = args.width, shape.channels = args.channels;
  shape.query_channel_first = channel_first(args.query, args.queries, args.width);
  shape.key_channel_first = channel_first(args.key, args.keys, args.width);
  shape.value_channel_first = channel_first(args.value, args.keys, args.channels);
  return shape;
}

// Every tile of queries reads all keys and values. From this many on, an operand whose lines are not aligned is copied
// once to where they are, in its own order, rather than read element by element each time.
constexpr int64_t kReadsWorthACopy = 3;

// T is what is multiplied, Tf32 for calls in float.
template <class T, class Device>
void pairwise_fused_forward_cuda(const PairwiseArgs& args, Device& device, const ForwardPlan& plan) {
  using Result = ResultOf<T>;
  const PairwiseOperands<Result, Device, T> in(args, device, Placement::as_they_lie);
  const ForwardTile& tile = kForwardTiles[plan.tile];
  FusedForward<T> op{};
  op.query = {in.query, args.queries, args.width};
  const auto read_often = [&](const Matrix<const T>& x, int64_t channels) {
    const FusedOperand<T> operand(x, args.keys, channels);
    if constexpr (kHalf<T>)  // of Tf32, the operands are aligned copies already
      if (!operand.aligned && ceil_div_of(args.queries, tile.queries) >= kReadsWorthACopy)
        return FusedOperand<T>(product_operand<T>(device, x, args.batches, args.keys, channels, nullptr), args.keys,
                               channels);
    return operand;
  };
  op.key = read_often(in.key, args.width);
  op.value = read_often(in.value, args.channels);
  op.bias = in.bias;
  op.output = matrix_of<Result>("query", args.output, args.batches);
  op.residual = matrix_of<Result>("query", args.residual, args.batches);
  op.offset = in.offset;
  op.stats = static_cast<float*>(args.stats);
  op.batches = args.batches, op.queries = args.queries, op.keys = args.keys, op.channels = args.channels;
  op.width = plan.width;
  op.slice_channels = plan.slice_channels;
  op.group_channels = plan.slice_channels / column_groups_of(tile);
  op.splits = plan.splits;
  op.position_fast = position_is_fast(op.output, args.queries, args.channels);
  op.shared = plan.shared;
  op.sign = in.sign;
  op.magnitude = args.magnitude<float>(kLog2OfE);
  if (plan.slices > 1) op.maxima = device.template allocate<float>(args.batches * args.queries);
  if (plan.splits > 1) {
    const int64_t rows = plan.splits * args.batches * args.queries;
    op.partial = device.template allocate<float>(rows * args.channels);
    op.split_statistics = device.template allocate<float>(rows * 3);
  }
  // The first slice finds the maxima that the others take.
  for (int first = 0; first < plan.slices; first = first ? plan.slices : 1) {
    op.first_slice = first;
    op.slices = first ? plan.slices - 1 : 1;
    const int64_t blocks = args.batches * ceil_div_of(args.queries, tile.queries) * plan.splits * op.slices;
    device.launch(fused_forward_kernel_of<T>(plan.tile), LaunchShape{blocks, kThreads, plan.shared.bytes}, op);
    if (plan.splits == 1) continue;
    const int64_t first_channel = int64_t(first) * plan.slice_channels;
    const int64_t end_channel = std::min(args.channels, int64_t(first + op.slices) * plan.slice_channels);
    const int64_t merges = args.batches * ceil_div_of(args.queries, kWarp);
    device.launch(&fused_merge_kernel<T>, LaunchShape{merges, kThreads, 0}, op, first_channel, end_channel);
  }
}

}  // namespace dnl
