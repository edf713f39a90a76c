// float16 by its definition: sign, five bits of exponent, ten of fraction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace half {

inline bool is_nan(uint32_t bits) { return (bits & 0x7fff) > 0x7c00; }

// The value of a finite number.
inline double value(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
  const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The number nearest to x, which is no NaN; of two, the one whose last bit is 0. From 65,520 on that is infinity.
inline uint16_t nearest(double x) {
  const double magnitude = std::min(std::fabs(x), 65536.0);
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  // In double both operations are exact. A fraction of 2048 carries into the exponent, as it should.
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  const int bits = std::min((exponent + 14) * 1024 + fraction, 0x7c00);
  return static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
}

}  // namespace half
