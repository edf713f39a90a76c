// Products of bfloat16 by AMX tiles (TDPBF16PS), on the packed operands of core/cpu/product.h without repacking.
//
// The second operand of a tile instruction is 16 rows of pairs by 16 lanes, which a panel of B has 256 bytes apart: its
// pairs of depths are interleaved over 64 lanes. The first operand is 16 rows of A by 32 depths. Eight tiles hold 2 x 2
// sums of 16 x 16, two pieces of A and two of B, so that each piece loaded is used twice:
//
//               lanes 0 - 15   lanes 16 - 31                per 32 of depth: 4 loads of 1 KB, 4 products
//     rows  0 - 15     t0             t1        A in t4
//     rows 16 - 31     t2             t3        A in t5
//                   B in t6        B in t7
//
// Fewer rows take tiles configured for fewer rows, so that the order in which an element is added up does not depend on
// its place: the backward then computes the same logits as the forward. A depth that is no multiple of 32 leaves a
// remainder, which is multiplied by vectors.
//
// Each instruction is behind a function of Tiles. Without DNL_AMX these are plain loops over arrays, so that a test
// can run the same kernel on any CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dnl {
namespace DNL_ISA {

constexpr int kTileRows = 16, kTileLanes = 16, kTileDepth = 32;
constexpr int64_t kPanelLanes = 64;  // of a panel of bfloat16
enum TileName { kSum = 0, kLeft = 4, kRight = 6, kTiles = 8 };

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int upper, int lower) {
    for (int t = 0; t < kTiles; ++t) row_bytes[t] = 64, rows[t] = kTileRows;
    rows[kSum] = rows[kSum + 1] = rows[kLeft] = static_cast<uint8_t>(upper);
    rows[kSum + 2] = rows[kSum + 3] = rows[kLeft + 1] = static_cast<uint8_t>(lower > 0 ? lower : 1);
  }
};

#ifdef DNL_AMX

// In assembly: the compilers' own functions are macros in GCC, whose tile must be a literal.
struct Tiles {
  // GCC's function says that eight of the 64 bytes are read, so that it may leave the others unwritten.
  void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  void release() { _tile_release(); }
  template <int T>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int T>
  void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int Sum, int Left, int Right>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
  }
};

#else

struct Tiles {
  unsigned char tile[kTiles][kTileRows][64];
  int rows[kTiles];

  void configure(const TileConfig& config) {
    for (int t = 0; t < kTiles; ++t) rows[t] = config.rows[t];
    std::memset(tile, 0, sizeof tile);
  }
  void release() { std::memset(tile, 0xff, sizeof tile); }  // nobody may rely on what is left there
  template <int T>
  void zero() {
    std::memset(tile[T], 0, sizeof tile[T]);
  }
  template <int T>
  void load(const void* from, int64_t row_bytes) {
    for (int r = 0; r < rows[T]; ++r) std::memcpy(tile[T][r], static_cast<const char*>(from) + r * row_bytes, 64);
  }
  template <int T>
  void store(void* to, int64_t row_bytes) {
    for (int r = 0; r < rows[T]; ++r) std::memcpy(static_cast<char*>(to) + r * row_bytes, tile[T][r], 64);
  }
  static float widened(const unsigned char* x) {
    uint16_t half;
    std::memcpy(&half, x, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  template <int Sum, int Left, int Right>
  void multiply() {
    for (int r = 0; r < rows[Sum]; ++r)
      for (int lane = 0; lane < kTileLanes; ++lane) {
        float sum, even = 0, odd = 0;
        std::memcpy(&sum, tile[Sum][r] + 4 * lane, 4);
        for (int pair = 0; pair < kTileDepth / 2; ++pair) {
          even += widened(tile[Left][r] + 4 * pair) * widened(tile[Right][pair] + 4 * lane);
          odd += widened(tile[Left][r] + 4 * pair + 2) * widened(tile[Right][pair] + 4 * lane + 2);
        }
        sum += even + odd;
        std::memcpy(tile[Sum][r] + 4 * lane, &sum, 4);
      }
  }
};

#endif

// 32 lanes of `upper` + `lower` rows: c (+)= a b, over a depth of whole tiles. The tiles are configured for these rows.
// b: a panel from its first of the 32 lanes on; c: likewise, rows kPanelLanes apart.
template <bool kBoth, class Element>
inline void tile_block(Tiles& tiles, const Element* a, int64_t row, int64_t run, int64_t jump, const Element* b,
                       int64_t depth, float* c, bool fresh) {
  constexpr int64_t kRowBytes = kPanelLanes * sizeof(float), kPairBytes = 2 * kPanelLanes * sizeof(Element);
  float* below = c + kTileRows * kPanelLanes;
  if (fresh) {
    tiles.template zero<kSum>();
    tiles.template zero<kSum + 1>();
    if (kBoth) tiles.template zero<kSum + 2>(), tiles.template zero<kSum + 3>();
  } else {
    tiles.template load<kSum>(c, kRowBytes);
    tiles.template load<kSum + 1>(c + kTileLanes, kRowBytes);
    if (kBoth)
      tiles.template load<kSum + 2>(below, kRowBytes), tiles.template load<kSum + 3>(below + kTileLanes, kRowBytes);
  }
  for (int64_t begin = 0; begin < depth; begin += run, a += jump) {
    const int64_t count = run < depth - begin ? run : depth - begin;
    for (int64_t k = 0; k < count; k += kTileDepth, b += kTileDepth * kPanelLanes) {
      tiles.template load<kLeft>(a + k, row * sizeof(Element));
      tiles.template load<kRight>(b, kPairBytes);
      tiles.template load<kRight + 1>(b + 2 * kTileLanes, kPairBytes);
      tiles.template multiply<kSum, kLeft, kRight>();
      tiles.template multiply<kSum + 1, kLeft, kRight + 1>();
      if (kBoth) {
        tiles.template load<kLeft + 1>(a + k + kTileRows * row, row * sizeof(Element));
        tiles.template multiply<kSum + 2, kLeft + 1, kRight>();
        tiles.template multiply<kSum + 3, kLeft + 1, kRight + 1>();
      }
    }
  }
  tiles.template store<kSum>(c, kRowBytes);
  tiles.template store<kSum + 1>(c + kTileLanes, kRowBytes);
  if (kBoth)
    tiles.template store<kSum + 2>(below, kRowBytes), tiles.template store<kSum + 3>(below + kTileLanes, kRowBytes);
}

// C (rows x panels * kPanelLanes), C = A B or C += A B. `depth` and, if there are several runs, `run` are whole tiles.
// A as RowOperand, B as PanelOperand, C as PanelResult of core/cpu/product.h.
template <class Rows, class Panels, class Result>
inline void tile_product(int64_t rows, int64_t panels, int64_t depth, const Rows& a, const Panels& b, const Result& c,
                         bool fresh) {
  constexpr int64_t kBlock = 2 * kTileRows;
  Tiles tiles;
  const int64_t whole = rows / kBlock * kBlock, rest = rows - whole;
  const auto blocks = [&](int64_t first, int64_t end, auto both) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t lane = 0; lane < kPanelLanes; lane += 2 * kTileLanes)
        for (int64_t r = first; r < end; r += kBlock)
          tile_block<decltype(both)::value>(tiles, a.data + r * a.row, a.row, a.run, a.jump,
                                            b.data + p * b.panel + 2 * lane, depth,
                                            c.data + p * c.panel + r * kPanelLanes + lane, fresh);
  };
  if (whole) {
    tiles.configure(TileConfig(kTileRows, kTileRows));
    blocks(0, whole, std::true_type{});
  }
  if (rest > kTileRows) {
    tiles.configure(TileConfig(kTileRows, static_cast<int>(rest) - kTileRows));
    blocks(whole, rows, std::true_type{});
  } else if (rest) {
    tiles.configure(TileConfig(static_cast<int>(rest), 0));
    blocks(whole, rows, std::false_type{});
  }
  tiles.release();
}

}  // namespace DNL_ISA
}  // namespace dnl
