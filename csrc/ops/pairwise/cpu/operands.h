// Whitened pairwise attention on the CPU: what forward and backward share.
//
// Both use one tiled algorithm (cpu/forward.h, cpu/backward.h), except of few queries (cpu/few_queries.h,
// cpu/direct.h): a thread owns a tile, which lies along the lanes of the vectors, and streams blocks of the other side
// past it, so that a block of logits never leaves the cache of that core, and no buffer grows with Nq * Nk. In the
// forward a thread owns queries, in the backward keys.
//
// Centring. In float and double, operands are centred while they are packed. bfloat16 operands are multiplied as they
// are, exactly, in float accumulators; the query mean enters as a bias per key, -<mu_q, k_j>, because rounding centred
// values again would lose what the inputs still had. 16-bit operands that are widened are centred if the caller
// whitens. Values are centred like keys: rows of P sum to one, so their mean
// can be added at the end, and Delta and dO V^T lose the same multiple of it. A part (pairwise.h) is not centred.
#pragma once

#include <atomic>
#include <vector>

#include "core/cpu/pack.h"
#include "core/cpu/reduce.h"
#include "ops/pairwise/pairwise.h"
#include "ops/unary/unary_cpu.h"

namespace dnl {
namespace DNL_ISA {

// Matrix `x` of one batch element read as (positions, channels) or as (channels, positions), centred by `mean` per
// channel where that is not null.
template <class Src>
inline Source<Src> by_position(const View& x, int64_t batch, int64_t first, const Acc<Src>* mean) {
  return {element<Src>(x, batch) + first * x.position, x.position, x.channel, nullptr, mean};
}
template <class Src>
inline Source<Src> by_channel(const View& x, int64_t batch, int64_t first, const Acc<Src>* mean) {
  return {element<Src>(x, batch) + first * x.position, x.channel, x.position, mean, nullptr};
}

// Whether products run on the raw operands, with the query mean as a bias.
template <class E>
constexpr bool kRawProducts = Block<E>::kGroup > 1;

// The most panels of a tile. What is streamed past a tile comes from L3 or memory once for each, so narrow panels are
// taken more together.
template <class E>
constexpr int64_t most_panels() {
  return Block<E>::kVectors == 2 ? 8 : 4;
}

// Whether logits are products of centred operands. Those of 16-bit numbers are exact in float, and of centred ones no
// longer: without whitening, a row whose products cancel would be decided by the rounding of the centred keys.
template <class Src, class E>
bool centred_logits(const PairwiseArgs& args) {
  return !kRawProducts<E> && (args.whiten || std::is_same_v<Src, E>);
}

// Keys of whole rows are centred with or without whitening: that adds a constant to each row of logits and nothing to
// dQ. Per-channel means of query and key (batches, width) and value (batches, channels), or null where not centred.
template <class Src, class E>
struct Means {
  Acc<Src>* query = nullptr;
  Acc<Src>* key = nullptr;
  Acc<Src>* value = nullptr;

  Means(const PairwiseArgs& args, Arena& arena) {
    if (args.part) return;
    if (!kRawProducts<E>) value = arena.take<Acc<Src>>(args.batches * args.channels);
    key = arena.take<Acc<Src>>(args.batches * args.width);
    if (!args.whiten) return;
    query = arena.take<Acc<Src>>(args.batches * args.width);
  }
  // Where the caller has not asked for centring, an element that is not finite may reach its own products only.
  static void only_finite(Acc<Src>* mean, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      if (!(mean[i] - mean[i] == 0)) mean[i] = 0;
  }

  void compute(const PairwiseArgs& args, const Executor& executor) const {
    if (value) {
      all_column_sums<Src>(args.value, args.batches, args.keys, args.channels, nullptr, 0, args.keys, value, executor);
      only_finite(value, args.batches * args.channels);
    }
    if (!key) return;
    all_column_sums<Src>(args.key, args.batches, args.keys, args.width, nullptr, 0, args.keys, key, executor);
    if (!query) only_finite(key, args.batches * args.width);
    if (query)
      all_column_sums<Src>(args.query, args.batches, args.queries, args.width, nullptr, 0, args.queries, query,
                           executor);
  }
};

// -<mu_q, k_j - mu_k> * factor for keys [begin, end). mu_k adds a constant; a key that is not finite reaches every
// logit through it, as it would by centring.
template <class Src>
inline void key_bias(const PairwiseArgs& args, int64_t batch, int64_t begin, int64_t end, const Acc<Src>* query_mean,
                     const Acc<Src>* key_mean, double factor, Acc<Src>* bias) {
  const Src* k = element<Src>(args.key, batch);
  const Acc<Src>*mean = query_mean + batch * args.width, *centre = key_mean + batch * args.width;
  for (int64_t j0 = begin; j0 < end; j0 += kReduceBlock) {
    const int64_t j1 = std::min(end, j0 + kReduceBlock);
    double sums[kReduceBlock];
    row_sums(k, args.key, j0, j1, args.width, sums,
             [&](double x, int64_t c) { return double(mean[c]) * (x - double(centre[c])); });
    for (int64_t j = j0; j < j1; ++j) bias[j - begin] = static_cast<Acc<Src>>(-factor * sums[j - j0]);
  }
}

// G = sum_i dy_i (batches, channels), u (batches, keys), and dm, which need no map.
template <class Src>
void unary_gradients(const PairwiseArgs& args, Acc<Src>* grad_pooled, Acc<Src>* unary, const Executor& executor) {
  if (!args.mask.data) return;
  all_column_sums<Src>(args.grad_output, args.batches, args.queries, args.channels, nullptr, 0, 1.0, grad_pooled,
                       executor);
  unary_map<Src>(args.mask, static_cast<const Acc<Src>*>(args.mask_lse), args.batches, args.keys, unary, executor);
  if (!args.grad_mask.data) return;
  UnaryArgs pool{};
  pool.value = args.value;
  pool.grad_pooled = grad_pooled;
  pool.grad_mask = args.grad_mask;
  pool.batches = args.batches;
  pool.keys = args.keys;
  pool.channels = args.channels;
  unary_mask_gradient<Src>(pool, unary, executor);
}

// Runs f(task, worker) for every task, on at most `workers` workers that take tasks as they come free.
template <class F>
inline void share_out(const Executor& executor, int64_t workers, int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  executor.parallel(std::min(workers, tasks), [&](int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task, worker);
  });
}

// Calls f(Src{}, E{}): the element type in memory and the one that is multiplied.
template <class F>
void dispatch_products(DType dtype, const F& f) {
#ifdef DNL_AMX  // other types go by vectors: isa_avx512_amx.cpp
  (void)dtype;
  f(bf16{}, bf16{});
#else
  switch (dtype) {
    case DType::f64:
      return f(double{}, double{});
    case DType::f32:
      return f(float{}, float{});
    case DType::f16:
      return f(f16{}, float{});
#ifdef DNL_BF16_PRODUCTS
    case DType::bf16:
      return f(bf16{}, bf16{});
#else
    case DType::bf16:
      return f(bf16{}, float{});
#endif
  }
#endif
}

}  // namespace DNL_ISA
}  // namespace dnl
