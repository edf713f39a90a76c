// Vectors of one instruction set, element types and exp2.
//
// Included by the isa_*.cpp files only, after they set the target and define DNL_ISA (the namespace) and
// DNL_VECTOR_BYTES. The arithmetic is in GCC's vector extension, so that one source serves every instruction set;
// intrinsics are used only where that extension cannot express the instruction.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/types.h"

namespace dnl {
namespace DNL_ISA {

// ---------------------------------------------------------------------------------------------------------------------
// Element types in memory
// ---------------------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

#ifdef DNL_NEON
// By FCVT, which every Arm of 64 bits has.
inline float widen(f16 x) {
  __fp16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
}
#else
// float16 is converted by integer arithmetic, which compilers vectorise in any loop; of _Float16, GCC 12 converts one
// element at a time, and to double by a function of its library. The exponent's bias is 15 here and 127 in a float. A
// subnormal x is 2^-14 less than the normal number with its fraction; infinity and NaN keep their exponent of all ones.
inline float widen(f16 x) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + rebias + (exponent == 0x0f800000u ? rebias : 0);
  const uint32_t subnormal = bits_of(float_of(magnitude + rebias + (1u << 23)) - 0x1p-14f);
  return float_of((exponent ? normal : subnormal) | (x.bits & 0x8000u) << 16);
}
#endif

template <class T, class S>
inline T narrow(S x);
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline float narrow<float>(double x) {
  return static_cast<float>(x);
}
#ifdef DNL_NEON
template <>
inline f16 narrow<f16>(float x) {
  const __fp16 half = static_cast<__fp16>(x);
  f16 result;
  std::memcpy(&result, &half, sizeof half);
  return result;
}
#else
// Rounds to nearest even, as all conversions here. Below 2^-14 an addition rounds: 0.5 has its last place where the
// smallest subnormal is. From 65,520 on the result is infinity, which the carry of a normal number gives up to 65,536.
template <>
inline f16 narrow<f16>(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, infinity
  const uint32_t result = magnitude < 0x38800000u ? subnormal : magnitude < 0x47800000u ? normal : beyond;
  return f16{static_cast<uint16_t>(result | (bits >> 16 & 0x8000u))};
}
#endif
template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  // A NaN would round up to infinity when its payload is all ones, so it keeps its top bits.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return bf16{static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : rounded)};
}
template <>
inline f16 narrow<f16>(double x) {
  return narrow<f16>(static_cast<float>(x));
}
template <>
inline bf16 narrow<bf16>(double x) {
  return narrow<bf16>(static_cast<float>(x));
}

// Type of sums and statistics over elements of type T.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(8), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kWidth = DNL_VECTOR_BYTES / sizeof(T);
#ifdef DNL_NEON
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = DNL_VECTOR_BYTES == 64 ? 32 : 16;
#endif

#define DNL_INLINE __attribute__((always_inline)) inline

template <class T>
inline Vec<T> load(const T* x) {
  return *reinterpret_cast<const Vec<T>*>(x);
}
// As accumulators.
template <class T>
inline Vec<Acc<T>> load_wide(const T* x) {
  Acc<T> wide[kWidth<Acc<T>>];
  for (int64_t l = 0; l < kWidth<Acc<T>>; ++l) wide[l] = widen(x[l]);
  return load(wide);
}
template <class T>
inline void store(T* x, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(x) = v;
}
// Rounded.
template <class T>
inline void store_narrow(T* x, Vec<Acc<T>> v) {
  Acc<T> wide[kWidth<Acc<T>>];
  store(wide, v);
  for (int64_t l = 0; l < kWidth<Acc<T>>; ++l) x[l] = narrow<T>(wide[l]);
}
// 16 bits by the vector, as widen() and narrow() do it one by one: loops over so few elements compilers leave as they
// are, or split.
typedef uint16_t Halves __attribute__((vector_size(DNL_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(4), may_alias));
inline Vec<float> load_wide(const bf16* x) {
  return (Vec<float>)(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Words) << 16);
}
inline void store_narrow(bf16* x, Vec<float> v) {
  const Words bits = (Words)v, high = bits >> 16, rounded = (bits + 0x7fff + (high & 1)) >> 16;
  const Words kept = v == v ? rounded : high | 0x40;
  *reinterpret_cast<Halves*>(x) = __builtin_convertvector(kept, Halves);
}
#if defined(DNL_TARGET) && DNL_VECTOR_BYTES == 64
inline Vec<float> load_wide(const f16* x) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline void store_narrow(f16* x, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(DNL_TARGET) && DNL_VECTOR_BYTES == 32
inline Vec<float> load_wide(const f16* x) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline void store_narrow(f16* x, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
// x - 0 is x, which a compiler knows and turns into the broadcast alone, from memory. 0 + x is not where x = -0: that
// would be an addition and a shuffle for every broadcast, on the units that multiply.
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
// Lane i of the result is lane i + S, in a circle.
template <class T, int S, size_t... I>
inline Vec<T> turned(Vec<T> x, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, ((I + S) % kWidth<T>)...);
#else
  using U = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(x, typename VecOf<T>::integer{static_cast<U>((I + S) % kWidth<T>)...});
#endif
}
// Transposes a square block of W x W elements of Bytes bytes: element j of row i becomes element i of row j. In
// round S = 1, 2, 4, ... rows S apart exchange every other run of S elements.
template <int Bytes>
struct Transposition {
  using U = std::conditional_t<Bytes == 2, uint16_t, std::conditional_t<Bytes == 4, uint32_t, uint64_t>>;
  typedef U Row __attribute__((vector_size(DNL_VECTOR_BYTES), aligned(Bytes), may_alias));
  static constexpr int W = DNL_VECTOR_BYTES / Bytes;

  template <int S, size_t... I>
  static void exchange(Row& a, Row& b, std::index_sequence<I...>) {
#ifdef __clang__
    const Row low = __builtin_shufflevector(a, b, (I / S % 2 ? I - S + W : I)...);
    const Row high = __builtin_shufflevector(a, b, (I / S % 2 ? I + W : I + S)...);
#else
    const Row low = __builtin_shuffle(a, b, Row{static_cast<U>(I / S % 2 ? I - S + W : I)...});
    const Row high = __builtin_shuffle(a, b, Row{static_cast<U>(I / S % 2 ? I + W : I + S)...});
#endif
    a = low, b = high;
  }
  template <int S>
  static void rounds(Row (&row)[W]) {
    if constexpr (S < W) {
#pragma GCC unroll 32
      for (int i = 0; i < W; ++i)
        if (i / S % 2 == 0) exchange<S>(row[i], row[i + S], std::make_index_sequence<W>());
      rounds<2 * S>(row);
    }
  }
  static void run(const char* in, int64_t in_pitch, char* out, int64_t out_pitch) {
    Row row[W];
#pragma GCC unroll 32
    for (int i = 0; i < W; ++i) row[i] = *reinterpret_cast<const Row*>(in + i * in_pitch * Bytes);
    rounds<1>(row);
#pragma GCC unroll 32
    for (int i = 0; i < W; ++i) *reinterpret_cast<Row*>(out + i * out_pitch * Bytes) = row[i];
  }
};

// Element (c, r) of `out` = element (r, c) of `in`, both of Bytes bytes; pitches in elements.
template <int Bytes>
inline void transpose(const void* in, int64_t in_pitch, int64_t rows, int64_t columns, void* out, int64_t out_pitch) {
  constexpr int64_t W = Transposition<Bytes>::W;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      const char* from = static_cast<const char*>(in) + (r * in_pitch + c) * Bytes;
      char* to = static_cast<char*>(out) + (c * out_pitch + r) * Bytes;
      const int64_t height = std::min(W, rows - r), width = std::min(W, columns - c);
      if (height == W && width == W) {
        Transposition<Bytes>::run(from, in_pitch, to, out_pitch);
        continue;
      }
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < height; ++i)
          std::memcpy(to + (j * out_pitch + i) * Bytes, from + (i * in_pitch + j) * Bytes, Bytes);
    }
}

// a > b ? a : b and a < b ? a : b: `b` where one is NaN. x86 has instructions for just that, which GCC
// does not find. All lanes are named: what the intrinsics without a mask pass for the others, GCC warns of.
#if defined(DNL_TARGET) && DNL_VECTOR_BYTES == 64
#define DNL_SCALES  // whole numbers into exponents by one instruction
inline Vec<float> greater(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
inline Vec<double> greater(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
}
inline Vec<float> less(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
inline Vec<double> less(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
}
#elif defined(DNL_TARGET) && DNL_VECTOR_BYTES == 32
inline Vec<float> greater(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec<double> greater(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline Vec<float> less(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
inline Vec<double> less(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
template <class V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V less(V a, V b) {
  return a < b ? a : b;
}
#endif

// The larger of two numbers, and `a` where one is NaN: a NaN in `b` reaches the result through the exponentials.
template <class V>
inline V vmax(V a, V b) {
  return greater(b, a);
}
// The largest of all lanes.
template <class T, int S = kWidth<T> / 2>
inline T largest_lane(Vec<T> x) {
  x = vmax(x, turned<T, S>(x, std::make_index_sequence<kWidth<T>>()));
  if constexpr (S > 1)
    return largest_lane<T, S / 2>(x);
  else
    return x[0];
}

// 2^x of an x that is not positive, with relative error under 2e-7 (float) and 3e-16 (double). Below the normal range
// 0; NaN stays NaN. A positive x counts as 0: probabilities are taken relative to the largest, also where that was
// found in another sum of the same products. x = n + f with |f| <= 1/2; a minimax polynomial (Remez, degree 6 and 12)
// for 2^f, then n into the exponent.
inline Vec<float> exp2(Vec<float> x) {
  using V = Vec<float>;
  const V least = broadcast(-126.0f), most{};
#ifdef DNL_SCALES
  const V y = less(most, x), n = (V)_mm512_maskz_roundscale_ps(0xffff, (__m512)y, _MM_FROUND_TO_NEAREST_INT), f = y - n;
#else
  using I = typename VecOf<float>::integer;
  const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: added, it leaves n in the low bits, where its own are zero
  const V y = less(most, greater(least, x)), t = y + magic, f = y - (t - magic);
#endif
  V p = broadcast(1.5461444698569129e-4f);
  p = p * f + 1.3400428177615838e-3f;
  p = p * f + 9.6180566785246381e-3f;
  p = p * f + 5.5503272266703021e-2f;
  p = p * f + 2.4022650922288759e-1f;
  p = p * f + 6.9314720670283260e-1f;
  p = p * f + 1.0f;
#ifdef DNL_SCALES
  return (V)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ), (__m512)p, (__m512)n);
#else
  p = p * (V)(((I)t << 23) + (127 << 23));
  return x < least ? V{} : p;
#endif
}

inline Vec<double> exp2(Vec<double> x) {
  using V = Vec<double>;
  const V least = broadcast(-1022.0), most{};
#ifdef DNL_SCALES
  const V y = less(most, x), n = (V)_mm512_maskz_roundscale_pd(0xff, (__m512d)y, _MM_FROUND_TO_NEAREST_INT), f = y - n;
#else
  using I = typename VecOf<double>::integer;
  const V magic = broadcast(6755399441055744.0);  // 1.5 * 2^52
  const V y = less(most, greater(least, x)), t = y + magic, f = y - (t - magic);
#endif
  V p = broadcast(2.5733568308756891e-11);
  p = p * f + 4.4566753410492059e-10;
  p = p * f + 7.0548943863483480e-9;
  p = p * f + 1.0178051190960649e-7;
  p = p * f + 1.3215486815999977e-6;
  p = p * f + 1.5252733856293466e-5;
  p = p * f + 1.5403530393362756e-4;
  p = p * f + 1.3333558146390353e-3;
  p = p * f + 9.6181291076284831e-3;
  p = p * f + 5.5504108664821699e-2;
  p = p * f + 2.4022650695910071e-1;
  p = p * f + 6.9314718055994531e-1;
  p = p * f + 1.0;
#ifdef DNL_SCALES
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, (__m512d)least, _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_pd(normal, (__m512d)p, (__m512d)n);
#else
  p = p * (V)(((I)t << 52) + (int64_t{1023} << 52));
  return x < least ? V{} : p;
#endif
}

template <class T>
constexpr T kLog2e = T(1.44269504088896340735992468100189214L);

}  // namespace DNL_ISA
}  // namespace dnl
