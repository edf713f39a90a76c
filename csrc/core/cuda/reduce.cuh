// Sums of a strided matrix over positions (column sums: means, pooling) and over channels (row sums: inner products).
//
// Column sums run in two stages so that their order is fixed and the chip is full even for one batch element: a block
// sums kSplit positions of kWarp channels in float, then one thread per channel adds the blocks' results in double. Row
// sums take kWarp positions per block. Both have two orders of walking, chosen by which stride is smaller: lanes on
// neighbouring channels, or lanes on neighbouring positions (channel-first), so that either layout is read in full lines
// without a transpose. Traded away: elements are read one by one, not in vectors, which costs bandwidth in bf16.
#pragma once

#include "core/cuda/device.cuh"

namespace dnl {

constexpr int kSplit = 512;                           // positions per block of a column sum
constexpr int kChannelsPerWarp = kWarp / kWarps;      // of a block's kWarp channels (or positions)
static_assert(kWarps * kChannelsPerWarp == kWarp, "warps share the lanes of a tile evenly");
static_assert(kSplit % kThreads == 0, "a split is whole rounds of the block");

// partial[b][s][c] = sum over positions i of split s of weight_i x(b, i, c)
template <class T, bool kPositionFast>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(Matrix<const T> x,             // (batches, positions, channels)
                       Rows<const AccOf<T>> weight,   // (batches, positions), or null
                       AccOf<T>* partial,             // (batches, splits, channels)
                       int64_t positions, int64_t channels, int64_t splits, int64_t tasks) {
  using A = AccOf<T>;
  __shared__ A sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = ceil_div_of(channels, kWarp);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t c0 = task % tiles * kWarp, split = task / tiles % splits, b = task / tiles / splits;
    const int64_t begin = split * kSplit, end = begin + kSplit < positions ? begin + kSplit : positions;
    const T* matrix = x.element(b);
    const A* w = weight.data ? weight.element(b) : nullptr;
    A* out = partial + (b * splits + split) * channels + c0;
    if constexpr (kPositionFast) {
      for (int t = 0; t < kChannelsPerWarp; ++t) {
        const int c = warp * kChannelsPerWarp + t;
        if (c0 + c >= channels) break;
        const T* column = matrix + (c0 + c) * x.channel;
        A sum = 0;
        for (int64_t i = begin + lane; i < end; i += kWarp) sum += wide(column[i * x.position]) * (w ? w[i] : A(1));
        sum = warp_sum(sum);
        if (lane == 0) out[c] = sum;
      }
    } else {
      A sum = 0;
      if (c0 + lane < channels) {
        const T* column = matrix + (c0 + lane) * x.channel;
        for (int64_t i = begin + warp; i < end; i += kWarps) sum += wide(column[i * x.position]) * (w ? w[i] : A(1));
      }
      sums[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && c0 + lane < channels) {
        sum = 0;
        for (int other = 0; other < kWarps; ++other) sum += sums[other][lane];
        out[lane] = sum;
      }
      __syncthreads();  // before the next task overwrites `sums`
    }
  }
}

// out[b][c] = factor * sum_s partial[b][s][c]
template <class A>
__global__ void __launch_bounds__(kThreads)
    column_sums_finish_kernel(const A* partial,  // (batches, splits, channels)
                              A* out,            // (batches, channels)
                              double factor, int64_t channels, int64_t splits, int64_t count, int64_t tasks) {
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t index = task * kThreads + threadIdx.x;
    if (index >= count) continue;
    const A* column = partial + index / channels * splits * channels + index % channels;
    double sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += double(column[s * channels]);
    out[index] = static_cast<A>(sum * factor);
  }
}

inline int64_t column_splits(int64_t positions) { return ceil_div_of(positions, kSplit); }

// out[b][c] = factor * sum_i weight_i x(b, i, c)
template <class T, class Device>
void column_sums(Device& device, const Matrix<const T>& x, int64_t batches, int64_t positions, int64_t channels,
                 const Rows<const AccOf<T>>& weight, double factor, AccOf<T>* out) {
  const int64_t splits = column_splits(positions), count = batches * channels;
  if (count == 0) return;
  AccOf<T>* partial = device.template allocate<AccOf<T>>(batches * splits * channels);
  const int64_t tasks = batches * splits * ceil_div_of(channels, kWarp);
  auto kernel = position_is_fast(x, positions, channels) ? &column_sums_kernel<T, true> : &column_sums_kernel<T, false>;
  device.launch(kernel, tasks, x, weight, partial, positions, channels, splits, tasks);
  const int64_t blocks = ceil_div_of(count, kThreads);
  device.launch(&column_sums_finish_kernel<AccOf<T>>, blocks, partial, out, factor, channels, splits, count, blocks);
}

// op.store(b, i, sum_c op.term(b, i, c)) for every position. `Op` is a small struct passed by value, with type `Sum`,
// members batches, positions, channels, and the two functions.
template <class Op, bool kPositionFast>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(Op op, int64_t tasks) {
  using A = typename Op::Sum;
  __shared__ A sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = ceil_div_of(op.positions, kWarp);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / tiles, i0 = task % tiles * kWarp;
    const auto term = op.at(b);
    if constexpr (kPositionFast) {
      A sum = 0;
      if (i0 + lane < op.positions)
        for (int64_t c = warp; c < op.channels; c += kWarps) sum += term(i0 + lane, c);
      sums[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && i0 + lane < op.positions) {
        sum = 0;
        for (int other = 0; other < kWarps; ++other) sum += sums[other][lane];
        op.store(b, i0 + lane, sum);
      }
      __syncthreads();  // before the next task overwrites `sums`
    } else {
      for (int t = 0; t < kChannelsPerWarp; ++t) {
        const int64_t i = i0 + warp * kChannelsPerWarp + t;
        if (i >= op.positions) break;
        A sum = 0;
        for (int64_t c = lane; c < op.channels; c += kWarp) sum += term(i, c);
        sum = warp_sum(sum);
        if (lane == 0) op.store(b, i, sum);
      }
    }
  }
}

template <class Op, class Device>
void row_sums(Device& device, const Op& op, bool position_fast) {
  const int64_t tasks = op.batches * ceil_div_of(op.positions, kWarp);
  device.launch(position_fast ? &row_sums_kernel<Op, true> : &row_sums_kernel<Op, false>, tasks, op, tasks);
}

// Op: sum_c left(b, i, c) (right(b, i, c) - offset_c), where right may be one row for all positions. With `out`.
// offset is subtracted inside the sum: nothing is lost where right and offset share a large part.
template <class T>
struct InnerProduct {
  using A = AccOf<T>;
  using Sum = A;
  Matrix<const T> left;    // (batches, positions, channels)
  Matrix<const T> right;   // the same, or data = nullptr: `row` takes its place
  const A* row;            // (batches, channels), or nullptr
  const A* offset;         // (batches, channels) subtracted from right, or from left where `row` is given; or nullptr
  int64_t batches, positions, channels;
  Rows<A> out;             // (batches, positions)
  A factor;

  struct Term {
    const T *left, *right;
    const A *row, *offset;
    int64_t left_position, left_channel, right_position, right_channel;

    DNL_HOST_DEVICE A operator()(int64_t i, int64_t c) const {
      const A x = wide(left[i * left_position + c * left_channel]), o = offset ? offset[c] : A(0);
      return row ? row[c] * (x - o) : x * (wide(right[i * right_position + c * right_channel]) - o);
    }
  };
  DNL_HOST_DEVICE Term at(int64_t b) const {
    return {left.element(b),          right.data ? right.element(b) : nullptr,
            row ? row + b * channels : nullptr, offset ? offset + b * channels : nullptr,
            left.position,            left.channel,
            right.position,           right.channel};
  }
  DNL_HOST_DEVICE void store(int64_t b, int64_t i, A sum) const { out.element(b)[i] = factor * sum; }
};

}  // namespace dnl
