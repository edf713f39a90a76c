// Whitened pairwise attention on CUDA as a chain of library products and our own kernels: what forward and backward
// share.
//
// The N x N map is made in chunks (chain/plan.h): a group of batch elements, or a run of rows of one. The forward cuts
// queries (a row's softmax needs all its keys), and so does the backward of float and double, which makes the softmax
// again; the backward of halves, which has the forward's row statistics, cuts keys, so that dk and dv of a chunk are
// complete and only dq is summed over chunks (chain/forward.cuh, chain/backward_rows.cuh, chain/backward.cuh). Any
// width, any number of keys; no atomics.
//
// Centring. Float and double queries and keys are centred in a copy, before any rounding to TF32, whatever `whiten`
// says: the keys' mean shifts the logits of a row alike and the softmax not at all, and without whitening the query
// mean comes back as a bias per key, <mu_q, k'_j>, and as a term of dk. So products stay small, and with them what it
// costs that the backward multiplies anew. Halves are multiplied as they are; whitening takes the query mean off by the
// same bias and the same term with the other sign. Where dS multiplies keys they are centred in every type (a rounded
// copy for halves), because rows of dS sum to zero only up to rounding. Float and double values are centred too: rows
// of P sum to one, so their mean is added at the end, and Delta and dO V^T lose the same multiple of it. A part
// (pairwise.h) is not centred.
//
// Whole lines. Libraries are at full speed where extents, and not only strides, are multiples of 16 bytes. So every
// extent of a product is rounded up to kPitch: an operand is zero beyond its positions and channels, in the copy that
// is made of it, and so are the buffers of the map where a product sums over them. What a result has there, nobody
// reads.
//
// `Device` is how the chain reaches the machine: allocate<T>(count), launch(kernel, tasks or shape, arguments...),
// product(a, b, c, batches, m, n, k, accumulate) and gpu(). The operators pass core/cuda/launch.h, the host test its
// own.
#pragma once

#include <algorithm>

#include "core/cuda/affine.cuh"
#include "core/cuda/operand.cuh"
#include "core/cuda/reduce.cuh"
#include "ops/pairwise/chain/plan.h"
#include "ops/pairwise/pairwise.h"
#include "ops/unary/unary_cuda.cuh"

namespace dnl {

constexpr double kLog2OfE = 1.4426950408889634;  // logits times it are exponents of 2

// ---------------------------------------------------------------------------------------------------------------------
// Operands
// ---------------------------------------------------------------------------------------------------------------------

// One batch stride, one dimension dense, rows aligned.
template <class T>
bool has_aligned_rows(const Matrix<const T>& x, int64_t positions, int64_t channels) {
  constexpr int64_t kAlign = 16 / sizeof(T);
  if (x.batch.dims > 1 || (x.batch.dims == 1 && x.batch.stride[0] % kAlign)) return false;
  if (reinterpret_cast<uintptr_t>(x.data) % 16) return false;
  if (x.channel == 1) return x.position >= channels && x.position % kAlign == 0;
  return x.position == 1 && x.channel >= positions && x.channel % kAlign == 0;
}

// Whether the library multiplies x where it lies, at full speed: its extents too are whole lines. A matrix without
// elements lies nowhere, and buffers have at least a line.
template <class T>
bool is_product_operand(const Matrix<const T>& x, int64_t positions, int64_t channels) {
  return positions > 0 && channels > 0 && positions % kPitch == 0 && channels % kPitch == 0 &&
         has_aligned_rows(x, positions, channels);
}

// A copy of x less `mean` (batches, channels; null: nothing), rounded to E, in rows of channels or channel-first; of
// pitch_of(positions) x pitch_of(channels), with zeros beyond x.
template <class E, class T, class Device>
Matrix<const E> copied_operand(Device& device, const Matrix<const T>& x, int64_t batches, int64_t positions,
                               int64_t channels, const AccOf<T>* mean, bool position_fast) {
  const int64_t all_positions = pitch_of(positions), all_channels = pitch_of(channels);
  E* data = device.template allocate<E>(batches * all_positions * all_channels);
  const Matrix<E> copy = position_fast ? dense(data, batches, all_channels, all_positions).transposed()
                                       : dense(data, batches, all_positions, all_channels);
  Affine<T, E> op{x, copy, batches, positions, channels};
  op.beta = -1;
  op.gamma = mean;
  op.zeros_to(all_positions, all_channels);
  affine(device, op);
  return copy.read();
}

// The same as an operand of products, all of which may be read: x itself where it can be, else a copy whose faster
// dimension stays the faster one.
template <class E, class T, class Device>
Matrix<const E> product_operand(Device& device, const Matrix<const T>& x, int64_t batches, int64_t positions,
                                int64_t channels, const AccOf<T>* mean) {
  if constexpr (std::is_same_v<E, T>)
    if (!mean && is_product_operand(x, positions, channels)) return x;
  return copied_operand<E>(device, x, batches, positions, channels, mean, position_is_fast(x, positions, channels));
}

// A float (or double) buffer for a product that is then written to `out`, ordered as `out` is, so that the write reads
// it in the same order.
template <class A, class T>
Matrix<A> like_order(const Matrix<T>& out, A* data, int64_t batches, int64_t positions, int64_t channels) {
  if (position_is_fast(out, positions, channels))
    return dense(data, batches, pitch_of(channels), pitch_of(positions)).transposed();
  return dense(data, batches, pitch_of(positions), pitch_of(channels));
}
inline int64_t like_order_size(int64_t batches, int64_t positions, int64_t channels) {
  return batches * pitch_of(positions) * pitch_of(channels);
}

// A map of T that has taken the place of a map of floats or doubles, each row in the first bytes of what it was made
// of.
template <class T, class A>
Matrix<const T> in_place_of(const Matrix<A>& x) {
  constexpr int64_t kRatio = sizeof(A) / sizeof(T);
  Matrix<const T> result{reinterpret_cast<const T*>(x.data), x.batch, x.position * kRatio, 1};
  for (int d = 0; d < x.batch.dims; ++d) result.batch.stride[d] *= kRatio;
  return result;
}

// Query, key and value as operands, with what centring needs. The logit of query i and key j, up to a constant of the
// row: |scale| (sign <query_i, key_j> + bias_j). Output: sum_j P_ij value_j + offset.
//
// E is what products multiply: T, or Tf32 for float, which the one copy that centres an operand also rounds, and puts
// in the order that fused/tile.cuh reads.
enum class Placement { products, as_they_lie };  // operands of library products; or never copied, for halves

template <class T, class Device, class E = T>
struct PairwiseOperands {
  using A = AccOf<T>;
  static constexpr bool kCentred = !kHalf<T>;
  const int mean_term;            // what the query mean is multiplied by where it enters apart: -1, 0 or 1
  const A* query_mean = nullptr;  // (batches, width), or null where nothing needs it
  const A* key_mean = nullptr;    // (batches, width), or null where nothing is centred
  const A* offset;                // (batches, channels): mean of values where they are centred, plus pooled; or null
  Matrix<const E> query, key, value;
  Rows<const A> bias;  // (batches, keys), or null
  A sign;              // of the scale

  PairwiseOperands(const PairwiseArgs& args, Device& device, Placement placement = Placement::products)
      : mean_term(args.part  ? 0
                  : kCentred ? !args.whiten
                             : -int(args.whiten)),
        offset(static_cast<const A*>(args.pooled)),
        sign(static_cast<A>(args.sign())) {
    const auto q = matrix_of<const T>("query", args.query, args.batches);
    const auto k = matrix_of<const T>("key", args.key, args.batches);
    const auto v = matrix_of<const T>("value", args.value, args.batches);
    const A* value_mean = nullptr;
    // Without whitening a query or key that is not finite spoils its own logits only, as it would uncentred.
    if (!args.part) {
      const bool both = kCentred || args.whiten;
      if (both && args.queries == args.keys &&
          position_is_fast(q, args.queries, args.width) == position_is_fast(k, args.keys, args.width)) {
        query_mean =
            means(device, MatrixPair<T>{q, k, args.batches}, 2 * args.batches, args.keys, args.width, !args.whiten);
        key_mean = query_mean + args.batches * args.width;
      } else {
        if (both) query_mean = means(device, q, args.batches, args.queries, args.width, !args.whiten);
        key_mean = means(device, k, args.batches, args.keys, args.width, !args.whiten);
      }
    }
    if (kCentred && args.channels && !args.part) {
      value_mean = means(device, v, args.batches, args.keys, args.channels, true);
      offset = sum_of(device, value_mean, offset, args.batches, args.channels);
    }
    const auto operand = [&](const Matrix<const T>& x, int64_t positions, int64_t channels, const A* mean,
                             [[maybe_unused]] bool channel_first) -> Matrix<const E> {
      if constexpr (kHalf<T>)
        if (placement == Placement::as_they_lie) return x;
      if constexpr (std::is_same_v<E, Tf32>)
        return copied_operand<E>(device, x, args.batches, positions, channels, mean, channel_first);
      return product_operand<E>(device, x, args.batches, positions, channels, kCentred ? mean : nullptr);
    };
    query = operand(q, args.queries, args.width, query_mean, false);
    key = operand(k, args.keys, args.width, key_mean, false);
    value = operand(v, args.keys, args.channels, value_mean, true);
    if (mean_term) {
      // k' rather than k: a constant of the row, but a key that is not finite then reaches every logit, as it should.
      Rows<A> out{device.template allocate<A>(args.batches * pitch_of(args.keys)), pitch_of(args.keys)};
      const RowDot<T> op{k, query_mean, key_mean, args.batches, args.keys, args.width, out, mean_term * sign};
      row_sums(device, op, position_is_fast(k, args.keys, args.width));
      bias = out.read();
    }
  }

 private:
  // x is a matrix or a pair of them.
  template <class X>
  static const A* means(Device& device, const X& x, int64_t batches, int64_t positions, int64_t channels,
                        bool only_finite) {
    A* mean = device.template allocate<A>(batches * channels);
    column_sums<T>(device, x, batches, positions, channels, {}, 1.0 / positions, mean,
                   only_finite ? ColumnSum::only_finite : ColumnSum::plain);
    return mean;
  }

  // x + y, where y may be null: (batches, channels)
  static const A* sum_of(Device& device, const A* x, const A* y, int64_t batches, int64_t channels) {
    if (!y) return x;
    A* sum = device.template allocate<A>(batches * channels);
    Affine<A, A> op{dense(x, batches, 1, channels), dense(sum, batches, 1, channels), batches, 1, channels};
    op.gamma = y;
    affine(device, op);
    return sum;
  }
};

}  // namespace dnl
