// Products of bfloat16 by AVX-512: VDPBF16PS takes pairs of depths. Included by core/cpu/product.h.
#pragma once

namespace dnl {
namespace DNL_ISA {

template <>
struct Step<bf16> {
  using V = __m512bh;
  static V load_b(const bf16* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static V broadcast_a(const bf16* a) {
    int pair;
    std::memcpy(&pair, a, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vec<float> fma(Vec<float> c, V a, V b) { return (Vec<float>)_mm512_dpbf16_ps((__m512)c, a, b); }
};

inline __m512i round_to_bf16(Vec<float> x) {  // in the low half of each lane
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// A group of depths, rounded, in the order of a panel. Returns their sum as rounded.
inline Vec<float> store_group(bf16* out, const Vec<float> (&x)[2]) {
  const __m512i a = round_to_bf16(x[0]), b = _mm512_slli_epi32(round_to_bf16(x[1]), 16);
  _mm512_storeu_si512(out, _mm512_or_si512(a, b));
  return (Vec<float>)_mm512_slli_epi32(a, 16) + (Vec<float>)b;
}

// The same numbers as rows, whose depths the lanes are, a panel's width apart. Adds them as rounded to `sum`.
inline void store_rows(bf16* out, const Vec<float> (&x)[2], Vec<float>& sum) {
  for (int i = 0; i < 2; ++i) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x[i]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * Block<bf16>::kLanes), rounded);
    sum += (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
  }
}

}  // namespace DNL_ISA
}  // namespace dnl
