// Matrix products on packed operands: C = A B or C += A B, with a block of C in registers while it is added up.
//
// B is cut into panels of kLanes columns; a block is kRows rows of A by one panel, and its kRows x kLanes sums stay in
// vector registers over the whole depth: each step loads one row of the panel and broadcasts one element of each row of
// A. The panel streams from L1/L2; nothing is written until the block is done. With AVX-512 a block is 6 x 64 floats:
// 24 sums, 4 vectors of B, 1 of A, of 32 registers. NEON's loops are in core/cpu/neon.h.
//
// The result C comes in panels too, and a C in panels is both a B (its rows the depth) and an A (its columns the depth)
// for a following product: a tile of softmax probabilities needs no repacking between the products it takes part in.
//
//   panels   element (k, lane) of panel p at  p * panel + k * kLanes + lane         (kGroup = 1)
//            bf16 has G = kGroup depths in a lane:  p * panel + (k / G) * G kLanes + G lane + k % G
//   rows     element (r, k) at  (k / run) * jump + r * row + k % run                (run = depth for a plain row)
//            of T = kRowGroup > 1 rows that lie together:  (k / run) * jump + (r / T) * T row + place(r % T, k % run),
//            place(r, k) that of element (k, r) in a panel of T lanes
#pragma once

#include <algorithm>

#include "core/cpu/vec.h"
#ifdef DNL_AMX
#include "core/cpu/amx.h"
#endif

namespace dnl {
namespace DNL_ISA {

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <class E>
struct Block {
  static constexpr int kVectors = kRegisters == 32 ? 4 : 2;
  static constexpr int kLanes = kVectors * kWidth<Acc<E>>;
  static constexpr int kRows = 6;
  static constexpr int kGroup = sizeof(Acc<E>) / sizeof(E);  // depths one lane of an instruction takes
  static constexpr int kRowGroup = 1;                        // rows of A that lie together
};

// The place of element (k, lane) in a panel of `lanes`.
template <class E>
constexpr int64_t panel_place(int64_t k, int64_t lane, int64_t lanes) {
  constexpr int64_t G = Block<E>::kGroup;
  return k / G * G * lanes + lane * G + k % G;
}
// The place of element (r, k) in rows `row` apart, all of one run.
template <class E>
constexpr int64_t row_place(int64_t r, int64_t k, int64_t row) {
  constexpr int64_t T = Block<E>::kRowGroup;
  return T == 1 ? r * row + k : r / T * T * row + panel_place<E>(k, r % T, T);
}
// How many rows there must be room for, where there are `rows`.
template <class E>
constexpr int64_t row_space(int64_t rows) {
  return round_up(rows, Block<E>::kRowGroup);
}

template <class E>
struct RowOperand {
  const E* data;
  int64_t row;   // between rows
  int64_t run;   // consecutive depths
  int64_t jump;  // between runs
};

template <class E>
struct PanelOperand {
  const E* data;
  int64_t panel;
};

template <class T>
struct PanelResult {
  T* data;
  int64_t panel;  // between panels; rows are kLanes apart
};

enum class Into { store, add, rescale };  // C = AB;  C = C + AB;  C = C * alpha + AB, alpha a factor per lane

// One row of a block, one step of the depth.
template <class E>
struct Step {
  using V = Vec<E>;
  static V load_b(const E* b) { return load(b); }
  static V broadcast_a(const E* a) { return broadcast(*a); }
  static V fma(V c, V a, V b) { return c + a * b; }
};

}  // namespace DNL_ISA
}  // namespace dnl

#ifdef DNL_NEON
#include "core/cpu/neon.h"
#elif defined(DNL_BF16_PRODUCTS)
#include "core/cpu/avx512_bf16.h"
#endif

namespace dnl {
namespace DNL_ISA {

#ifndef DNL_NEON
// How near the next rows of A are brought: 3 is L1, 2 is L2. Rows that lie a power of two apart, as those of a
// channel-first gradient may, share few sets of L1: two blocks of them would drive each other out. A block of bfloat16
// takes half the time, and L1 is better all the same.
template <class E>
constexpr int kNextRows = Block<E>::kGroup == 1 ? 2 : 3;

// The sums of R rows of a block. Loops over them are unrolled, all of them: an index at run time would move the sums to
// memory.
template <class E, int R>
struct Sums {
  using B = Block<E>;
  static constexpr int W = kWidth<Acc<E>>;
  Vec<Acc<E>> sum[R][B::kVectors];

  DNL_INLINE Sums() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < B::kVectors; ++v) sum[r][v] = Vec<Acc<E>>{};
  }
  // Adds the products of `count` depths. Returns where B goes on. What the next block reads of A is asked for
  // meanwhile: a few rows, and a short piece of each, are no stream that a prefetcher of the hardware would follow.
  DNL_INLINE const E* add(const E* a, int64_t row, int64_t count, const E* b) {
    constexpr int64_t kLine = 64 / sizeof(E);
    for (int64_t line = 0; line < count; line += kLine) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(a + (R + r) * row + line, 0, kNextRows<E>);
      for (int64_t k = line; k < std::min(line + kLine, count); k += B::kGroup) {
        typename Step<E>::V bk[B::kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < B::kVectors; ++v) bk[v] = Step<E>::load_b(b + v * W * B::kGroup);
        b += B::kLanes * B::kGroup;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto ak = Step<E>::broadcast_a(a + r * row + k);
#pragma GCC unroll 8
          for (int v = 0; v < B::kVectors; ++v) sum[r][v] = Step<E>::fma(sum[r][v], ak, bk[v]);
        }
      }
    }
    return b;
  }
  DNL_INLINE Vec<Acc<E>> at(int r, int v) const { return sum[r][v]; }
};
#endif

// A function of its own: within a caller, whose variables want registers too, the distances between the rows would be
// loaded again at every step.
template <class E, int R, Into into>
__attribute__((noinline)) void block(const E* a, int64_t row, int64_t run, int64_t jump, const E* b, int64_t depth,
                                     Acc<E>* c, const Acc<E>* alpha) {
  using B = Block<E>;
  constexpr int W = kWidth<Acc<E>>;
  Sums<E, R> sums;
  if (into != Into::store)  // C is read when the sums are done, and written: asked for now, it is there by then
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int lane = 0; lane < B::kLanes; lane += 64 / sizeof(Acc<E>)) __builtin_prefetch(c + r * B::kLanes + lane, 1);
  for (int64_t begin = 0; begin < depth; begin += run, a += jump) b = sums.add(a, row, std::min(run, depth - begin), b);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < B::kVectors; ++v) {
      Acc<E>* out = c + r * B::kLanes + v * W;
      if (into == Into::store) store(out, sums.at(r, v));
      if (into == Into::add) store(out, load(out) + sums.at(r, v));
      if (into == Into::rescale) store(out, load(out) * load(alpha + v * W) + sums.at(r, v));
    }
}

// The block of `rows` rows, at most Most.
template <class E, int Most, Into into, class... Rest>
void last_block(int64_t rows, Rest... rest) {
  if (rows == Most) return block<E, Most, into>(rest...);
  if constexpr (Most > 1) last_block<E, Most - 1, into>(rows, rest...);
}

// C (rows x panels * kLanes) from A (rows x depth) and B (depth x panels * kLanes). `depth` is a multiple of kGroup:
// operands are zero there. alpha: (panels * kLanes), for Into::rescale.
template <class E, Into into>
void vector_slice(int64_t rows, int64_t panels, int64_t depth, RowOperand<E> a, PanelOperand<E> b,
                  PanelResult<Acc<E>> c, const Acc<E>* alpha) {
  using B = Block<E>;
  for (int64_t p = 0; p < panels; ++p) {
    const E* bp = b.data + p * b.panel;
    Acc<E>* cp = c.data + p * c.panel;
    const Acc<E>* factor = alpha ? alpha + p * B::kLanes : nullptr;
    int64_t r = 0;
    for (; r + B::kRows <= rows; r += B::kRows)
      block<E, B::kRows, into>(a.data + r * a.row, a.row, a.run, a.jump, bp, depth, cp + r * B::kLanes, factor);
    last_block<E, B::kRows - 1, into>(rows - r, a.data + r * a.row, a.row, a.run, a.jump, bp, depth, cp + r * B::kLanes,
                                      factor);
  }
}

// The operands from depth k on.
template <class E>
void advance(RowOperand<E>& a, PanelOperand<E>& b, int64_t k) {
  a.data += k / a.run * a.jump + k % a.run * Block<E>::kRowGroup;
  b.data += k * Block<E>::kLanes;
}

#ifdef DNL_AMX
template <class E, Into into>
void product_slice(int64_t rows, int64_t panels, int64_t depth, RowOperand<E> a, PanelOperand<E> b,
                   PanelResult<Acc<E>> c, const Acc<E>* alpha) {
  static_assert(std::is_same_v<E, bf16> && Block<E>::kLanes == kPanelLanes, "what tiles multiply");
  const bool whole_runs = a.run >= depth || a.run % kTileDepth == 0;
  const int64_t tiled = whole_runs ? depth / kTileDepth * kTileDepth : 0;
  if (!tiled) return vector_slice<E, into>(rows, panels, depth, a, b, c, alpha);
  if (into == Into::rescale)
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t lane = 0; lane < kPanelLanes; lane += kWidth<float>) {
          float* sum = c.data + p * c.panel + r * kPanelLanes + lane;
          store(sum, load(sum) * load(alpha + p * kPanelLanes + lane));
        }
  tile_product(rows, panels, tiled, a, b, c, into == Into::store);
  if (tiled == depth) return;
  advance(a, b, tiled);
  vector_slice<E, Into::add>(rows, panels, depth - tiled, a, b, c, nullptr);
}
#else
template <class E, Into into>
void product_slice(int64_t rows, int64_t panels, int64_t depth, RowOperand<E> a, PanelOperand<E> b,
                   PanelResult<Acc<E>> c, const Acc<E>* alpha) {
  vector_slice<E, into>(rows, panels, depth, a, b, c, alpha);
}
#endif

// A sum over a long depth is cut into slices that each start from zero: in float and double that halves the rounding
// error of one running sum over 512, and a panel's slice stays in L1. Products of bfloat16 are exact in the accumulator
// and far finer than their operands; there a slice only costs a pass over C. Double is for checking: accuracy before
// speed. A slice is whole groups and whole runs.
template <class E>
constexpr int64_t kDepthSlice = std::is_same_v<E, double> ? 32
                                : Block<E>::kGroup == 1   ? 128
                                                          : 512;

template <class E, Into into>
void product(int64_t rows, int64_t panels, int64_t depth, RowOperand<E> a, PanelOperand<E> b, PanelResult<Acc<E>> c,
             const Acc<E>* alpha = nullptr) {
  constexpr int64_t slice = kDepthSlice<E>;
  product_slice<E, into>(rows, panels, std::min(depth, slice), a, b, c, alpha);
  for (int64_t k = slice; k < depth; k += slice) {
    advance(a, b, slice);
    product_slice<E, Into::add>(rows, panels, std::min(depth - k, slice), a, b, c, nullptr);
  }
}

// C = AB where `fresh`; else what is there stays: C = C + AB, or C = C * alpha + AB where alpha is given.
template <class E>
void accumulate(bool fresh, int64_t rows, int64_t panels, int64_t depth, RowOperand<E> a, PanelOperand<E> b,
                PanelResult<Acc<E>> c, const Acc<E>* alpha = nullptr) {
  if (fresh)
    product<E, Into::store>(rows, panels, depth, a, b, c);
  else if (alpha)
    product<E, Into::rescale>(rows, panels, depth, a, b, c, alpha);
  else
    product<E, Into::add>(rows, panels, depth, a, b, c);
}

}  // namespace DNL_ISA
}  // namespace dnl
