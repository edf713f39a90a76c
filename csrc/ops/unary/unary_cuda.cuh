// Row softmax and unary pooling on CUDA.
//
// Softmax: a block owns a row and reads it twice at any stride, for the online state and to write; rows longer than the
// block's registers come back from L2. The backward is the same with an inner product in place of the state.
// Pooling: u = softmax(m) is one row per batch element, kept in full (Nk accumulators); then pooling is a weighted
// column sum of the values and its backward two elementwise passes. The backward computes u anew from m rather than
// from the saved lse, whose rounding would scale all of u when the logits share a large offset.
#pragma once

#include "core/cuda/affine.cuh"
#include "core/cuda/operand.cuh"
#include "core/cuda/reduce.cuh"
#include "ops/unary/unary.h"

namespace dnl {

// out = softmax(x) by rows, and lse where asked for.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(Matrix<const T> x,  // (rows, columns): batch is the row, position the column
                   Matrix<Out> out,    // (rows, columns), or data = nullptr
                   AccOf<T>* lse,      // (rows), or nullptr
                   int64_t columns, int64_t rows) {
  using A = AccOf<T>;
  __shared__ A most[kWarps];
  __shared__ double sum[kWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* in = x.element(row);
    OnlineSoftmax<A> state;
    for (int64_t j = threadIdx.x; j < columns; j += kThreads * kQuad) {
      A value[kQuad];
      for (int u = 0; u < kQuad; ++u) {
        const int64_t column = j + u * kThreads;
        value[u] = column < columns ? wide(in[column * x.position]) : -std::numeric_limits<A>::infinity();
      }
      state.add(value);
    }
    state = block_merge(state, most, sum);
    if (lse && threadIdx.x == 0) lse[row] = state.lse();
    if (out.data) {
      Out* to = out.element(row);
      const A shift = state.shift(), factor = static_cast<A>(1 / state.sum);
      for (int64_t j = threadIdx.x; j < columns; j += kThreads)
        to[j * out.position] = rounded<Out>(exp_of(wide(in[j * x.position]) - shift) * factor);
    }
    __syncthreads();  // before the next row overwrites `most` and `sum`
  }
}

// dx = p (dp - <p, dp>) by rows.
template <class T>
__global__ void __launch_bounds__(kThreads) softmax_backward_kernel(Matrix<const T> grad,         // (rows, columns): dp
                                                                    Matrix<const T> probability,  // (rows, columns): p
                                                                    Matrix<T> out,                // (rows, columns): dx
                                                                    int64_t columns, int64_t rows) {
  using A = AccOf<T>;
  __shared__ A scratch[kWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T *dp = grad.element(row), *p = probability.element(row);
    T* dx = out.element(row);
    A dot = 0;
    for (int64_t j = threadIdx.x; j < columns; j += kThreads)
      dot += wide(p[j * probability.position]) * wide(dp[j * grad.position]);
    dot = block_sum(dot, scratch);
    for (int64_t j = threadIdx.x; j < columns; j += kThreads)
      dx[j * out.position] =
          rounded<T>(softmax_jacobian(wide(p[j * probability.position]), wide(dp[j * grad.position]), dot));
    __syncthreads();  // before the next row overwrites `scratch`
  }
}

template <class T, class Device>
void softmax_cuda(const SoftmaxArgs& args, Device& device) {
  device.launch(&softmax_kernel<T, T>, args.rows, matrix_of<const T>("x", args.input, args.rows),
                matrix_of<T>("x", args.output, args.rows), static_cast<AccOf<T>*>(nullptr), args.columns, args.rows);
}

template <class T, class Device>
void softmax_backward_cuda(const SoftmaxArgs& args, Device& device) {
  device.launch(&softmax_backward_kernel<T>, args.rows, matrix_of<const T>("grad_output", args.input, args.rows),
                matrix_of<const T>("output", args.probability, args.rows),
                matrix_of<T>("output", args.output, args.rows), args.columns, args.rows);
}

// u = softmax(m): (batches, keys) in a new buffer. `lse` (batches) may be null.
template <class T, class Device>
Rows<AccOf<T>> unary_map(Device& device, const View& mask, int64_t batches, int64_t keys, AccOf<T>* lse) {
  using A = AccOf<T>;
  Rows<A> u{device.template allocate<A>(batches * keys), keys};
  const Matrix<A> out{u.data, single_batch(batches, keys), 1, 1};
  device.launch(&softmax_kernel<T, A>, batches, matrix_of<const T>("mask_logits", mask, batches), out, lse, keys,
                batches);
  return u;
}

// An Op of row_sums: x_j = <g, v_j - pooled>, kept in double.
template <class T>
struct ValueDots : RowDot<T> {
  Rows<double> dots;  // (batches, keys)

  DNL_HOST_DEVICE void store(int64_t b, int64_t j, double sum) const { dots.element(b)[j] = sum; }
};

// dm_j = u_j (x_j - sum_l u_l x_l). With the exact pooled vector the sum would be 0; it was rounded, which shows where
// values share a large offset. A block takes a batch element.
template <class T>
__global__ void __launch_bounds__(kThreads) mask_gradient_kernel(const double* dots,        // (batches, keys): x
                                                                 Rows<const AccOf<T>> map,  // (batches, keys): u
                                                                 Matrix<T> grad_mask,       // (batches, keys)
                                                                 int64_t keys, int64_t tasks) {
  __shared__ double weighted_sums[kWarps], sums[kWarps];
  for (int64_t b = blockIdx.x; b < tasks; b += gridDim.x) {
    const double* x = dots + b * keys;
    const AccOf<T>* u = map.element(b);
    T* out = grad_mask.element(b);
    double weighted = 0, total = 0;
    for (int64_t j = threadIdx.x; j < keys; j += kThreads) {
      weighted += double(u[j]) * x[j];
      total += double(u[j]);
    }
    const double mean = block_sum(weighted, weighted_sums) / block_sum(total, sums);
    for (int64_t j = threadIdx.x; j < keys; j += kThreads)
      out[j * grad_mask.position] = rounded<T>(static_cast<AccOf<T>>(double(u[j]) * (x[j] - mean)));
    __syncthreads();  // before the next element overwrites the sums
  }
}

template <class T, class Device>
void unary_mask_gradient(Device& device, const Matrix<const T>& value, const Rows<const AccOf<T>>& u,
                         const AccOf<T>* grad_pooled, const AccOf<T>* pooled, const View& grad_mask, int64_t batches,
                         int64_t keys, int64_t channels) {
  ValueDots<T> op{};
  op.x = value;
  op.row = grad_pooled;
  op.offset = pooled;
  op.batches = batches;
  op.positions = keys;
  op.channels = channels;
  op.dots = {device.template allocate<double>(batches * keys), keys};
  row_sums(device, op, position_is_fast(value, keys, channels));
  device.launch(&mask_gradient_kernel<T>, batches, op.dots.data, u, matrix_of<T>("mask_logits", grad_mask, batches),
                keys, batches);
}

template <class T, class Device>
void unary_forward_cuda(const UnaryArgs& args, Device& device) {
  using A = AccOf<T>;
  const auto u = unary_map<T>(device, args.mask, args.batches, args.keys, static_cast<A*>(args.lse));
  column_sums<T>(device, matrix_of<const T>("value", args.value, args.batches), args.batches, args.keys, args.channels,
                 u.read(), 1.0, static_cast<A*>(args.pooled));
}

template <class T, class Device>
void unary_backward_cuda(const UnaryArgs& args, Device& device) {
  using A = AccOf<T>;
  const A* grad_pooled = static_cast<const A*>(args.grad_pooled);
  const auto u = unary_map<T>(device, args.mask, args.batches, args.keys, static_cast<A*>(nullptr));
  if (args.grad_mask.data)
    unary_mask_gradient<T>(device, matrix_of<const T>("value", args.value, args.batches), u.read(), grad_pooled,
                           static_cast<const A*>(args.pooled), args.grad_mask, args.batches, args.keys, args.channels);
  if (args.grad_value.data) {
    Affine<T, T> op{{}, matrix_of<T>("value", args.grad_value, args.batches), args.batches, args.keys, args.channels};
    op.beta_row = u.read();
    op.gamma = grad_pooled;
    affine(device, op);
  }
}

}  // namespace dnl
