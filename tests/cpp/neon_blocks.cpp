// The blocks of a product that NEON multiplies most in, for tests/arm_budget.py, which counts their instructions.
#define DNL_NEON
#define DNL_BF16_PRODUCTS
#define DNL_ISA counted
#define DNL_VECTOR_BYTES 16
#define DNL_TARGET "arch=armv8.2-a+bf16"
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/product.h"

namespace dnl {
namespace DNL_ISA {

template <class E, Into into>
constexpr auto whole_block = &block<E, Block<E>::kRows, into>;

template <class E>
void take(void (*volatile* to)()) {
  to[0] = reinterpret_cast<void (*)()>(whole_block<E, Into::store>);
  to[1] = reinterpret_cast<void (*)()>(whole_block<E, Into::add>);
  to[2] = reinterpret_cast<void (*)()>(whole_block<E, Into::rescale>);
}
template void take<float>(void (*volatile*)());
template void take<double>(void (*volatile*)());
template void take<bf16>(void (*volatile*)());

}  // namespace DNL_ISA
}  // namespace dnl

#include "core/cpu/target_end.h"
// clang-format on
