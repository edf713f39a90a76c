// The loops of core/cpu/product.h over the depth by NEON, of whose 32 registers 24 hold sums. Included by that file.
//
// float, double   blocks of 6 rows x 4 vectors. FMLA takes one of its factors from a lane, so nothing is broadcast: a
//                 register holds as many depths of a row of A as it has lanes, and each lane multiplies a row of B.
// bfloat16        blocks of 8 rows x 12 lanes. BFMMLA multiplies 2 rows x 4 depths by 4 depths x 2 lanes, which lie
//                 together in both operands, and adds to 2 x 2 sums. All that a step of 4 depths reads of A are 64
//                 consecutive bytes, and of B 96.
//
// BFMMLA adds two products, rounds them to odd, adds them to the sum and rounds to odd again, and takes subnormal
// numbers as zero. An element is added up in the same order in every block, so that the backward computes the same
// logits as the forward.
#pragma once

namespace dnl {
namespace DNL_ISA {

// The instructions are assembly: of the compilers' own functions GCC copies a lane that several products want to all of
// a register first, and either compiler, reordering loads and products, moves sums to memory.

// c + b * (lane I of a).
template <int I>
DNL_INLINE Vec<float> multiply_add(Vec<float> c, Vec<float> b, Vec<float> a) {
  asm volatile("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(c) : "w"(b), "w"(a), "n"(I));
  return c;
}
template <int I>
DNL_INLINE Vec<double> multiply_add(Vec<double> c, Vec<double> b, Vec<double> a) {
  asm volatile("fmla %0.2d, %1.2d, %2.d[%3]" : "+w"(c) : "w"(b), "w"(a), "n"(I));
  return c;
}

// Two vectors, the first `Place` vectors behind x.
template <class V>
struct Pair {
  V left, right;
};
template <int Place, class V, class E>
DNL_INLINE Pair<V> load_pair(const E* x) {
  constexpr int kOffset = Place * DNL_VECTOR_BYTES;
  using Read = const char[kOffset + 2 * DNL_VECTOR_BYTES];
  Pair<V> pair;
  asm volatile("ldp %q0, %q1, [%2, %3]"
               : "=w"(pair.left), "=w"(pair.right)
               : "r"(x), "n"(kOffset), "m"(*reinterpret_cast<Read*>(x)));
  return pair;
}

// Sums and their loops, unrolled all of them, as in core/cpu/product.h.
template <class E, int R>
struct Sums {
  using B = Block<E>;
  static constexpr int W = kWidth<E>;
  Vec<E> sum[R][B::kVectors];

  DNL_INLINE Sums() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < B::kVectors; ++v) sum[r][v] = Vec<E>{};
  }
  // Two vectors of B by lane I of the elements of A. B has its rows one after the other.
  template <int Place, int I, int v>
  DNL_INLINE void pair(const Vec<E> (&ak)[R], const E* b) {
    const auto bk = load_pair<Place, Vec<E>>(b);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r][v] = multiply_add<I>(sum[r][v], bk.left, ak[r]);
      sum[r][v + 1] = multiply_add<I>(sum[r][v + 1], bk.right, ak[r]);
    }
  }
  // A row of B for each I, from row `First` on.
  template <int First, size_t... I>
  DNL_INLINE void rows(const Vec<E> (&ak)[R], const E* b, std::index_sequence<I...>) {
    static_assert(B::kVectors == 4, "two pairs");
    (..., (pair<4 * (First + I), I, 0>(ak, b), pair<4 * (First + I) + 2, I, 2>(ak, b)));
  }
  // The depths of one register of a row, `Part` registers behind a.
  template <int Part>
  DNL_INLINE void part(const E* a, int64_t row, const E* b) {
    Vec<E> ak[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) ak[r] = load(a + r * row + Part * W);
    rows<Part * W>(ak, b, std::make_index_sequence<W>());
  }
  DNL_INLINE const E* add(const E* a, int64_t row, int64_t count, const E* b) {
    constexpr int64_t kStep = 4;
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep, b += kStep * B::kLanes) {
      part<0>(a + k, row, b);
      if (W < kStep) part<1>(a + k, row, b);
    }
    for (; k < count; ++k, b += B::kLanes) {
      Vec<E> ak[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) ak[r] = broadcast(a[r * row + k]);
      rows<0>(ak, b, std::index_sequence<0>());
    }
    return b;
  }
  DNL_INLINE Vec<E> at(int r, int v) const { return sum[r][v]; }
};

#ifdef DNL_BF16_PRODUCTS

template <>
struct Block<bf16> {
  static constexpr int kVectors = 3;
  static constexpr int kLanes = kVectors * kWidth<float>;
  static constexpr int kRows = 8;
  static constexpr int kGroup = 4;
  static constexpr int kRowGroup = kRows;
};

template <>
struct Step<bf16> {
  using V = bfloat16x8_t;
  static V broadcast_a(const bf16* a) {  // the same row twice
    const uint16x4_t group = vld1_u16(&a->bits);
    return vreinterpretq_bf16_u16(vcombine_u16(group, group));
  }
  DNL_INLINE static Vec<float> fma(Vec<float> c, V a, V b) {
    asm volatile("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
    return c;
  }
};

template <int R>
struct Sums<bf16, R> {
  using B = Block<bf16>;
  static constexpr int kPairs = (R + 1) / 2, kColumns = B::kLanes / 2;  // of an odd R the last row is computed in vain
  Vec<float> sum[kPairs][kColumns];                                     // rows 2 i, 2 i + 1 and lanes 2 j, 2 j + 1

  DNL_INLINE Sums() {
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sum[i][j] = Vec<float>{};
  }
  using V = Step<bf16>::V;
  // Two vectors of B, lanes 2 j to 2 j + 3.
  template <int Place, int j>
  DNL_INLINE void pair(const Pair<V> (&ak)[2], const bf16* b) {
    const auto bk = load_pair<Place + j, V>(b);
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      const V row = i % 2 ? ak[i / 2].right : ak[i / 2].left;
      sum[i][j] = Step<bf16>::fma(sum[i][j], row, bk.left);
      sum[i][j + 1] = Step<bf16>::fma(sum[i][j + 1], row, bk.right);
    }
  }
  // A group of depths, `Group` groups behind the operands.
  template <int Group>
  DNL_INLINE void group(const bf16* a, const bf16* b) {
    static_assert(B::kRowGroup == 8 && kColumns == 6, "A has four vectors for a group, B six");
    Pair<V> ak[2] = {load_pair<4 * Group, V>(a)};
    if (kPairs > 2) ak[1] = load_pair<4 * Group + 2, V>(a);
    pair<6 * Group, 0>(ak, b), pair<6 * Group, 2>(ak, b), pair<6 * Group, 4>(ak, b);
  }
  DNL_INLINE const bf16* add(const bf16* a, int64_t, int64_t count, const bf16* b) {
    constexpr int64_t kStep = 2 * B::kGroup;
    for (; count >= kStep; count -= kStep, a += kStep * B::kRowGroup, b += kStep * B::kLanes)
      group<0>(a, b), group<1>(a, b);
    if (count > 0) group<0>(a, b), b += B::kGroup * B::kLanes;
    return b;
  }
  DNL_INLINE Vec<float> at(int r, int v) const {
    const float64x2_t left = (float64x2_t)sum[r / 2][2 * v], right = (float64x2_t)sum[r / 2][2 * v + 1];
    return (Vec<float>)(r % 2 ? vzip2q_f64(left, right) : vzip1q_f64(left, right));
  }
};

inline uint16x4_t round_to_bf16(Vec<float> x) { return vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)x)); }
inline Vec<float> widen(uint16x4_t x) { return (Vec<float>)vshll_n_u16(x, 16); }

// A group of depths, rounded, in the order of a panel. Returns their sum as rounded.
inline Vec<float> store_group(bf16* out, const Vec<float> (&x)[4]) {
  const uint16x4x4_t rounded{{round_to_bf16(x[0]), round_to_bf16(x[1]), round_to_bf16(x[2]), round_to_bf16(x[3])}};
  vst4_u16(&out->bits, rounded);
  return (widen(rounded.val[0]) + widen(rounded.val[1])) + (widen(rounded.val[2]) + widen(rounded.val[3]));
}

// The same numbers as rows that lie together, whose depths the lanes are. Adds them as rounded to `sum`.
inline void store_rows(bf16* out, const Vec<float> (&x)[4], Vec<float>& sum) {
  for (int i = 0; i < 4; ++i) {
    const uint16x4_t rounded = round_to_bf16(x[i]);
    vst1_u16(&(out + i * kWidth<float>)->bits, rounded);
    sum += widen(rounded);
  }
}

#endif

}  // namespace DNL_ISA
}  // namespace dnl
