// The softmax of a row that is read in pieces, and its Jacobian, once for host and device.
//
//   most = max_j x_j,  sum = sum_j exp(x_j - most),  lse = most + log sum,  p_j = exp(x_j - most) / sum
//
// The base is e, and the maximum is subtracted first, so that a large offset common to a row costs no digits, and the
// lse is rounded once. Scaling logits to base 2 would save an instruction and round everything once more. NaN and
// +inf end in sum = NaN, as in a softmax that is computed in one go. A row of -inf keeps sum = 0; dividing by it gives
// the NaN that the reference has.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define DNL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DNL_HOST_DEVICE inline
#endif

namespace dnl {

DNL_HOST_DEVICE float exp_of(float x) { return ::expf(x); }
DNL_HOST_DEVICE double exp_of(double x) { return ::exp(x); }
DNL_HOST_DEVICE float exp2_of(float x) { return ::exp2f(x); }

template <class A>
struct OnlineSoftmax {
  A most = -std::numeric_limits<A>::infinity();
  double sum = 0;  // what it is off by, all entries of the row share

  // What is taken off before the exponential: the maximum, unless there is none yet (-inf less -inf is NaN).
  DNL_HOST_DEVICE A shift() const { return most == -std::numeric_limits<A>::infinity() ? A(0) : most; }

  template <int N>
  DNL_HOST_DEVICE void add(const A (&x)[N]) {
    const A before = most;
    for (int i = 0; i < N; ++i) most = x[i] > most ? x[i] : most;
    const A off = shift();
    A more = 0;
    for (int i = 0; i < N; ++i) more += exp_of(x[i] - off);
    sum = sum * exp_of(before - off) + more;
  }

  DNL_HOST_DEVICE void merge(const OnlineSoftmax& other) {
    const A before = most;
    most = other.most > most ? other.most : most;
    const A off = shift();
    sum = sum * exp_of(before - off) + other.sum * exp_of(other.most - off);
  }

  DNL_HOST_DEVICE A lse() const { return static_cast<A>(double(most) + ::log(sum)); }
};

// What makes the P of a row again from its logits, p_j = exp(x_j - shift) factor: the maximum and one over the sum. One
// number, the lse, would not do: next to the shift the logits of a flat row leave small exponents, next to the lse
// exponents of the size of log(keys), whose rounding all entries share.
template <class A>
DNL_HOST_DEVICE void store_stats(A most, A sum, A* stats) {
  stats[0] = most;
  stats[1] = A(1) / sum;
}

// x where it is not above 0, else 0; NaN stays. For exponents that are 0 at most but for rounding.
template <class A>
DNL_HOST_DEVICE A not_positive(A x) {
  return x > 0 ? A(0) : x;
}

// One entry of dp -> p (dp - <p, dp>), with `mean` = <p, dp>. Where p rounds to 1 the difference is below a roundoff of
// dp, and what is computed of it is rounding, which a steep scale would make a gradient of: it counts as 0. NaN stays.
template <class A>
DNL_HOST_DEVICE A softmax_jacobian(A p, A dp, A mean) {
  return (p == 1 ? A(0) : p) * (dp - mean);
}

}  // namespace dnl
