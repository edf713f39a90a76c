// The softmax of a row that is read in pieces, and its Jacobian, once for host and device.
//
//   most = max_j x_j,  sum = sum_j b^(x_j - most),  lse = most + log sum,  p_j = b^(x_j - most) / sum
//
// `kBase2` says which exponential: rows of natural logits (b = e), or rows whose scale already carries log2(e) (b = 2).
// Either way the maximum is taken off before anything is scaled, so that a large offset common to a row costs no digits.
// NaN and +inf end in sum = NaN, as in a softmax that is computed in one go. A row of -inf keeps sum = 0; dividing by it
// gives the NaN that the reference has.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define DNL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DNL_HOST_DEVICE inline
#endif

namespace dnl {

constexpr double kLog2OfE = 1.4426950408889634;
constexpr double kLnOf2 = 0.6931471805599453;

DNL_HOST_DEVICE float exp2_of(float x) { return ::exp2f(x); }
DNL_HOST_DEVICE double exp2_of(double x) { return ::exp2(x); }
DNL_HOST_DEVICE float log2_of(float x) { return ::log2f(x); }
DNL_HOST_DEVICE double log2_of(double x) { return ::log2(x); }

template <class A, bool kBase2>
struct OnlineSoftmax {
  A most = -std::numeric_limits<A>::infinity();
  A sum = 0;

  // b^x
  DNL_HOST_DEVICE static A power(A x) { return exp2_of(kBase2 ? x : x * A(kLog2OfE)); }

  // What is taken off before the exponential: the maximum, unless there is none yet (-inf less -inf is NaN).
  DNL_HOST_DEVICE A shift() const { return most == -std::numeric_limits<A>::infinity() ? A(0) : most; }

  template <int N>
  DNL_HOST_DEVICE void add(const A (&x)[N]) {
    const A before = most;
    for (int i = 0; i < N; ++i) most = x[i] > most ? x[i] : most;
    const A off = shift();
    A more = 0;
    for (int i = 0; i < N; ++i) more += power(x[i] - off);
    sum = sum * power(before - off) + more;
  }

  DNL_HOST_DEVICE void merge(const OnlineSoftmax& other) {
    const A before = most;
    most = other.most > most ? other.most : most;
    const A off = shift();
    sum = sum * power(before - off) + other.sum * power(other.most - off);
  }

  // Natural logarithm of sum_j b^x_j.
  DNL_HOST_DEVICE A lse() const {
    const A tail = log2_of(sum);
    return kBase2 ? (most + tail) * A(kLnOf2) : most + tail * A(kLnOf2);
  }
};

// One entry of dp -> p (dp - <p, dp>), with `mean` = <p, dp>.
template <class A>
DNL_HOST_DEVICE A softmax_jacobian(A p, A dp, A mean) {
  return p * (dp - mean);
}

}  // namespace dnl
