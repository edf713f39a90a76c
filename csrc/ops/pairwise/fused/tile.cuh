// What the fused kernels are made of: tiles of an operand in shared memory, and the fragments that mma.sync takes from
// them. Both orders of memory are served as they lie, without a transposed copy.
//
//   global memory             shared memory         registers of a warp
//   rows (channel stride 1)   [position][channel]   ldmatrix; where the product sums over the dimension that is not
//   channel-first             [channel][position]     dense, ldmatrix.trans or, of Tf32, a load per element
//
// Every product here is C (m x n) = sum over depth of A (m x depth) B (n x depth), so one fragment serves all: 16 rows
// (of A: 16 of m, of B: 16 of n) by 32 bytes of depth, as four registers in the order that mma.sync wants of A. Of B,
// registers {0, 2} are the first eight of n and {1, 3} the second eight. That holds for m16n8k16 of 16-bit elements and
// for m16n8k8 of Tf32 alike: to ldmatrix, an element of 32 bits is a pair of 16.
//
// Rows of a tile are padded against bank conflicts (row_padding() in pairwise_plan.h). Lines move by cp.async where the
// operand is aligned, element by element where it is not; what lies beyond a matrix is zero.
#pragma once

#include "core/cuda/ptx.cuh"
#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

template <class T>
constexpr int kLineElements = kLine / sizeof(T);  // a line moves at once
constexpr int kFragmentRows = 16;                 // of a fragment
template <class T>
constexpr int kDepth = 2 * kLineElements<T>;  // of a fragment, and of one product instruction

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
    constexpr int64_t step = kLineElements<T>;
    const int64_t inner = channel_first ? x.position : x.channel, outer = channel_first ? x.channel : x.position;
    aligned = inner == 1 && outer % step == 0 && reinterpret_cast<uintptr_t>(x.data) % kLine == 0;
    for (int d = 0; d < x.batch.dims; ++d) aligned = aligned && x.batch.stride[d] % step == 0;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory
// ---------------------------------------------------------------------------------------------------------------------

// `positions` x `channels` elements of an operand, both multiples of a line. Where it is read across its rows, the
// inner one is a multiple of kFragmentRows.
template <class T>
struct Tile {
  T* data;  // [outer][pitch]
  int positions, channels;
  bool channel_first;
  bool rows_are_positions;  // a row of the product is a position, else a channel

  DNL_DEVICE int outer() const { return channel_first ? channels : positions; }
  DNL_DEVICE int inner() const { return channel_first ? positions : channels; }
  DNL_DEVICE bool across() const { return rows_are_positions == channel_first; }  // products sum over what is not dense
  DNL_DEVICE int pitch() const { return inner() + row_padding(sizeof(T), across()) / static_cast<int>(sizeof(T)); }
};

template <class T>
struct alignas(kLine) Line {
  T element[kLineElements<T>];
};

// Begins to fill `tile` from position `position` and channel `channel` of `matrix`, a batch element of `x`. All threads
// of the block. The caller commits, waits and then synchronises; the tile must be free at the call.
template <class T>
DNL_DEVICE void load_tile(const Tile<T>& tile, const FusedOperand<T>& x, const T* matrix, int64_t position,
                          int64_t channel) {
  constexpr int step = kLineElements<T>;
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

// Fragments of a tile.
template <class T>
struct FragmentReader {
  const T* lane;  // what this lane reads, or names for ldmatrix, of the fragment at (0, 0)
  int row_step, depth_step;
  bool across;

  DNL_DEVICE explicit FragmentReader(const Tile<T>& tile) : across(tile.across()) {
    const int id = threadIdx.x % kWarp, pitch = tile.pitch();
    row_step = across ? 1 : pitch;
    depth_step = across ? pitch : 1;
    // Lanes 8 i .. 8 i + 7 name the eight stored rows of matrix i; i = row half + 2 * depth half.
    int row = id % 16, depth = id / 16 * kLineElements<T>;
    if (across) {
      row = kHalf<T> ? id / 8 % 2 * 8 : id / 4;
      depth = kHalf<T> ? id / 16 * 8 + id % 8 : id % 4;
    }
    lane = tile.data + row * row_step + depth * depth_step;
  }

  DNL_DEVICE void load(uint32_t (&fragment)[4], int row, int depth) const {
    if constexpr (kHalf<T>) {
      const T* from = lane + row * row_step + depth * depth_step;
      if (across)
        ldmatrix_x4_trans(fragment, from);
      else
        ldmatrix_x4(fragment, from);
    } else if (!across) {
      ldmatrix_x4(fragment, lane + row * row_step + depth);
    } else {  // an address of its own: with one for either order there are spills
      const T* from = lane + row + depth * depth_step;
      for (int r = 0; r < 4; r += 2, from += 4 * depth_step) {
        fragment[r] = bits_of(from[0]);
        fragment[r + 1] = bits_of(from[8]);
      }
    }
  }
};

// c[m][n] += A B over kDepth<T>: a[m] are 16 rows each, b gives 16 columns, as two instructions of eight.
template <class T, int kRowTiles>
DNL_DEVICE void multiply(float (&c)[kRowTiles][2][4], const uint32_t (&a)[kRowTiles][4], const uint32_t (&b)[4]) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t pair[2] = {b[half], b[half + 2]};
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (kHalf<T>)
        mma_m16n8k16<T>(c[m][half], a[m], pair);
      else
        mma_m16n8k8_tf32(c[m][half], a[m], pair);
    }
  }
}

// Two neighbours, rounded and stored; returns the sum of what was stored.
template <class T>
DNL_DEVICE float store_rounded(T* to, float low, float high) {
  if constexpr (kHalf<T>) {
    const uint32_t packed = pack2<T>(low, high);
    *reinterpret_cast<uint32_t*>(to) = packed;
    const Pair pair = unpack2<T>(packed);
    return pair.lo + pair.hi;
  } else {
    struct alignas(8) Two {
      T lo, hi;
    };
    const Two pair{rounded<T>(low), rounded<T>(high)};
    *reinterpret_cast<Two*>(to) = pair;
    return wide(pair.lo) + wide(pair.hi);
  }
}

// Where this lane's entries of a 16 x 8 result lie: c[2 h + u] is at row fragment_row(h), column fragment_column() + u.
DNL_DEVICE int fragment_row(int half) { return threadIdx.x % kWarp / 4 + 8 * half; }
DNL_DEVICE int fragment_column() { return threadIdx.x % 4 * 2; }

}  // namespace dnl
