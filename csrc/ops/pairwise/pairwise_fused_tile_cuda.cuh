// What the fused kernels are made of: tiles of an operand in shared memory, and the fragments that mma.sync takes from
// them. Both orders of memory are served as they lie, without a transposed copy.
//
//   global memory             shared memory                       registers of a warp
//   rows (channel stride 1)   [position][channel], 16 B padding   ldmatrix, or ldmatrix.trans where the product sums
//   channel-first             [channel][position], 16 B padding     over the dimension that is not dense
//
// Every product here is C (m x n) = sum over depth of A (m x depth) B (n x depth), so one fragment serves all: 16 rows
// (of A: 16 of m, of B: 16 of n) by 32 bytes of depth, as four registers in the order that mma.sync wants of A. Of B,
// registers {0, 2} are the first eight of n and {1, 3} the second eight.
//
// A row of a tile is an even number of 16-byte lines long; the padding makes it odd, so that the eight rows that an
// ldmatrix reads lie in different banks. Lines move by cp.async where the operand is aligned, element by element
// where it is not; what lies beyond a matrix is zero.
#pragma once

#include "core/cuda/ptx.cuh"
#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

constexpr int kLineElements = kLine / kElement;  // a line moves at once
constexpr int kFragmentRows = 16;                // of a fragment
constexpr int kDepth = 2 * kLineElements;        // of a fragment, and of one product instruction

// ---------------------------------------------------------------------------------------------------------------------
// Global memory
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct FusedOperand {
  Matrix<const T> x;  // (batches, positions, channels)
  int64_t positions, channels;
  bool channel_first;  // tiles are [channel][position]
  bool aligned;        // every line starts at a multiple of 16 bytes

  FusedOperand() = default;
  FusedOperand(const Matrix<const T>& matrix, int64_t n, int64_t c)
      : x(matrix), positions(n), channels(c), channel_first(position_is_fast(matrix, n, c)) {
    constexpr int64_t step = kLineElements;
    const int64_t inner = channel_first ? x.position : x.channel, outer = channel_first ? x.channel : x.position;
    aligned = inner == 1 && outer % step == 0 && reinterpret_cast<uintptr_t>(x.data) % kLine == 0;
    for (int d = 0; d < x.batch.dims; ++d) aligned = aligned && x.batch.stride[d] % step == 0;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory
// ---------------------------------------------------------------------------------------------------------------------

// `positions` x `channels` elements of an operand, both multiples of a line.
template <class T>
struct Tile {
  T* data;  // [outer][pitch]
  int positions, channels;
  bool channel_first;

  DNL_DEVICE int outer() const { return channel_first ? channels : positions; }
  DNL_DEVICE int inner() const { return channel_first ? positions : channels; }
  DNL_DEVICE int pitch() const { return inner() + kLineElements; }
};

template <class T>
struct alignas(kLine) Line {
  T element[kLineElements];
};

// Begins to fill `tile` from position `position` and channel `channel` of `matrix`, a batch element of `x`. All threads
// of the block. The caller commits, waits and then synchronises; the tile must be free at the call.
template <class T>
DNL_DEVICE void load_tile(const Tile<T>& tile, const FusedOperand<T>& x, const T* matrix, int64_t position,
                          int64_t channel) {
  constexpr int step = kLineElements;
  const int64_t left_positions = x.positions - position, left_channels = x.channels - channel;
  const int64_t left_outer = tile.channel_first ? left_channels : left_positions;
  const int64_t left_inner = tile.channel_first ? left_positions : left_channels;
  const int64_t stride_outer = tile.channel_first ? x.x.channel : x.x.position;
  const int64_t stride_inner = tile.channel_first ? x.x.position : x.x.channel;
  const T* first = matrix + position * x.x.position + channel * x.x.channel;

  // Line `index` is number `line` of row `row`; both advance without a division.
  const int lines = tile.inner() / step, pitch = tile.pitch(), rows = tile.outer();
  const int step_row = kThreads / lines, step_line = kThreads % lines;
  int row = threadIdx.x / lines, line = threadIdx.x % lines;
  while (row < rows) {
    const int inner = line * step;
    T* to = tile.data + row * pitch + inner;
    const T* from = first + row * stride_outer + inner * stride_inner;
    const bool inside = row < left_outer && inner < left_inner;
    if (x.aligned && (!inside || inner + step <= left_inner)) {
      cp_async_16(to, inside ? from : x.x.data, inside);
    } else {
      Line<T> values;
      for (int u = 0; u < step; ++u)
        values.element[u] = inside && inner + u < left_inner ? from[u * stride_inner] : rounded<T>(0);
      *reinterpret_cast<Line<T>*>(to) = values;
    }
    row += step_row;
    line += step_line;
    if (line >= lines) {
      line -= lines;
      ++row;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Registers
// ---------------------------------------------------------------------------------------------------------------------

// Fragments of a tile, where a row of the product is a position (kRowsArePositions) or a channel of the operand.
template <class T>
struct FragmentReader {
  const T* lane;  // what this lane reads of the fragment at (0, 0)
  int row_step, depth_step;
  bool transposed;  // depth is not the dense dimension

  DNL_DEVICE FragmentReader(const Tile<T>& tile, bool rows_are_positions)
      : transposed(rows_are_positions == tile.channel_first) {
    const int id = threadIdx.x % kWarp, pitch = tile.pitch();
    row_step = transposed ? 1 : pitch;
    depth_step = transposed ? pitch : 1;
    // Lanes 8 i .. 8 i + 7 name the eight stored rows of matrix i; i = row half + 2 * depth half.
    const int row = transposed ? id / 8 % 2 * 8 : id % 16;
    const int depth = transposed ? id / 16 * 8 + id % 8 : id / 16 * kLineElements;
    lane = tile.data + row * row_step + depth * depth_step;
  }

  DNL_DEVICE void load(uint32_t (&fragment)[4], int row, int depth) const {
    const T* from = lane + row * row_step + depth * depth_step;
    if (transposed)
      ldmatrix_x4_trans(fragment, from);
    else
      ldmatrix_x4(fragment, from);
  }
};

// c[m][n] += A B over kDepth: a[m] are 16 rows each, b gives 16 columns, as two instructions of eight.
template <class T, int kRowTiles>
DNL_DEVICE void multiply(float (&c)[kRowTiles][2][4], const uint32_t (&a)[kRowTiles][4], const uint32_t (&b)[4]) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t pair[2] = {b[half], b[half + 2]};
    for (int m = 0; m < kRowTiles; ++m) mma_m16n8k16<T>(c[m][half], a[m], pair);
  }
}

// Two neighbours, rounded and stored; returns the sum of what was stored.
template <class T>
DNL_DEVICE float store_rounded(T* to, float low, float high) {
  const uint32_t packed = pack2<T>(low, high);
  *reinterpret_cast<uint32_t*>(to) = packed;
  const Pair pair = unpack2<T>(packed);
  return pair.lo + pair.hi;
}

// Where this lane's entries of a 16 x 8 result lie: c[2 h + u] is at row fragment_row(h), column fragment_column() + u.
DNL_DEVICE int fragment_row(int half) { return threadIdx.x % kWarp / 4 + 8 * half; }
DNL_DEVICE int fragment_column() { return threadIdx.x % 4 * 2; }

}  // namespace dnl
