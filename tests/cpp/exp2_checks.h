// exp2 of the instruction set dnl::DNL_ISA, to the error that core/cpu/vec.h promises; vectors of 16 bits, which are
// widened and rounded as one by one.
#pragma once

#include <cmath>
#include <limits>

#include "check.h"
#include "core/cpu/vec.h"

// 2^x, computed in one lane of a vector.
template <class T>
T exponential(T x, int lane) {
  using namespace dnl::DNL_ISA;
  T at[kWidth<T>] = {}, result[kWidth<T>];
  at[lane] = x;
  store(result, dnl::DNL_ISA::exp2(load(at)));
  return result[lane];
}

// Of x from 0 down to where the normal numbers end; then of what lies beyond, and of both ends.
template <class T>
void test_exponential(T least, double bar) {
  double worst = 0;
  for (T x = 0; x >= least; x -= T(0.0173))
    for (int lane = 0; lane < dnl::DNL_ISA::kWidth<T>; ++lane)
      worst = std::fmax(worst, std::fabs(exponential(x, lane) / std::exp2(double(x)) - 1));
  CHECK(worst < bar, "relative error %g, more than %g", worst, bar);
  CHECK(exponential(least, 0) == std::numeric_limits<T>::min(), "%g", double(exponential(least, 0)));
  const T below[] = {std::nextafter(least, least - 1), least - 1, 4 * least, -std::numeric_limits<T>::infinity()};
  for (const T x : below) CHECK(exponential(x, 0) == 0, "2^%g is %g", double(x), double(exponential(x, 0)));
  const T above[] = {std::numeric_limits<T>::min(), T(1), std::numeric_limits<T>::infinity()};
  for (const T x : above) CHECK(exponential(x, 0) == 1, "2^%g is %g", double(x), double(exponential(x, 0)));
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const T x : {nan, -nan}) CHECK(std::isnan(exponential(x, 0)), "2^NaN is %g", double(exponential(x, 0)));
}

// Of all numbers of 16 bits, and of floats whose upper halves they are, the lower one being a tie or beside it.
template <class T>
void test_halves(const char* name) {
  using namespace dnl::DNL_ISA;
  constexpr int W = kWidth<float>;
  const auto same = [](float x, float y) { return bits_of(x) == bits_of(y) || (std::isnan(x) && std::isnan(y)); };
  for (uint32_t upper = 0; upper < 0x10000; upper += W)
    for (const uint32_t lower : {0u, 0x0fffu, 0x1000u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      T halves[W], narrowed[W];
      float floats[W], wide[W];
      for (uint32_t l = 0; l < W; ++l)
        halves[l].bits = static_cast<uint16_t>(upper + l), floats[l] = float_of((upper + l) << 16 | lower);
      store(wide, load_wide(halves));
      store_narrow(narrowed, load(floats));
      for (int l = 0; l < W; ++l) {
        CHECK(same(wide[l], widen(halves[l])), "%s: %04x became %g", name, unsigned(halves[l].bits), wide[l]);
        CHECK(same(widen(narrowed[l]), widen(narrow<T>(floats[l]))), "%s: %a became %04x", name, floats[l],
              unsigned(narrowed[l].bits));
      }
    }
}

inline void test_vectors() {
  test_halves<dnl::DNL_ISA::bf16>("bfloat16");
  test_halves<dnl::DNL_ISA::f16>("float16");
  test_exponential(-126.0f, 2e-7);
  test_exponential(-1022.0, 3e-16);
}
