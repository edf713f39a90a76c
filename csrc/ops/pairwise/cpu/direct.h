// Pairwise attention on the CPU of one to four queries, forward and backward, without packing.
//
// A product of so few rows waits for memory: keys and values are read as they lie, once, in blocks of kBlock keys, by
// the products of core/cpu/few_rows.h:
//
//   forward    t = sign Q K^T,  P = 2^(c (t - m)) with a running maximum m per query,  y += P V
//   backward   t again and dP = dO V^T,  P = 2^(c (t - shift)) factor,  dS = P (dP - Delta)
//              dV = P^T dO (+ u G),  dK = dS^T Q,  dQ += dS K, whose block of K is in cache by then
//
// Every type is widened to its accumulators, P with it. A pass over the keys for their mean would be another reading,
// so without whitening they, and values always, are centred by the mean of a sample: any vector near the mean keeps
// sums from cancelling, and it drops out of the result. Statistics refer to it, so forward and backward must both come
// here, whatever the layout of their arguments: takes() asks for sizes alone.
#pragma once

#include "core/cpu/few_rows.h"
#include "ops/pairwise/cpu/delta.h"
#include "ops/pairwise/cpu/operands.h"

namespace dnl {
namespace DNL_ISA {

template <class Src>
struct DirectPairwise {
  using A = Acc<Src>;
  static constexpr int W = kWidth<A>;
  static constexpr int64_t kBlock = 512, kMostQueries = 4, kSample = 32;
  static_assert(kBlock % W == 0, "a block of keys is whole vectors");

  const PairwiseArgs& args;
  const Executor& executor;
  const A c;  // differences of t times c are exponents of 2
  int64_t workers, width_pitch, channel_pitch;
  A *grad_pooled, *unary;
  size_t bytes;

  // A worker's own buffers.
  struct Slot {
    A* query;                               // sign q'
    A *logit_mean, *key_mean, *value_mean;  // zero where not centred
    A *logits, *grad;                       // t, then P, and then u; dP, then dS
    A* output_grad;                         // dO, and then G
    A* result;                              // y or dQ
    double* delta_offset;
  };
  std::vector<Slot> slots;

  static bool takes(const PairwiseArgs& args) {
    return args.queries > 0 && args.queries <= kMostQueries && args.queries < args.keys;
  }

  // `backward`: by the caller, since pointers say nothing: those of tensors without elements are null.
  DirectPairwise(const PairwiseArgs& a, bool backward, void* workspace, const Executor& e)
      : args(a), executor(e), c(a.magnitude<A>(kLog2e<double>)) {
    Arena arena(workspace);
    workers = std::min<int64_t>(executor.threads, args.batches);
    width_pitch = round_up(args.width, W);
    channel_pitch = round_up(args.channels, W);
    grad_pooled = args.mask.data ? arena.take<A>(args.batches * args.channels) : nullptr;
    unary = args.mask.data ? arena.take<A>(args.batches * args.keys) : nullptr;
    slots.resize(workers);
    for (Slot& slot : slots) {
      slot.query = arena.take<A>(args.queries * width_pitch);
      slot.logit_mean = arena.take<A>(width_pitch);
      slot.key_mean = arena.take<A>(width_pitch);
      slot.value_mean = arena.take<A>(channel_pitch);
      slot.logits = arena.take<A>((args.queries + 1) * kBlock);
      slot.result = arena.take<A>(args.queries * std::max(width_pitch, channel_pitch));
      slot.grad = backward ? arena.take<A>(args.queries * kBlock) : nullptr;
      slot.output_grad = backward ? arena.take<A>((args.queries + 1) * channel_pitch) : nullptr;
      slot.delta_offset = backward ? arena.take<double>(args.channels) : nullptr;
    }
    bytes = arena.used();
  }

  void forward() {
    for_batches([&](auto queries, int64_t batch, const Slot& slot) { forward<queries>(batch, slot); });
  }

  void backward() {
    unary_gradients<Src>(args, grad_pooled, unary, executor);
    for_batches([&](auto queries, int64_t batch, const Slot& slot) { backward<queries>(batch, slot); });
  }

 private:
  // Calls f(queries, batch, slot), `queries` being a number that the compiler knows.
  template <int kQueries = kMostQueries, class F>
  void for_batches(const F& f) const {
    if constexpr (kQueries > 1)
      if (args.queries < kQueries) return for_batches<kQueries - 1>(f);
    share_out(executor, workers, args.batches,
              [&](int64_t batch, int64_t worker) { f(std::integral_constant<int, kQueries>{}, batch, slots[worker]); });
  }

  // Keys or values from `first` on: their positions are lines, or channels where positions lie together.
  static bool by_channel(const View& x) { return x.position == 1; }
  template <class T>
  static Lines<T> lines_of(const View& x, int64_t batch, int64_t first, int64_t count, int64_t channels) {
    T* data = static_cast<T*>(x.data) + x.batch[batch] + first * x.position;
    if (by_channel(x)) return {data, x.channel, 1, channels, count};
    return {data, x.position, x.channel, count, channels};
  }

  // out[r][j] = sum_ch rows[r][ch] (x[j][ch] - mean[ch]) for keys j of a block.
  template <int R>
  static void over_channels(const View& x, const Lines<const Src>& lines, const A* mean, const A* rows, int64_t pitch,
                            A* out) {
    std::fill(out, out + R * kBlock, A(0));
    if (by_channel(x))
      line_sums<R, MeanOf::line>(lines, mean, rows, pitch, out, kBlock);
    else
      line_dots<R, MeanOf::element>(lines, mean, rows, pitch, out, kBlock);
  }
  // out[r][ch] += sum_j weight[r][j] (x[j][ch] - mean[ch])
  template <int R>
  static void over_keys(const View& x, const Lines<const Src>& lines, const A* mean, const A* weight, A* out,
                        int64_t pitch) {
    if (by_channel(x))
      line_dots<R, MeanOf::line>(lines, mean, weight, kBlock, out, pitch);
    else
      line_sums<R, MeanOf::element>(lines, mean, weight, kBlock, out, pitch);
  }
  // x[j][ch] = scale sum_r weight[r][j] rows[r][ch]
  template <int R>
  static void update(const View& x, const Lines<Src>& lines, A scale, const A* weight, const A* rows, int64_t pitch) {
    if (by_channel(x))
      rank_few<R>(lines, scale, rows, pitch, weight, kBlock);
    else
      rank_few<R>(lines, scale, weight, kBlock, rows, pitch);
  }

  void exact_mean(View x, int64_t batch, int64_t positions, int64_t channels, A* out) const {
    x.batch += batch;
    all_column_sums<Src>(x, 1, positions, channels, nullptr, 0, positions, out, Executor{});
  }
  // Of kSample keys at most, eight together: those of a channel-first map share a line of the cache. `out` is zero.
  void sample_mean(const View& x, int64_t batch, int64_t channels, const Slot& slot, A* out) const {
    if (args.part) return;
    const int64_t count = std::min(kSample, args.keys), together = count < kSample ? count : 8;
    const int64_t gap = (args.keys - together) / std::max<int64_t>(1, count / together - 1);
    std::fill(slot.result, slot.result + channels, A(0));
    std::fill(slot.logits, slot.logits + kSample, A(1) / count);
    for (int64_t i = 0; i < count / together; ++i)
      over_keys<1>(x, lines_of<const Src>(x, batch, i * gap, together, channels), slot.result, slot.logits, out, 0);
    Means<Src, A>::only_finite(out, channels);
  }

  void prepare(int64_t batch, const Slot& slot) const {
    std::fill(slot.logit_mean, slot.logit_mean + width_pitch, A(0));
    std::fill(slot.key_mean, slot.key_mean + width_pitch, A(0));
    std::fill(slot.value_mean, slot.value_mean + channel_pitch, A(0));
    sample_mean(args.value, batch, args.channels, slot, slot.value_mean);
    if (args.whiten) {
      exact_mean(args.query, batch, args.queries, args.width, slot.logit_mean);
      exact_mean(args.key, batch, args.keys, args.width, slot.key_mean);
    } else {
      sample_mean(args.key, batch, args.width, slot, slot.key_mean);
    }
    pack_rows(by_position<Src>(args.query, batch, 0, slot.logit_mean), args.queries, args.width, width_pitch,
              slot.query);
    for (int64_t i = 0; i < args.queries * width_pitch; ++i) slot.query[i] *= static_cast<A>(args.sign());
    if (centred_logits<Src, A>(args)) std::copy_n(slot.key_mean, width_pitch, slot.logit_mean);
  }

  template <int R>
  void forward(int64_t batch, const Slot& slot) const {
    prepare(batch, slot);
    A most[R];
    double sum[R] = {};
    std::fill(most, most + R, -std::numeric_limits<A>::infinity());
    std::fill(slot.result, slot.result + R * channel_pitch, A(0));
    for (int64_t first = 0; first < args.keys; first += kBlock) {
      const int64_t count = std::min(kBlock, args.keys - first);
      const auto keys = lines_of<const Src>(args.key, batch, first, count, args.width);
      const auto values = lines_of<const Src>(args.value, batch, first, count, args.channels);
      over_channels<R>(args.key, keys, slot.logit_mean, slot.query, width_pitch, slot.logits);
      for (int r = 0; r < R; ++r) {
        const A alpha = softmax_step(slot.logits + r * kBlock, count, most[r], sum[r]);
        if (first > 0 && !(alpha == 1))
          for (int64_t ch = 0; ch < channel_pitch; ++ch) slot.result[r * channel_pitch + ch] *= alpha;
      }
      over_keys<R>(args.value, values, slot.value_mean, slot.logits, slot.result, channel_pitch);
    }
    A* stats = static_cast<A*>(args.stats) + batch * R * 2;
    for (int r = 0; r < R; ++r) {
      stats[2 * r] = most[r];
      stats[2 * r + 1] = static_cast<A>(1 / sum[r]);
    }
    write_output(batch, stats, slot);
  }

  // The logits of one query become probabilities relative to the maximum so far; returns what was summed before is to
  // be multiplied by. A query whose logits are all -inf keeps most = -inf and sum = 0.
  A softmax_step(A* t, int64_t count, A& most, double& sum) const {
    const A infinity = std::numeric_limits<A>::infinity(), before = most;
    const int64_t whole = round_up(count, W);
    std::fill(t + count, t + whole, -infinity);
    Vec<A> largest = broadcast(before);
    for (int64_t j = 0; j < whole; j += W) largest = vmax(largest, load(t + j));
    most = largest_lane<A>(largest);
    const A shift = most == -infinity ? A(0) : most, alpha = exp2(broadcast((before - shift) * c))[0];
    sum *= double(alpha);
    constexpr int64_t kRun = 8 * W;  // short runs first, or small probabilities would be rounded away
    for (int64_t begin = 0; begin < whole; begin += kRun) {
      Vec<A> run{};
      for (int64_t j = begin; j < std::min(whole, begin + kRun); j += W) {
        const Vec<A> p = exp2((load(t + j) - shift) * c);
        run += p;
        store(t + j, p);
      }
      double lanes[W];
      for (int l = 0; l < W; ++l) lanes[l] = double(run[l]);
      sum += sum_of_lanes<W>(lanes);
    }
    return alpha;
  }

  void write_output(int64_t batch, const A* stats, const Slot& slot) const {
    const A* pooled = args.pooled ? static_cast<const A*>(args.pooled) + batch * args.channels : nullptr;
    for (int64_t first = 0; first < args.channels; first += kMostLanes) {
      const auto values = [=, from = slot.result + first, centre = slot.value_mean + first, pitch = channel_pitch,
                           beside = pooled ? pooled + first : nullptr](int64_t r) {
        return [=, row = from + r * pitch, factor = stats[2 * r + 1]](int64_t ch) {
          return row[ch] * factor + (centre[ch] + (beside ? beside[ch] : A(0)));
        };
      };
      const auto write_to = [&](const View& x, const auto& round) {
        Src* out = static_cast<Src*>(x.data) + x.batch[batch] + first * x.channel;
        write_lanes(out, x.position, x.channel, args.queries, std::min(kMostLanes, args.channels - first),
                    [=](int64_t r) { return [=, value = values(r)](int64_t ch) { return round(value(ch)); }; });
      };
      write_to(args.output, [](A y) { return narrow<Src>(y); });
      if (args.residual.data) write_to(args.residual, [](A y) { return narrow<Src>(y - widen(narrow<Src>(y))); });
    }
  }

  template <int R>
  void backward(int64_t batch, const Slot& slot) const {
    prepare(batch, slot);
    const bool need_logits = args.grad_query.data || args.grad_key.data;
    const A scale = static_cast<A>(args.gradient_scale());
    A delta[R] = {};
    if (need_logits && args.delta) {
      std::copy_n(static_cast<const A*>(args.delta) + batch * R, R, delta);
    } else if (need_logits) {
      delta_offset<Src>(args, batch, slot.value_mean, slot.delta_offset);
      compute_delta<Src>(args, slot.delta_offset, batch, 0, R, delta);
    }
    std::fill(slot.result, slot.result + R * width_pitch, A(0));
    pack_rows(by_position<Src>(args.grad_output, batch, 0, nullptr), R, args.channels, channel_pitch, slot.output_grad);
    if (unary) std::copy_n(grad_pooled + batch * args.channels, args.channels, slot.output_grad + R * channel_pitch);

    for (int64_t first = 0; first < args.keys; first += kBlock) {
      const int64_t count = std::min(kBlock, args.keys - first);
      const auto keys = lines_of<const Src>(args.key, batch, first, count, args.width);
      over_channels<R>(args.key, keys, slot.logit_mean, slot.query, width_pitch, slot.logits);
      if (need_logits)
        over_channels<R>(args.value, lines_of<const Src>(args.value, batch, first, count, args.channels),
                         slot.value_mean, slot.output_grad, channel_pitch, slot.grad);
      for (int r = 0; r < R; ++r) gradient_step(batch, r, count, delta[r], need_logits, slot);
      if (args.grad_value.data) {
        const auto lines = lines_of<Src>(args.grad_value, batch, first, count, args.channels);
        if (unary) {
          std::copy_n(unary + batch * args.keys + first, count, slot.logits + R * kBlock);
          update<R + 1>(args.grad_value, lines, A(1), slot.logits, slot.output_grad, channel_pitch);
        } else {
          update<R>(args.grad_value, lines, A(1), slot.logits, slot.output_grad, channel_pitch);
        }
      }
      if (args.grad_key.data)
        update<R>(args.grad_key, lines_of<Src>(args.grad_key, batch, first, count, args.width), std::abs(scale),
                  slot.grad, slot.query, width_pitch);
      if (args.grad_query.data) over_keys<R>(args.key, keys, slot.key_mean, slot.grad, slot.result, width_pitch);
    }
    if (args.grad_query.data) write_query(batch, scale, slot);
  }

  // P and dS of one query, zero in lanes without a key. dS as softmax_jacobian() in online_softmax.h.
  void gradient_step(int64_t batch, int64_t r, int64_t count, A delta, bool need_logits, const Slot& slot) const {
    const A* stats = static_cast<const A*>(args.stats) + (batch * args.queries + r) * 2;
    const A shift = stats[0], factor = stats[1];
    A *t = slot.logits + r * kBlock, *d = slot.grad + r * kBlock;
    const Vec<A> one = broadcast(A(1));
    const int64_t whole = round_up(count, W);
    for (int64_t j = 0; j < whole; j += W) {
      const Vec<A> p = exp2((load(t + j) - shift) * c) * factor;
      store(t + j, p);
      if (need_logits) store(d + j, (p == one ? Vec<A>{} : p) * (load(d + j) - delta));
    }
    if (need_logits) std::fill(d + count, d + whole, A(0));
  }

  // dq = scale (sum - its mean over queries)
  void write_query(int64_t batch, A scale, const Slot& slot) const {
    const View& x = args.grad_query;
    Src* out = static_cast<Src*>(x.data) + x.batch[batch];
    for (int64_t ch = 0; ch < args.width; ++ch) {
      double sum = 0;
      for (int64_t r = 0; r < args.queries; ++r) sum += double(slot.result[r * width_pitch + ch]);
      const A mean = args.whiten ? static_cast<A>(sum / args.queries) : A(0);
      for (int64_t r = 0; r < args.queries; ++r)
        out[r * x.position + ch * x.channel] = narrow<Src>(scale * (slot.result[r * width_pitch + ch] - mean));
    }
  }
};

}  // namespace DNL_ISA
}  // namespace dnl
