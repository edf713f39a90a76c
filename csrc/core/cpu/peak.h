// The peak of an instruction set, as a yardstick: multiply-adds whose operands never leave the registers.
//
// A block of core/cpu/product.h without its loads: as many sums, each a chain of its own, so that the units stay busy
// over the latency of one instruction. The sum is a factor of its own multiply-add (sum = a sum + b): were the product
// of two constants, a compiler could take it out of the loop and leave additions. Every chain begins elsewhere: of
// chains that are equal it would keep one.
#pragma once

#include "core/cpu/product.h"

namespace dnl {
namespace DNL_ISA {

// Runs `steps` rounds of multiply-adds of type E; returns how many single ones those were.
template <class E>
int64_t multiply_adds(int64_t steps) {
  using B = Block<E>;
  using A = Acc<E>;
  constexpr int kSums = B::kRows * B::kVectors;
  Vec<A> sum[kSums], factor, term;
  // Read at run time: nothing of the chain is known to the compiler. It converges to 2 and stays a normal number.
  volatile A half = A(0.5), one = A(1);
  factor = broadcast(A(half)), term = broadcast(A(one));
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = term * A(i + 1);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i)
#ifdef DNL_NEON
      sum[i] = multiply_add<0>(sum[i], factor, term);  // FMLA overwrites what it adds to
#else
      sum[i] = term + factor * sum[i];
#endif
  }
  for (int i = 1; i < kSums; ++i) sum[0] = sum[0] + sum[i];
  volatile A result = sum[0][0];
  (void)result;
  return steps * kSums * kWidth<A>;
}

#ifdef DNL_BF16_PRODUCTS
template <>
inline int64_t multiply_adds<bf16>(int64_t steps) {
  using B = Block<bf16>;
  constexpr int kSums = B::kRows * B::kVectors;
  volatile uint16_t bits = 0x3f80;
  volatile float one = 1;
  bf16 group[B::kGroup];
  for (bf16& element : group) element.bits = bits;
  const Step<bf16>::V ones = Step<bf16>::broadcast_a(group);
  Vec<float> sum[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = broadcast(one * float(i + 1));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = Step<bf16>::fma(sum[i], ones, ones);
  }
  for (int i = 1; i < kSums; ++i) sum[0] = sum[0] + sum[i];
  volatile float result = sum[0][0];
  (void)result;
  return steps * kSums * kWidth<float> * B::kGroup;
}
#endif

// By the type in which tensors of `dtype` are multiplied.
inline int64_t multiply_adds_of(DType dtype, int64_t steps) {
  if (dtype == DType::f64) return multiply_adds<double>(steps);
#ifdef DNL_BF16_PRODUCTS
  if (dtype == DType::bf16) return multiply_adds<bf16>(steps);
#endif
  return multiply_adds<float>(steps);
}

}  // namespace DNL_ISA
}  // namespace dnl
