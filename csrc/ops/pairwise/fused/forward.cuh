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
// maxima of a row and its sums through a few floats beside it. Softmax is a tile ahead of the product with the values,
// with one buffer each for K, V and P. Per tile t of keys:
//
//   wait for K(t+1), barrier | load V(t)   | store P(t), S = Q K(t+1)^T and its maxima
//   wait for V(t), barrier   | load K(t+2) | O += P(t) V(t)  and  P(t+1) = 2^(c (S - max)), in registers
//
// Warps w and w + 4 share a scheduler. Between the second barrier and the next, one does the product first and the
// other softmax, so that neither the tensor cores nor the rest of the scheduler waits for a phase of the other.
//
// Statistics are float. Scores become t = sign S + bias where they are, and exponents of 2 when the maximum is off
// (pairwise.h). The bias of a tile, which is loaded a tile ahead, is where the product starts to add. O is rescaled
// only where a maximum grew. y is divided by the sum of P as rounded, the statistics have the sum before rounding
// (docs/numerics.md). Channels beyond a slice take further passes that know the maximum of each row, so that nothing is
// rescaled there. Splits of the keys leave their unnormalised O and statistics in float to a second kernel, which
// merges them in a fixed order. Traded away: every warp reads its queries and its row group's P again for each tile,
// and shared memory, rather than the tensor cores, bounds 64 x 64 tiles.
#pragma once

#include "ops/pairwise/fused/output.cuh"

namespace dnl {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// The softmax of a warp's piece of S, a tile of keys at a time: logits and their maxima, what P is relative to, P.
template <class T, class Tiling>
struct ScorePiece {
  static constexpr int kRows = kWarpRows / kFragmentRows;
  static constexpr int kRowTiles = Tiling::kScoreRowTiles, kColumnTiles = Tiling::kScoreColumnTiles;

  const FusedForward<T>& op;
  const ForwardPlace<Tiling>& at;
  const float* bias;  // of this lane's first key of the tile whose bias is loaded next, or null
  float* maxima;      // shared: (kQueries, kScoreGroups)

  float scores[kColumnTiles][kRowTiles][2][4];  // t, then the bits of P as it is stored: of halves, in every other one
  Neighbours<float> more[kColumnTiles][2];      // the bias of this lane's keys
  float most[kRows][2], correction[kRows][2];   // of the rows of `out`: what P is relative to, and what it was to that
  float sum[kRowTiles][2] = {}, stored[kRowTiles][2] = {};  // of P, before and after rounding

  // The bias of this lane's keys in the next tile, where `left` keys are left; -inf beyond the last one, whose S is 0.
  DNL_DEVICE void load_bias(int left) {
    if (bias && left >= Tiling::kKeys) {
      const auto* pairs = reinterpret_cast<const Neighbours<float>*>(bias);
      for (int n = 0; n < kColumnTiles; ++n)
        for (int half = 0; half < 2; ++half) more[n][half] = pairs[(n * kFragmentRows + half * 8) / 2];
    } else {
      const int own = left - at.score_key - fragment_column();  // keys from this lane's first one on
      const auto one = [&](int j) { return j >= own ? kLowest : bias ? bias[j] : 0.0f; };
      for (int n = 0; n < kColumnTiles; ++n)
        for (int half = 0; half < 2; ++half) {
          const int j = n * kFragmentRows + half * 8;
          more[n][half] = {one(j), one(j + 1)};
        }
    }
    if (bias) bias += Tiling::kKeys;
  }

  // t of the tile whose bias was loaded and of which `left` keys were left, and the maxima of its rows for the other
  // warps. The product is added to the bias.
  template <class Queries, class Keys>
  DNL_DEVICE void logits(const Queries& queries, const Keys& keys, int left) {
    const auto bias_of = [&](int n, int e) { return e % 2 ? more[n][e / 4].hi : more[n][e / 4].lo; };
    const bool flat = op.sign == 0;  // the bias is 0 or -inf, and -inf times 0 would be NaN
    for (int n = 0; n < kColumnTiles; ++n)
      for (int m = 0; m < kRowTiles; ++m)
        for (int e = 0; e < 8; ++e) scores[n][m][e / 4][e % 4] = flat ? 0.0f : op.sign * bias_of(n, e);
    constexpr int kSteps = kHalf<T> ? kStepFragments : 2;  // of Tf32, more would spill
    multiply_tiles<T, kSteps>(scores, queries, keys, op.width, [](int) {});
    if (flat) {
      if (bias) bias -= Tiling::kKeys;
      load_bias(left);
    }
    for (int n = 0; n < kColumnTiles; ++n)
      for (int m = 0; m < kRowTiles; ++m)
        for (int e = 0; e < 8; ++e) {
          float& t = scores[n][m][e / 4][e % 4];
          t *= op.sign;
          if (flat) t += bias_of(n, e);
        }
    float largest[kRowTiles][2];
    for (int m = 0; m < kRowTiles; ++m)
      for (int h = 0; h < 2; ++h) {
        float& x = largest[m][h];
        x = kLowest;
        for (int n = 0; n < kColumnTiles; ++n)
          for (int e = 0; e < 4; ++e) x = fmaxf(x, scores[n][m][e / 2][2 * h + e % 2]);
        for (int step = 1; step <= 2; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
      }
    if (threadIdx.x % 4 == 0)
      for (int m = 0; m < kRowTiles; ++m)
        for (int h = 0; h < 2; ++h)
          maxima[at.statistic(at.score_row + m * kFragmentRows + fragment_row(h), at.score_group)] = largest[m][h];
  }

  // P, once the maxima of all warps are there. Where they were known nothing grows. After the last tile there are no
  // logits: what P is relative to is infinity, so that nothing is added to the sums.
  DNL_DEVICE void probability(bool another) {
    struct alignas(Tiling::kScoreGroups * sizeof(float)) RowMaxima {
      float of_group[Tiling::kScoreGroups];
    };
    for (int m = 0; m < kRows; ++m)
      for (int h = 0; h < 2; ++h) {
        const float before = most[m][h];
        const auto row =
            *reinterpret_cast<const RowMaxima*>(maxima + at.statistic(at.row + m * kFragmentRows + fragment_row(h), 0));
        for (float x : row.of_group) most[m][h] = fmaxf(most[m][h], x);
        const float to = most[m][h] == kLowest ? 0.0f : most[m][h];  // -inf less -inf would be NaN
        correction[m][h] = before == most[m][h] ? 1.0f : exp2_approx((before - to) * op.magnitude);
      }
    for (int m = 0; m < kRowTiles; ++m)
      for (int h = 0; h < 2; ++h) {
        const bool second = at.second_half();
        const float to = second ? most[1][h] : most[m][h], factor = second ? correction[1][h] : correction[m][h];
        const float off = !another ? -kLowest : to == kLowest ? 0.0f : to;
        sum[m][h] *= factor;
        stored[m][h] *= factor;
        for (int n = 0; n < kColumnTiles; ++n)
          for (int half = 0; half < 2; ++half) {
            float* t = &scores[n][m][half][2 * h];
            const float low = exp2_approx((t[0] - off) * op.magnitude);
            const float high = exp2_approx((t[1] - off) * op.magnitude);
            sum[m][h] += low + high;
            const Packed<T> both = round_both<T>(low, high, stored[m][h]);
            memcpy(t, &both, sizeof(both));
          }
      }
  }

  // Whether a maximum did.
  DNL_DEVICE bool grew() const {
    bool result = false;
    for (int m = 0; m < kRows; ++m) result = result || correction[m][0] != 1 || correction[m][1] != 1;
    return result;
  }

  // To the tile of P.
  template <class Probabilities>
  DNL_DEVICE void store(const Probabilities& tile) const {
    for (int m = 0; m < kRowTiles; ++m)
      for (int h = 0; h < 2; ++h) {
        T* to = tile.data + (at.score_row + m * kFragmentRows + fragment_row(h)) * tile.pitch() + at.score_key +
                fragment_column();
        for (int n = 0; n < kColumnTiles; ++n)
          for (int half = 0; half < 2; ++half) {
            Packed<T> both;
            memcpy(&both, &scores[n][m][half][2 * h], sizeof(both));
            *reinterpret_cast<Packed<T>*>(to + n * kFragmentRows + half * 8) = both;
          }
      }
  }
};

template <class T, class Tiling, bool kChannelFirst>
__global__ void __launch_bounds__(kThreads, 1) fused_forward_kernel(FusedForward<T> op) {
  constexpr int kRowTiles = kWarpRows / kFragmentRows, kChannelTiles = kWarpChannels / kFragmentRows;
  constexpr int kQueries = Tiling::kQueries, kKeys = Tiling::kKeys;

  DNL_DYNAMIC_SHARED(unsigned char, memory);
  const auto shared = [&](int offset) { return reinterpret_cast<T*>(memory + offset); };
  using Order = TileOrder<T, kChannelFirst>;
  const Tile<T, kQueries, Order::kLogits, true> query_tile{shared(op.shared.query), op.width};
  const Tile<T, kKeys, Order::kLogits, true> key_tile{shared(op.shared.key), op.width};
  const Tile<T, kKeys, Order::kValue, false> value_tile{shared(op.shared.value), op.slice_channels};
  const Tile<T, kQueries, false, true> probability_tile{shared(op.shared.probability), kKeys};

  const ForwardPlace<Tiling> at(op);
  const bool early = threadIdx.x < kThreads / 2;
  TileLoader<T, decltype(key_tile), kThreads / 2> key(key_tile, op.key, at.b, at.begin * kKeys, 0);
  TileLoader<T, decltype(value_tile)> value(value_tile, op.value, at.b, at.begin * kKeys, at.first_channel);
  TileLoader<T, decltype(query_tile)>(query_tile, op.query, at.b, at.first_query, 0)
      .load(at_most_of(op.queries - at.first_query, kQueries));
  int left = at.keys(op);  // that have not been multiplied by queries
  if (early) key.load(at_most_of(left, kKeys));
  cp_async_commit();

  const FragmentReader<T, query_tile.kAcross, false> queries(query_tile, at.score_row);
  const FragmentReader<T, key_tile.kAcross, true> keys(key_tile, at.score_key);
  const FragmentReader<T, false, false> probabilities(probability_tile, at.row);
  const FragmentReader<T, value_tile.kAcross, true> values(value_tile, at.channel);
  float out[kChannelTiles][kRowTiles][2][4] = {};
  ScorePiece<T, Tiling> piece{
      op, at, op.bias.data ? op.bias.element(at.b) + at.begin * kKeys + at.score_key + fragment_column() : nullptr,
      reinterpret_cast<float*>(memory + op.shared.statistics)};
  for (int m = 0; m < kRowTiles; ++m)
    for (int h = 0; h < 2; ++h) {
      piece.most[m][h] = kLowest;
      const int64_t i = at.first_query + at.row + m * kFragmentRows + fragment_row(h);
      if (at.known() && i < op.queries) piece.most[m][h] = op.maxima[at.b * op.queries + i];
    }

  piece.load_bias(left);
  cp_async_wait<0>();
  __syncthreads();  // the first keys are there
  piece.logits(queries, keys, left);
  __syncthreads();  // the maxima are there; the keys are done with
  if (early && left > kKeys) key.load(at_most_of(left - kKeys, kKeys));
  cp_async_commit();
  piece.load_bias(left - kKeys);
  piece.probability(true);

  for (; left > 0; left -= kKeys) {
    const bool another = left > kKeys;
    cp_async_wait<0>();
    __syncthreads();  // the next keys are there; V, P and the maxima before are done with
    piece.store(probability_tile);
    value.load(at_most_of(left, kKeys));
    cp_async_commit();
    if (another) piece.logits(queries, keys, left - kKeys);
    cp_async_wait<0>();
    __syncthreads();  // V, P and the next maxima are there; the keys are done with
    if (early && left > 2 * kKeys) key.load(at_most_of(left - 2 * kKeys, kKeys));
    cp_async_commit();
    piece.load_bias(left - 2 * kKeys);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if (early == (turn == 0)) {
        piece.probability(another);
      } else if (op.group_channels == kWarpChannels) {
        constexpr int kSteps = std::min(kStepFragments, kKeys / kDepth<T>);
        multiply_tiles<T, kSteps>(out, probabilities, values, kKeys, [](int) {});
      } else {
        for (int depth = 0; depth < kKeys; depth += kDepth<T>) {
          uint32_t a[kRowTiles][4], f[4];
          for (int m = 0; m < kRowTiles; ++m) probabilities.load(a[m], m * kFragmentRows, depth);
          for (int n = 0; n < kChannelTiles; ++n) {
            if (n * kFragmentRows >= op.group_channels) break;
            values.load(f, n * kFragmentRows, depth);
            multiply<T>(out[n], a, f);
          }
        }
      }
    }
    if (piece.grew())
      for (int n = 0; n < kChannelTiles; ++n)
        for (int m = 0; m < kRowTiles; ++m)
          for (int e = 0; e < 8; ++e) out[n][m][e / 4][e % 4] *= piece.correction[m][e % 4 / 2];
  }
  // Its place anew, rather than kept in registers all along.
  fused_forward_finish<T, Tiling>(op, out, piece.most, piece.sum, piece.stored, ForwardPlace<Tiling>(op), memory);
}

// ---------------------------------------------------------------------------------------------------------------------
// Driver
// ---------------------------------------------------------------------------------------------------------------------

template <class T, bool kChannelFirst>
void (*fused_forward_kernel_of(int tile))(FusedForward<T>) {
  static_assert(std::size(kForwardTiles) == 3, "one kernel per tile of the plan");
  switch (tile) {
    case 0:
      return &fused_forward_kernel<T, ForwardTiling<kForwardTiles[0].queries, kForwardTiles[0].keys>, kChannelFirst>;
    case 1:
      return &fused_forward_kernel<T, ForwardTiling<kForwardTiles[1].queries, kForwardTiles[1].keys>, kChannelFirst>;
    default:
      return &fused_forward_kernel<T, ForwardTiling<kForwardTiles[2].queries, kForwardTiles[2].keys>, kChannelFirst>;
  }
}
template <class T>
void (*fused_forward_kernel_of(const ForwardPlan& plan))(FusedForward<T>) {
  if constexpr (kHalf<T>)  // of Tf32, tiles have one order
    if (plan.channel_first) return fused_forward_kernel_of<T, true>(plan.tile);
  return fused_forward_kernel_of<T, false>(plan.tile);
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

// T is what is multiplied, Tf32 for calls in float.
template <class T, class Device>
void pairwise_fused_forward_cuda(const PairwiseArgs& args, Device& device, const ForwardPlan& plan) {
  using Result = ResultOf<T>;
  const PairwiseOperands<Result, Device, T> in(args, device, Placement::as_they_lie);
  const ForwardTile& tile = kForwardTiles[plan.tile];
  FusedForward<T> op{};
  const auto operand = [&](const Matrix<const T>& x, int64_t positions, int64_t channels, bool channel_first,
                           int64_t reads) {
    return fused_operand(device, x, args.batches, positions, channels, channel_first, reads);
  };
  const auto order = [&](auto first) {
    using Order = TileOrder<T, first.value>;
    const int64_t tiles = ceil_div_of(args.queries, tile.queries);
    op.query = operand(in.query, args.queries, args.width, Order::kLogits, 1);
    op.key = operand(in.key, args.keys, args.width, Order::kLogits, tiles);
    op.value = operand(in.value, args.keys, args.channels, Order::kValue, tiles);
  };
  plan.channel_first ? order(std::true_type{}) : order(std::false_type{});
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
    device.launch(fused_forward_kernel_of<T>(plan), LaunchShape{blocks, kThreads, plan.shared.bytes}, op);
    if (plan.splits == 1) continue;
    const int64_t first_channel = int64_t(first) * plan.slice_channels;
    const int64_t end_channel = std::min(args.channels, int64_t(first + op.slices) * plan.slice_channels);
    const int64_t merges = args.batches * ceil_div_of(args.queries, kWarp);
    device.launch(&fused_merge_kernel<T>, LaunchShape{merges, kThreads, 0}, op, first_channel, end_channel);
  }
}

}  // namespace dnl
