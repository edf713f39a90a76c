// exp2 of the instruction set dnl::DNL_ISA, to the error that core/cpu/vec.h promises.
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

inline void test_exponentials() {
  test_exponential(-126.0f, 2e-7);
  test_exponential(-1022.0, 3e-16);
}
