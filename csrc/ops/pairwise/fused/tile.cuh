// What the fused kernels are made of: tiles of an operand in shared memory, and the fragments that mma.sync takes from
// them. Both orders of memory are served as they lie, without a transposed copy.
//
//   global memory             shared memory         registers of a warp
//   rows (channel stride 1)   [position][channel]   ldmatrix; ldmatrix.trans where the product sums over the dimension
//   channel-first             [channel][position]   that is not dense
//
// Every product here is C (m x n) = sum over depth of A (m x depth) B (n x depth). A fragment is 16 rows (of A: 16 of
// m, of B: 16 of n) by 32 bytes of depth, in four registers as mma.sync wants them: of A one operand, of B two, the
// first eight of n and the second. That holds for m16n8k16 of 16-bit elements and for m16n8k8 of Tf32 alike: to
// ldmatrix, an element of 32 bits is a pair of 16. It cannot transpose those, so operands of Tf32, which are copies
// anyway, lie in the order in which products sum over what is dense.
//
// Orders are template parameters, and so are the sizes that a tile has in every call: the addresses of a product are
// then a register and a constant. Rows of a tile are one line longer than their elements, against bank conflicts. Lines
// move by cp.async where the operand is aligned, element by element where it is not; what lies beyond a matrix is zero.
#pragma once

#include "core/cuda/ptx.cuh"
#include "ops/pairwise/chain/operands.cuh"
#include "ops/pairwise/pairwise_plan.h"

namespace dnl {

template <class T>
constexpr int kLineElements = kLine / sizeof(T);  // a line moves at once
constexpr int kFragmentRows = 16;                 // of a fragment
template <class T>
constexpr int kDepth = 2 * kLineElements<T>;                   // of a fragment, and of one product instruction
constexpr int kStepFragments = kDepthStepBytes / (2 * kLine);  // what products sum over comes in multiples of so many

// ---------------------------------------------------------------------------------------------------------------------
// Global memory
// ---------------------------------------------------------------------------------------------------------------------

// `x` as tiles of an order read it. What lies in the other order counts as not aligned.
template <class T>
struct FusedOperand {
  Matrix<const T> x;  // (batches, positions, channels)
  int64_t positions, channels;
  bool aligned;  // every line is dense and starts at a multiple of 16 bytes

  FusedOperand() = default;
  FusedOperand(const Matrix<const T>& matrix, int64_t n, int64_t c, bool channel_first)
      : x(matrix), positions(n), channels(c) {
    constexpr int64_t step = kLineElements<T>;
    const int64_t inner = channel_first ? x.position : x.channel, outer = channel_first ? x.channel : x.position;
    aligned = inner == 1 && outer % step == 0 && reinterpret_cast<uintptr_t>(x.data) % kLine == 0;
    for (int d = 0; d < x.batch.dims; ++d) aligned = aligned && x.batch.stride[d] % step == 0;
  }
};

// Every tile of the other side reads all of an operand. Where that is so often, one that is not aligned is copied once,
// rather than read element by element each time.
constexpr int64_t kReadsWorthACopy = 3;

// x as an operand that is read `reads` times.
template <class T, class Device>
FusedOperand<T> fused_operand(Device& device, const Matrix<const T>& x, int64_t batches, int64_t positions,
                              int64_t channels, bool channel_first, int64_t reads) {
  const FusedOperand<T> operand(x, positions, channels, channel_first);
  if constexpr (kHalf<T>)  // of Tf32, the operands are aligned copies already
    if (!operand.aligned && reads >= kReadsWorthACopy)
      return {copied_operand<T>(device, x, batches, positions, channels, nullptr, channel_first), positions, channels,
              channel_first};
  return operand;
}

// Whether tiles for products of T lie channel-first where the call does: queries and keys, and values.
template <class T, bool kChannelFirst>
struct TileOrder {
  static constexpr bool kLogits = kHalf<T> && kChannelFirst, kValue = !kHalf<T> || kChannelFirst;
};

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory
// ---------------------------------------------------------------------------------------------------------------------

// kPositions_ x `channels` elements of an operand, both multiples of a line. Rows of the product are its positions, or
// else its channels.
template <class T, int kPositions_, bool kChannelFirst_, bool kRowsArePositions>
struct Tile {
  static constexpr int kPositions = kPositions_;
  static constexpr bool kChannelFirst = kChannelFirst_;
  static constexpr bool kAcross = kRowsArePositions == kChannelFirst;  // products sum over what is not dense
  static_assert(kHalf<T> || !kAcross, "ldmatrix transposes 16-bit elements alone");
  T* data;  // [outer][pitch]
  int channels;

  DNL_DEVICE int outer() const { return kChannelFirst ? channels : kPositions; }
  DNL_DEVICE int inner() const { return kChannelFirst ? kPositions : channels; }
  DNL_DEVICE int pitch() const { return inner() + kLineElements<T>; }
};

DNL_DEVICE int at_most_of(int64_t count, int most) { return count < most ? static_cast<int>(count) : most; }

template <class T>
struct alignas(kLine) Line {
  T element[kLineElements<T>];
};

// Fills a tile again and again, with one run of positions or, if kAlongChannels, of channels after another: what each
// of kLoaders threads copies. A power of two of them takes a row of lines, so that a thread keeps its place in the row
// and goes from row to row by one step.
template <class T, class TileOf, int kLoaders = kThreads, bool kAlongChannels = false>
struct TileLoader {
  TileOf tile;
  int64_t stride_outer, stride_inner, run;  // of the operand; from one run to the next
  const T* from;                            // this thread's first element of the next run
  int fixed;                                // what the operand has of the dimension that runs do not go along
  int row, column, row_shift;               // this thread's first row and column; 2^row_shift rows to its next row
  bool aligned, by_line = false;            // the operand; the run at hand moves by lines rather than by elements
  int inside = 0;                           // of this thread's rows in the run at hand, how many the operand has

  // Begins with element b, position `position` and channel `channel`.
  DNL_DEVICE TileLoader(const TileOf& into, const FusedOperand<T>& x, int64_t b, int64_t position, int64_t channel)
      : tile(into),
        stride_outer(TileOf::kChannelFirst ? x.x.channel : x.x.position),
        stride_inner(TileOf::kChannelFirst ? x.x.position : x.x.channel),
        run(kAlongChannels ? into.channels * x.x.channel : TileOf::kPositions * x.x.position),
        from(x.x.element(b) + position * x.x.position + channel * x.x.channel),
        fixed(kAlongChannels ? at_most_of(x.positions - position, TileOf::kPositions)
                             : at_most_of(x.channels - channel, into.channels)),
        aligned(x.aligned) {
    const int lines = tile.inner() / kLineElements<T>, loader = threadIdx.x % kLoaders;
    int shift = 0;
    while ((1 << shift) < lines) ++shift;
    row = loader >> shift;
    column = (loader & ((1 << shift) - 1)) * kLineElements<T>;
    row_shift = kLoadersShift - shift;
    from += row * stride_outer + column * stride_inner;
  }

  // Begins to fill `tile` with the next run, of which the operand has the first `count`. All kLoaders threads. The
  // caller commits, waits and then synchronises; the tile must be free at the call.
  DNL_DEVICE void load(int count) {
    begin(count);
    if (by_line) by_lines();
    end();
  }

  // The same in parts: begin(), copy() of each of this thread's rows, end().
  DNL_DEVICE void begin(int count) {
    const int channels = kAlongChannels ? count : fixed, positions = kAlongChannels ? fixed : count;
    const int rows = TileOf::kChannelFirst ? channels : positions,
              columns = TileOf::kChannelFirst ? positions : channels;
    by_line = aligned && columns % kLineElements<T> == 0 && column < tile.inner();
    inside = column < columns ? own_rows(rows) : 0;
    if (!by_line && column < tile.inner()) by_elements(rows, columns);
  }
  DNL_DEVICE void copy(int number) const {
    if (by_line)
      cp_async_16(first_line() + (number << row_shift) * tile.pitch(), from + number * (stride_outer << row_shift),
                  number < inside);
  }
  DNL_DEVICE void end() { from += run; }

 private:
  static constexpr int kLoadersShift = kLoaders == 256 ? 8 : 7, kAtOnce = 4;
  static_assert(kLoaders == 1 << kLoadersShift);
  DNL_DEVICE T* first_line() const { return tile.data + row * tile.pitch() + column; }

  // Of this thread's rows, the first `count`. A tile has whole steps of rows, or fewer rows than one step.
  DNL_DEVICE int own_rows(int count) const { return (count - row + (1 << row_shift) - 1) >> row_shift; }

  // Rows that the operand does not have are zeros.
  DNL_DEVICE void by_lines() const {
    const T* at = from;
    T* to = first_line();
    int left = own_rows(tile.outer()), reads = inside;
    const auto copies = [&](auto count) {
#pragma unroll
      for (int copy = 0; copy < count.value; ++copy) {
        cp_async_16(to, at, copy < reads);
        at += stride_outer << row_shift;
        to += (1 << row_shift) * tile.pitch();
      }
      left -= count.value, reads -= count.value;
    };
#pragma unroll 1
    while (left >= kAtOnce) copies(std::integral_constant<int, kAtOnce>{});
#pragma unroll 1
    while (left > 0) copies(std::integral_constant<int, 1>{});
  }

  DNL_DEVICE void by_elements(int rows, int columns) const {
    const T* at = from;
    T* to = first_line();
#pragma unroll 1
    for (int r = row; r < tile.outer(); r += 1 << row_shift) {
      Line<T> values;
      for (int u = 0; u < kLineElements<T>; ++u)
        values.element[u] = r < rows && column + u < columns ? at[u * stride_inner] : rounded<T>(0);
      *reinterpret_cast<Line<T>*>(to) = values;
      at += stride_outer << row_shift;
      to += (1 << row_shift) * tile.pitch();
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Registers
// ---------------------------------------------------------------------------------------------------------------------

// Fragments of a tile, of the 16 rows from `row` on and further ones: as operand A, or as B where kRight.
template <class T, bool kAcross, bool kRight>
struct FragmentReader {
  const T* lane;  // what this lane names for ldmatrix of the first fragment
  int pitch;

  template <class TileOf>
  DNL_DEVICE FragmentReader(const TileOf& tile, int row) : pitch(tile.pitch()) {
    static_assert(TileOf::kAcross == kAcross);
    // Lanes 8 i .. 8 i + 7 name the eight stored rows of matrix i, which register i is made from.
    const int i = threadIdx.x % kWarp / 8, within = threadIdx.x % 8;
    row += (kRight ? i / 2 : i % 2) * 8;
    int depth = (kRight ? i % 2 : i / 2) * kLineElements<T>;
    (kAcross ? depth : row) += within;
    lane = tile.data + (kAcross ? depth * pitch + row : row * pitch + depth);
  }

  // The fragment that starts `row` rows and `depth` of depth further.
  DNL_DEVICE void load(uint32_t (&fragment)[4], int row, int depth) const {
    if constexpr (kAcross)
      ldmatrix_x4_trans(fragment, lane + depth * pitch + row);
    else
      ldmatrix_x4(fragment, lane + row * pitch + depth);
  }
};

// c[m] += A B over kDepth<T>: a[m] are 16 rows each, b gives 16 columns, as two instructions of eight.
template <class T, int kRowTiles>
DNL_DEVICE void multiply(float (&c)[kRowTiles][2][4], const uint32_t (&a)[kRowTiles][4], const uint32_t (&b)[4]) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t pair[2] = {b[2 * half], b[2 * half + 1]};
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (kHalf<T>)
        mma_m16n8k16<T>(c[m][half], a[m], pair);
      else
        mma_m16n8k8_tf32(c[m][half], a[m], pair);
    }
  }
}

// c += A B^T over `depth`, in steps of kSteps fragments. Each fragment is loaded before the product that comes ahead of
// its own. between(step) comes after the products of a fragment of A.
template <class T, int kSteps, int kRowTiles, int kColumnTiles, bool kLeftAcross, bool kRightAcross, class Between>
DNL_DEVICE void multiply_tiles(float (&c)[kColumnTiles][kRowTiles][2][4],
                               const FragmentReader<T, kLeftAcross, false>& left,
                               const FragmentReader<T, kRightAcross, true>& right, int depth, const Between& between) {
  static_assert(kSteps % 2 == 0, "two fragments take turns");
  uint32_t a[2][kRowTiles][4], b[2][4];
  const auto load_left = [&](int step, int at) {
    for (int m = 0; m < kRowTiles; ++m) left.load(a[step % 2][m], m * kFragmentRows, at + step * kDepth<T>);
  };
  load_left(0, 0);
  right.load(b[0], 0, 0);
#pragma unroll 1
  for (int at = 0; at < depth; at += kSteps * kDepth<T>) {
    const bool last = at + kSteps * kDepth<T> >= depth;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps || !last) load_left(step + 1, at);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int next = step * kColumnTiles + n + 1;
        if (next < kSteps * kColumnTiles || !last)
          right.load(b[next % 2], next % kColumnTiles * kFragmentRows, at + next / kColumnTiles * kDepth<T>);
        multiply<T>(c[n], a[step % 2], b[(next + 1) % 2]);
      }
      between(step);
    }
  }
}

// Two neighbours of a row as they are stored.
template <class T>
struct alignas(2 * sizeof(T)) Neighbours {
  T lo, hi;
};
template <class T>
using Packed = std::conditional_t<kHalf<T>, uint32_t, Neighbours<T>>;

// Two neighbours, rounded; adds them as rounded to `sum`.
template <class T>
DNL_DEVICE Packed<T> round_both(float low, float high, float& sum) {
  if constexpr (kHalf<T>) {
    const uint32_t packed = pack2<T>(low, high);
    const Pair pair = unpack2<T>(packed);
    sum += pair.lo + pair.hi;
    return packed;
  } else {
    const Neighbours<T> pair{rounded<T>(low), rounded<T>(high)};
    sum += wide(pair.lo) + wide(pair.hi);
    return pair;
  }
}

// Where this lane's entries of a 16 x 8 result lie: c[2 h + u] is at row fragment_row(h), column fragment_column() + u.
DNL_DEVICE int fragment_row(int half) { return threadIdx.x % kWarp / 4 + 8 * half; }
DNL_DEVICE int fragment_column() { return threadIdx.x % 4 * 2; }

}  // namespace dnl
