// The conversions of float16 in core/cpu/vec.h against their definition: all 65,536 numbers of float16, and as floats
// all of them, what lies between and beside them, and a sample of all bit patterns. One by one, and in the loops over
// arrays in which kernels convert, which compilers vectorise. And exp2.
//
// With DNL_NEON those by Arm's instructions.
#define DNL_ISA checked
#define DNL_VECTOR_BYTES 16
#include <cmath>
#include <vector>

#include "check.h"
#include "core/cpu/vec.h"
#include "exp2_checks.h"
#include "half.h"

using namespace dnl::checked;

namespace {

void check_widened(uint32_t bits, float x) {
  if (half::is_nan(bits)) {
    CHECK(std::isnan(x), "%04x is %g", bits, x);
  } else if ((bits & 0x7fff) == 0x7c00) {
    CHECK(std::isinf(x) && std::signbit(x) == bool(bits & 0x8000), "%04x is %g", bits, x);
  } else {
    CHECK(x == half::value(bits) && std::signbit(x) == bool(bits & 0x8000), "%04x is %g", bits, x);
  }
}

void check_narrowed(float x, uint32_t got) {
  if (std::isnan(x)) {
    CHECK(half::is_nan(got), "NaN became %04x", got);
  } else {
    const uint32_t want = half::nearest(x);
    CHECK(got == want, "%a became %04x, not %04x", x, got, want);
  }
}

__attribute__((noinline)) void widen_all(const f16* x, float* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = widen(x[i]);
}
__attribute__((noinline)) void narrow_all(const float* x, f16* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = narrow<f16>(x[i]);
}

void test_widening() {
  std::vector<f16> numbers(0x10000);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) numbers[bits].bits = static_cast<uint16_t>(bits);
  std::vector<float> floats(numbers.size());
  widen_all(numbers.data(), floats.data(), numbers.size());
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    check_widened(bits, widen(numbers[bits]));
    check_widened(bits, floats[bits]);
  }
}

// Every number, and half-way to the next: ties, and the floats beside them; then a sample of all floats.
std::vector<float> floats_to_narrow() {
  std::vector<float> floats;
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float x = static_cast<float>(half::value(bits));
    const float next = bits == 0x7bff ? 65536.0f : static_cast<float>(half::value(bits + 1));
    const float tie = x + (next - x) / 2;
    for (float y : {x, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e6f)})
      for (float sign : {1.0f, -1.0f}) floats.push_back(sign * y);
  }
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 4093) floats.push_back(float_of(uint32_t(bits)));
  return floats;
}

void test_narrowing() {
  const std::vector<float> floats = floats_to_narrow();
  std::vector<f16> numbers(floats.size());
  narrow_all(floats.data(), numbers.data(), floats.size());
  for (size_t i = 0; i < floats.size(); ++i) {
    check_narrowed(floats[i], narrow<f16>(floats[i]).bits);
    check_narrowed(floats[i], numbers[i].bits);
  }
}

}  // namespace

int main() {
  test_vectors();
  test_widening();
  test_narrowing();
  return report();
}
