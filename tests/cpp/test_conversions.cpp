// The conversions of float16 in core/cpu/vec.h against their definition: all 65,536 numbers of float16, and as floats
// all of them, what lies between and beside them, and a sample of all bit patterns.
#define DNL_ISA checked
#define DNL_VECTOR_BYTES 16
#include <cmath>
#include <map>

#include "check.h"
#include "core/cpu/vec.h"

using namespace dnl::checked;

namespace {

// The value of a finite number: sign, five bits of exponent, ten of fraction.
double value_of(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
  const double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

bool is_nan(uint32_t bits) { return (bits & 0x7fff) > 0x7c00; }

// The nearest number to a finite |x|; of two, the one whose last bit is 0. 2^16 stands for infinity.
double nearest(double x) {
  const int exponent = x < std::ldexp(1, -14) ? -14 : std::ilogb(x);
  const double step = std::ldexp(1, exponent - 10);
  return std::min(std::nearbyint(x / step) * step, 65536.0);  // in double, both operations are exact
}

void test_widening() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = widen(f16{static_cast<uint16_t>(bits)});
    if (is_nan(bits)) {
      CHECK(std::isnan(x), "%04x is %g", bits, x);
    } else if ((bits & 0x7fff) == 0x7c00) {
      CHECK(std::isinf(x) && std::signbit(x) == bool(bits & 0x8000), "%04x is %g", bits, x);
    } else {
      CHECK(x == value_of(bits) && std::signbit(x) == bool(bits & 0x8000), "%04x is %g", bits, x);
    }
  }
}

void check_narrowing(float x, const std::map<double, uint32_t>& numbers) {
  const uint32_t got = narrow<f16>(x).bits, sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    CHECK(is_nan(got), "NaN became %04x", got);
    return;
  }
  const double magnitude = std::isinf(x) ? 65536.0 : nearest(std::fabs(double(x)));
  const uint32_t want = numbers.at(magnitude) | sign;
  CHECK(got == want, "%a became %04x, not %04x", x, got, want);
}

void test_narrowing() {
  std::map<double, uint32_t> numbers{{65536.0, 0x7c00}};
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) numbers[value_of(bits)] = bits;
  // Every number, and half-way to the next: ties, and the floats beside them.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float x = static_cast<float>(value_of(bits));
    const float next = bits == 0x7bff ? 65536.0f : static_cast<float>(value_of(bits + 1));
    const float tie = x + (next - x) / 2;
    for (float y : {x, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e6f)})
      for (float sign : {1.0f, -1.0f}) check_narrowing(sign * y, numbers);
  }
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 4093) {
    float x;
    const uint32_t pattern = static_cast<uint32_t>(bits);
    std::memcpy(&x, &pattern, sizeof x);
    check_narrowing(x, numbers);
  }
}

}  // namespace

int main() {
  test_widening();
  test_narrowing();
  return report();
}
