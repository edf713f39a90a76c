// What goes into the fused forward (fused/forward.cuh) and how its results come out: the tiling, the
// parameters, which block and warp own what, the last step of a block, and the kernel that merges splits of the keys.
//
// Results leave through shared memory in steps of 32 channels, so that lanes write neighbours whichever order the
// output has. A block that saw all keys writes y, its residual and the row statistics; one that saw a split of them
// leaves its unnormalised O and (maximum, sum, sum as rounded) of each row in float, for fused_merge_kernel.
#pragma once

#include "ops/pairwise/chain/operands.cuh"
#include "ops/pairwise/fused/tile.cuh"
#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

constexpr int kWarpRows = 32, kWarpChannels = 128;

// Sizes of a tile and who owns what of it.
template <int kQueries_, int kKeys_>
struct ForwardTiling {
  static constexpr int kQueries = kQueries_, kKeys = kKeys_;
  static constexpr int kColumnGroups = kWarps * kWarpRows / kQueries;
  static constexpr int kChannels = kColumnGroups * kWarpChannels;
  // A warp's piece of S: 32 queries and its share of the keys, or 16 queries where that share would be under 16.
  static constexpr bool kWholeRows = kKeys / kColumnGroups >= kFragmentRows;
  static constexpr int kScoreRowTiles = kWholeRows ? 2 : 1;
  static constexpr int kScoreGroups = kWholeRows ? kColumnGroups : kColumnGroups / 2;
  static constexpr int kScoreKeys = kKeys / kScoreGroups;
  static constexpr int kScoreColumnTiles = kScoreKeys / kFragmentRows;
  static_assert(kQueries % kWarpRows == 0 && kWarps * kWarpRows % kQueries == 0, "whole row groups");
  static_assert(kScoreKeys % kFragmentRows == 0, "whole fragments");
  static_assert(2 * kScoreGroups * kQueries * 4 <= kStatisticsBytes, "statistics fit");
};

template <class T>
struct FusedForward {
  using Result = ResultOf<T>;
  FusedOperand<T> query, key, value;
  Rows<const float> bias;           // (batches, keys), or null
  Matrix<Result> output, residual;  // (batches, queries, channels); residual.data may be null
  const float* offset;              // (batches, channels), or null
  float* stats;                     // (batches, queries, 2): shift and factor
  float* maxima;            // (batches, queries), of t (pairwise.h): from slice 0 to the others; null with one slice
  float* partial;           // (splits, batches) of (queries, channels) in the order of the output, if splits > 1
  float* split_statistics;  // (splits, batches, queries, 3): maximum, sum, sum as rounded, if splits > 1
  int64_t batches, queries, keys, channels;
  int width, first_slice, slices, slice_channels, group_channels, splits;
  bool position_fast;  // the output is channel-first
  ForwardShared shared;
  float sign, magnitude;  // of the scale, for exponents of 2

  // y of a batch element on its way out.
  struct Writer {
    const FusedForward& op;
    Result *output, *residual;
    const float* offset;

    // y with what was taken off the values; read before anything is written.
    DNL_DEVICE float whole(int64_t c, float y) const { return offset ? y + offset[c] : y; }
    // Writes y: rounded once, and what that took.
    DNL_DEVICE void operator()(int64_t i, int64_t c, float y) const {
      const Result result = rounded<Result>(y);
      output[i * op.output.position + c * op.output.channel] = result;
      if (residual) residual[i * op.residual.position + c * op.residual.channel] = rounded<Result>(y - wide(result));
    }
  };
  DNL_DEVICE Writer writer(int64_t b) const {
    return {*this, output.element(b), residual.data ? residual.element(b) : nullptr,
            offset ? offset + b * channels : nullptr};
  }
  // A split's O of a batch element, in the order of the output: lanes that write y touch neighbours here too.
  DNL_DEVICE float* part(int split, int64_t b) const { return partial + (split * batches + b) * queries * channels; }
  DNL_DEVICE int64_t place_in_part(int64_t i, int64_t c) const {
    return position_fast ? c * queries + i : i * channels + c;
  }
};

// put(r, c, value(r, c)) for r in [0, rows) and c in [0, columns), by `warps` warps, of which this is `warp`; lanes
// have neighbours in the order of the output. Several values are read before the first is put: a store that lies
// between two loads would keep the second one waiting.
template <bool kPositionFast, class Value, class Put>
DNL_DEVICE void write_piece(int rows, int columns, int warp, int warps, const Value& value, const Put& put) {
  constexpr int kTogether = 4;
  const int fast_count = kPositionFast ? rows : columns, slow_count = kPositionFast ? columns : rows;
  for (int fast = threadIdx.x % kWarp; fast < fast_count; fast += kWarp) {
    const auto place = [&](int slow, const auto& f) { return kPositionFast ? f(fast, slow) : f(slow, fast); };
    int slow = warp;
    for (; slow + (kTogether - 1) * warps < slow_count; slow += kTogether * warps) {
      float found[kTogether];
      for (int k = 0; k < kTogether; ++k) found[k] = place(slow + k * warps, value);
      for (int k = 0; k < kTogether; ++k) place(slow + k * warps, [&](int r, int c) { return put(r, c, found[k]); });
    }
#pragma unroll 1
    for (; slow < slow_count; slow += warps) place(slow, [&](int r, int c) { return put(r, c, value(r, c)); });
  }
}
template <class T, class Value, class Put>
DNL_DEVICE void write_piece(const FusedForward<T>& op, int rows, int columns, int warp, int warps, const Value& value,
                            const Put& put) {
  if (op.position_fast)
    write_piece<true>(rows, columns, warp, warps, value, put);
  else
    write_piece<false>(rows, columns, warp, warps, value, put);
}

// A (kRows, kColumns) piece of O in shared memory, of which row r and column c are at r kPitch + c: y of it, or where
// splits are merged its part of theirs.
template <int kRows, int kColumns, int kPitch, class T>
DNL_DEVICE void write_staged(const FusedForward<T>& op, const float* staged, int64_t b, int split, int64_t first_query,
                             int64_t first_channel, int columns, int warp, int warps) {
  const int rows = at_most_of(op.queries - first_query, kRows);
  const auto write = [&](const auto& value, const auto& put) {
    write_piece(op, rows, columns < kColumns ? columns : kColumns, warp, warps, value, put);
  };
  if (op.splits > 1) {
    float* part = op.part(split, b);
    write([&](int r, int c) { return staged[r * kPitch + c]; },
          [&](int r, int c, float y) { part[op.place_in_part(first_query + r, first_channel + c)] = y; });
  } else {
    const auto writer = op.writer(b);
    write([&](int r, int c) { return writer.whole(first_channel + c, staged[r * kPitch + c]); },
          [&](int r, int c, float y) { writer(first_query + r, first_channel + c, y); });
  }
}

// Which part of the problem a block and its warp have.
template <class Tiling>
struct ForwardPlace {
  int64_t b, first_query, first_channel, begin, end;  // begin and end of its tiles of keys
  int split, slice;
  int row_group, column_group;            // of the warp in the output
  int row, channel;                       // first of the warp's piece of the output, in the tile and the slice
  int score_group, score_row, score_key;  // its column group, first row and first key in a tile of S

  template <class T>
  DNL_DEVICE explicit ForwardPlace(const FusedForward<T>& op) {
    // Neighbouring blocks share keys and values: tiles of queries go first.
    const int64_t tiles = ceil_div_of(op.queries, Tiling::kQueries);
    int64_t task = blockIdx.x;
    first_query = task % tiles * Tiling::kQueries;
    task /= tiles;
    split = task % op.splits;
    task /= op.splits;
    slice = op.first_slice + task % op.slices;
    b = task / op.slices;
    first_channel = int64_t(slice) * op.slice_channels;
    const int64_t key_tiles = ceil_div_of(op.keys, Tiling::kKeys);
    begin = key_tiles * split / op.splits;
    end = key_tiles * (split + 1) / op.splits;

    const int warp = threadIdx.x / kWarp;
    row_group = warp / Tiling::kColumnGroups;
    column_group = warp % Tiling::kColumnGroups;
    row = row_group * kWarpRows;
    channel = column_group * op.group_channels;
    score_group = Tiling::kWholeRows ? column_group : column_group / 2;
    score_row = row + second_half() * kFragmentRows;
    score_key = score_group * Tiling::kScoreKeys;
  }

  // Keys of the block.
  template <class T>
  DNL_DEVICE int keys(const FusedForward<T>& op) const {
    const int64_t last = end * Tiling::kKeys;
    return static_cast<int>((last < op.keys ? last : op.keys) - begin * Tiling::kKeys);
  }
  // Whether the warp's 16 queries of S are the second half of its rows of the output.
  DNL_DEVICE bool second_half() const { return !Tiling::kWholeRows && column_group % 2; }
  // Where a column group of S leaves a statistic of a row.
  DNL_DEVICE static int statistic(int row_of_tile, int group) { return row_of_tile * Tiling::kScoreGroups + group; }
  // Slices beyond the first know the maximum of each row.
  DNL_DEVICE bool known() const { return slice > 0; }
};

// What a block found, on its way out: the statistics of its rows, and its piece of y; with several splits, maximum,
// sums and O as they are.
template <class T, class Tiling, int kChannelTiles, int kRowTiles>
DNL_DEVICE void fused_forward_finish(const FusedForward<T>& op, const float (&out)[kChannelTiles][kRowTiles][2][4],
                                     const float (&most)[kRowTiles][2], float (&sum)[Tiling::kScoreRowTiles][2],
                                     float (&stored)[Tiling::kScoreRowTiles][2], const ForwardPlace<Tiling>& at,
                                     unsigned char* memory) {
  constexpr int kQueries = Tiling::kQueries;
  float* statistics = reinterpret_cast<float*>(memory + op.shared.statistics);  // (2, kQueries, kScoreGroups)
  const int lane = threadIdx.x % kWarp;
  __syncthreads();  // the last tile and its maxima are done with
  for (int m = 0; m < Tiling::kScoreRowTiles; ++m) {
    for (int h = 0; h < 2; ++h) {
      for (int step = 1; step <= 2; step *= 2) {
        sum[m][h] += __shfl_xor_sync(kAllLanes, sum[m][h], step);
        stored[m][h] += __shfl_xor_sync(kAllLanes, stored[m][h], step);
      }
      if (lane % 4 == 0) {
        float* to = statistics + at.statistic(at.score_row + m * kFragmentRows + fragment_row(h), at.score_group);
        to[0] = sum[m][h];
        to[Tiling::kScoreGroups * kQueries] = stored[m][h];
      }
    }
  }
  __syncthreads();

  const bool merge = op.splits > 1;
  const int64_t part = at.split * op.batches + at.b;
  float inverse[kRowTiles][2];
  for (int m = 0; m < kRowTiles; ++m) {
    for (int h = 0; h < 2; ++h) {
      const int row = at.row + m * kFragmentRows + fragment_row(h);
      float total = 0, rounded_total = 0;
      for (int g = 0; g < Tiling::kScoreGroups; ++g) {
        total += statistics[at.statistic(row, g)];
        rounded_total += statistics[kQueries * Tiling::kScoreGroups + at.statistic(row, g)];
      }
      inverse[m][h] = merge ? 1.0f : 1.0f / rounded_total;
      const int64_t i = at.first_query + row;
      if (at.column_group || lane % 4 || i >= op.queries) continue;
      if (merge && at.slice == op.first_slice) {
        float* to = op.split_statistics + 3 * (part * op.queries + i);
        to[0] = at.known() ? 0.0f : most[m][h];
        to[1] = total;
        to[2] = rounded_total;
      } else if (!merge && !at.known()) {
        store_stats(most[m][h], total, op.stats + 2 * (at.b * op.queries + i));
        if (op.maxima) op.maxima[at.b * op.queries + i] = most[m][h];
      }
    }
  }

  // In steps of 32 channels through shared memory, so that lanes write neighbours in the order of the output.
  constexpr int kStep = 2 * kFragmentRows, kPitch = kWarp + 1;
  static_assert(kStep == kWarp && kWarps * kWarpRows * kPitch * 4 == kStagingBytes, "a step is as wide as a warp");
  float* staging = reinterpret_cast<float*>(memory) + threadIdx.x / kWarp * kWarpRows * kPitch;
#pragma unroll  // or `out` is indexed, and leaves the registers
  for (int first = 0; first < kWarpChannels; first += kStep) {
    if (first >= op.group_channels) break;
    __syncthreads();
    for (int n = 0; n < 2; ++n) {
      for (int m = 0; m < kRowTiles; ++m) {
        for (int e = 0; e < 8; ++e) {
          const int half = e / 4, h = e % 4 / 2, u = e % 2;
          staging[(m * kFragmentRows + fragment_row(h)) * kPitch + n * kFragmentRows + half * 8 + fragment_column() +
                  u] = out[first / kFragmentRows + n][m][half][2 * h + u] * inverse[m][h];
        }
      }
    }
    __syncthreads();
    const int64_t channel = at.first_channel + at.channel + first;
    const int columns = at_most_of(op.channels - channel, op.group_channels - first);
    write_staged<kWarpRows, kStep, kPitch>(op, staging, at.b, at.split, at.first_query + at.row, channel, columns, 0,
                                           1);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Splits of the keys
// ---------------------------------------------------------------------------------------------------------------------

// y = sum_s w_s O_s + offset with w_s = 2^(magnitude (maximum_s - maximum)) / sum of P as rounded, and the row
// statistics, for first_channel .. end_channel. A block per 32 queries.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)  // without the 1, ptxas spills for more warps than there are
    fused_merge_kernel(FusedForward<T> op, int64_t first_channel, int64_t end_channel) {
  __shared__ float weight[kMaxSplits][kWarp];
  const int64_t tiles = ceil_div_of(op.queries, kWarp), b = blockIdx.x / tiles, first = blockIdx.x % tiles * kWarp;
  const int64_t part = op.batches * op.queries;  // of a split
  if (threadIdx.x < kWarp && first + threadIdx.x < op.queries) {
    const int64_t i = b * op.queries + first + threadIdx.x;
    const float* statistics = op.split_statistics + 3 * i;
    float most = -std::numeric_limits<float>::infinity(), sum = 0, stored = 0;
    for (int s = 0; s < op.splits; ++s) most = fmaxf(most, statistics[3 * part * s]);
    const float off = most == -std::numeric_limits<float>::infinity() ? 0.0f : most;
    for (int s = 0; s < op.splits; ++s) {
      const float factor = exp2_approx((statistics[3 * part * s] - off) * op.magnitude);
      sum += factor * statistics[3 * part * s + 1];
      stored += factor * statistics[3 * part * s + 2];
      weight[s][threadIdx.x] = factor;
    }
    for (int s = 0; s < op.splits; ++s) weight[s][threadIdx.x] /= stored;
    if (op.first_slice == 0) {
      store_stats(most, sum, op.stats + 2 * i);
      if (op.maxima) op.maxima[i] = most;
    }
  }
  __syncthreads();

  const auto writer = op.writer(b);
  const float* parts = op.part(0, b);
  const int rows = at_most_of(op.queries - first, kWarp);
  write_piece(
      op, rows, static_cast<int>(end_channel - first_channel), threadIdx.x / kWarp, kWarps,
      [&](int r, int c) {
        const float* from = parts + op.place_in_part(first + r, first_channel + c);
        float y = 0;
#pragma unroll 2
        for (int s = 0; s < op.splits; ++s, from += part * op.channels) y += weight[s][r] * *from;
        return writer.whole(first_channel + c, y);
      },
      [&](int r, int c, float y) { writer(first + r, first_channel + c, y); });
}

}  // namespace dnl
