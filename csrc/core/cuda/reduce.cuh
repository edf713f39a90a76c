// Sums of a strided matrix over positions (column sums: means, pooling) and over channels (row sums: inner products).
//
// Column sums run in two stages so that their order is fixed and the chip is full even for one batch element: a block
// sums kSplit positions of kWarp channels, then one thread per channel adds the blocks' results. Row sums take kWarp
// positions per block. Both have two orders of walking, chosen by which stride is smaller: lanes on neighbouring
// channels, or lanes on neighbouring positions (channel-first), so that either layout is read in full lines without a
// transpose. Sums are in double: each element is read once, so memory sets the pace. Traded away: elements are read one
// by one, not in vectors, which costs bandwidth in bf16.
#pragma once

#include "core/cuda/device.cuh"

namespace dnl {

constexpr int kSplit = 512;                       // positions per block of a column sum
constexpr int kChannelsPerWarp = kWarp / kWarps;  // of a block's kWarp channels (or positions)
static_assert(kWarps * kChannelsPerWarp == kWarp, "warps share the lanes of a tile evenly");
static_assert(kSplit % kThreads == 0, "a split is whole rounds of the block");

// Matrices of one shape and order as one: the first `each` batch elements are the first's, the others the second's.
// A kernel takes it as a __grid_constant__: otherwise the choice between the two copies both to local memory.
template <class T>
struct MatrixPair {
  Matrix<const T> first, second;  // (each, positions, channels)
  int64_t each;
};

// partial[b][s][c] = sum over positions i of split s of weight_i x(b, i, c)
template <class T, bool kPositionFast>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const __grid_constant__ MatrixPair<T> pair,  // (batches, positions, channels)
                       Rows<const AccOf<T>> weight,                 // (batches, positions), or null
                       double* partial,                             // (batches, splits, channels)
                       int64_t positions, int64_t channels, int64_t splits, int64_t tasks) {
  using A = AccOf<T>;
  __shared__ double sums[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tiles = ceil_div_of(channels, kWarp);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t c0 = task % tiles * kWarp, split = task / tiles % splits, b = task / tiles / splits;
    const int64_t begin = split * kSplit, end = begin + kSplit < positions ? begin + kSplit : positions;
    const bool second = b >= pair.each;
    const Matrix<const T>& x = second ? pair.second : pair.first;
    const T* matrix = x.element(second ? b - pair.each : b);
    const int64_t position = x.position, channel = x.channel;
    const A* w = weight.data ? weight.element(b) : nullptr;
    double* out = partial + (b * splits + split) * channels + c0;
    if constexpr (kPositionFast) {
      for (int t = 0; t < kChannelsPerWarp; ++t) {
        const int c = warp * kChannelsPerWarp + t;
        if (c0 + c >= channels) break;
        const T* column = matrix + (c0 + c) * channel;
        double sum = 0;
        for (int64_t i = begin + lane; i < end; i += kWarp)
          sum += double(wide(column[i * position])) * (w ? double(w[i]) : 1.0);
        sum = warp_sum(sum);
        if (lane == 0) out[c] = sum;
      }
    } else {
      double sum = 0;
      if (c0 + lane < channels) {
        const T* column = matrix + (c0 + lane) * channel;
        for (int64_t i = begin + warp; i < end; i += kWarps)
          sum += double(wide(column[i * position])) * (w ? double(w[i]) : 1.0);
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

// How a column sum is stored: as it is, 0 in place of NaN and infinity, or added to what is there.
enum class ColumnSum { plain, only_finite, added };

// out[b][c] (+)= factor * sum_s partial[b][s][c]
template <class A>
__global__ void __launch_bounds__(kThreads)
    column_sums_finish_kernel(const double* partial,  // (batches, splits, channels)
                              A* out,                 // (batches, channels)
                              double factor, ColumnSum kind, int64_t channels, int64_t splits, int64_t count,
                              int64_t tasks) {
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t index = task * kThreads + threadIdx.x;
    if (index >= count) continue;
    const double* column = partial + index / channels * splits * channels + index % channels;
    double sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += column[s * channels];
    const A result = static_cast<A>(sum * factor);
    const bool finite = result - result == 0;
    if (kind == ColumnSum::added)
      out[index] += result;
    else
      out[index] = kind == ColumnSum::only_finite && !finite ? A(0) : result;
  }
}

inline int64_t column_splits(int64_t positions) { return ceil_div_of(positions, kSplit); }

// out[b][c] (+)= factor * sum_i weight_i x(b, i, c), for all batch elements of a pair
template <class T, class Device>
void column_sums(Device& device, const MatrixPair<T>& x, int64_t batches, int64_t positions, int64_t channels,
                 const Rows<const AccOf<T>>& weight, double factor, AccOf<T>* out, ColumnSum kind = ColumnSum::plain) {
  const int64_t splits = column_splits(positions), count = batches * channels;
  if (count == 0) return;
  double* partial = device.template allocate<double>(batches * splits * channels);
  const int64_t tasks = batches * splits * ceil_div_of(channels, kWarp);
  auto kernel =
      position_is_fast(x.first, positions, channels) ? &column_sums_kernel<T, true> : &column_sums_kernel<T, false>;
  device.launch(kernel, tasks, x, weight, partial, positions, channels, splits, tasks);
  const int64_t blocks = ceil_div_of(count, kThreads);
  device.launch(&column_sums_finish_kernel<AccOf<T>>, blocks, partial, out, factor, kind, channels, splits, count,
                blocks);
}
template <class T, class Device>
void column_sums(Device& device, const Matrix<const T>& x, int64_t batches, int64_t positions, int64_t channels,
                 const Rows<const AccOf<T>>& weight, double factor, AccOf<T>* out, ColumnSum kind = ColumnSum::plain) {
  column_sums<T>(device, MatrixPair<T>{x, x, batches}, batches, positions, channels, weight, factor, out, kind);
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

// An Op: out(b, i) = factor * sum_c row_c (x(b, i, c) - offset_c). The offset is taken off inside the sum: nothing is
// lost where x and offset share a large part.
template <class T>
struct RowDot {
  using A = AccOf<T>;
  using Sum = double;
  Matrix<const T> x;  // (batches, positions, channels)
  const A* row;       // (batches, channels)
  const A* offset;    // (batches, channels), or nullptr
  int64_t batches, positions, channels;
  Rows<A> out;  // (batches, positions)
  A factor;

  struct Term {
    const T* x;
    const A *row, *offset;
    int64_t position, channel;

    DNL_HOST_DEVICE double operator()(int64_t i, int64_t c) const {
      return double(row[c]) * (double(wide(x[i * position + c * channel])) - (offset ? double(offset[c]) : 0.0));
    }
  };
  DNL_HOST_DEVICE Term at(int64_t b) const {
    return {x.element(b), row + b * channels, offset ? offset + b * channels : nullptr, x.position, x.channel};
  }
  DNL_HOST_DEVICE void store(int64_t b, int64_t i, double sum) const {
    out.element(b)[i] = static_cast<A>(factor * sum);
  }
};

}  // namespace dnl
