// Forward pass of whitened pairwise attention on the CPU where queries are few: half a panel at most, and fewer than
// keys. Up to four of them do not come here (cpu/direct.h).
//
// With queries on the lanes, as in cpu/forward.h, most lanes would be empty. Here keys, and then channels, are on the
// lanes and a query is a row: t = sign Q K (queries x keys), P = 2^(c (t - m)) with a running maximum m per query, and
// P V (queries x channels) is added to the output. A worker takes a batch element, with the means of its keys and
// values, so that these are in its cache when they are packed.
#pragma once

#include "ops/pairwise/cpu/operands.h"

namespace dnl {
namespace DNL_ISA {

template <class Src, class E>
struct FewQueries {
  using A = Acc<E>;
  using B = Block<E>;
  static constexpr int L = B::kLanes, G = B::kGroup, W = kWidth<A>;
  static constexpr int64_t kKeyBlock = 384;
  static_assert(kKeyBlock % L == 0 && kKeyBlock % G == 0, "a block of keys is whole panels and whole groups");

  const PairwiseArgs& args;
  const Executor& executor;
  const A sign, c;  // t = sign S + bias; differences of t times c are exponents of 2
  int64_t workers, channel_panels, key_pitch;
  size_t bytes;

  // A worker's own buffers.
  struct Slot {
    A *query_mean, *key_mean, *value_mean;  // null where not centred
    E *query_rows, *key_panels, *value_panels, *probability;
    A *logits, *output, *bias, *most;
    double *sum, *divisor;  // of the probabilities, and of the probabilities as rounded for the product
  };
  std::vector<Slot> slots;

  // Of bfloat16 the other way around costs less: two depths of a product lie in a lane.
  static constexpr int64_t kMost = kRawProducts<E> ? L / 4 : L / 2;
  static bool takes(const PairwiseArgs& args) { return args.queries <= kMost && args.queries < args.keys; }

  FewQueries(const PairwiseArgs& a, void* workspace, const Executor& e)
      : args(a), executor(e), sign(static_cast<A>(a.sign())), c(a.magnitude<A>(kLog2e<double>)) {
    Arena arena(workspace);
    workers = std::min<int64_t>(executor.threads, args.batches);
    channel_panels = ceil_div(args.channels, L);
    key_pitch = round_up(args.width, G);
    slots.resize(workers);
    for (Slot& slot : slots) {
      const auto mean = [&](bool wanted, int64_t count) { return wanted ? arena.take<A>(count) : nullptr; };
      slot.query_mean = mean(!args.part && args.whiten, args.width);
      slot.key_mean = mean(!args.part && (centred_logits<Src, E>(args) || args.whiten), args.width);
      slot.value_mean = mean(!args.part && !kRawProducts<E>, args.channels);
      slot.query_rows = arena.take<E>(row_space<E>(args.queries) * key_pitch);
      slot.key_panels = arena.take<E>(kKeyBlock * key_pitch);
      slot.value_panels = arena.take<E>(channel_panels * kKeyBlock * L);
      slot.logits = arena.take<A>(args.queries * kKeyBlock);
      slot.probability = kRawProducts<E> ? arena.take<E>(row_space<E>(args.queries) * kKeyBlock) : nullptr;
      slot.output = arena.take<A>(args.queries * channel_panels * L);
      slot.bias = kRawProducts<E> && args.whiten ? arena.take<A>(kKeyBlock) : nullptr;
      slot.most = arena.take<A>(args.queries);
      slot.sum = arena.take<double>(args.queries);
      slot.divisor = arena.take<double>(args.queries);
    }
    bytes = arena.used();
  }

  void run() {
    share_out(executor, workers, args.batches, [&](int64_t batch, int64_t worker) { run_batch(batch, slots[worker]); });
  }

 private:
  // The means of one batch element, as Means has them of all.
  void take_means(int64_t batch, const Slot& slot) const {
    const auto mean = [&](View x, int64_t positions, int64_t channels, A* out, bool only_finite) {
      if (!out) return;
      x.batch += batch;
      all_column_sums<Src>(x, 1, positions, channels, nullptr, 0, positions, out, Executor{});
      if (only_finite) Means<Src, E>::only_finite(out, channels);
    };
    mean(args.query, args.queries, args.width, slot.query_mean, false);
    mean(args.key, args.keys, args.width, slot.key_mean, !args.whiten);
    mean(args.value, args.keys, args.channels, slot.value_mean, true);
  }

  void run_batch(int64_t batch, const Slot& slot) const {
    take_means(batch, slot);
    const bool centred = centred_logits<Src, E>(args);
    const A* key_mean = centred ? slot.key_mean : nullptr;
    pack_rows(by_position<Src>(args.query, batch, 0, centred ? slot.query_mean : nullptr), args.queries, args.width,
              key_pitch, slot.query_rows);
    std::fill(slot.most, slot.most + args.queries, -std::numeric_limits<A>::infinity());
    std::fill(slot.sum, slot.sum + args.queries, 0.0);
    std::fill(slot.divisor, slot.divisor + args.queries, 0.0);
    for (int64_t first = 0; first < args.keys; first += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, args.keys - first);
      pack_panels(by_channel<Src>(args.key, batch, first, key_mean), args.width, count, slot.key_panels, key_pitch * L);
      pack_panels(by_position<Src>(args.value, batch, first, slot.value_mean), count, args.channels, slot.value_panels,
                  kKeyBlock * L);
      if (slot.bias) {
        // Its means are those of this batch element alone.
        PairwiseArgs one = args;
        one.key.batch += batch;
        key_bias<Src>(one, 0, first, first + count, slot.query_mean, slot.key_mean, sign, slot.bias);
      }
      product<E, Into::store>(args.queries, ceil_div(count, L), key_pitch, {slot.query_rows, key_pitch, key_pitch, 0},
                              {slot.key_panels, key_pitch * L}, {slot.logits, args.queries * L});
      for (int64_t r = 0; r < args.queries; ++r) softmax_step(slot, r, count, first > 0);
      accumulate<E>(first == 0, args.queries, channel_panels, round_up(count, G), rows_of(slot),
                    {slot.value_panels, kKeyBlock * L}, {slot.output, args.queries * L});
    }
    write(batch, slot);
  }

  // The probabilities as the left operand of a product.
  RowOperand<E> rows_of(const Slot& slot) const {
    if constexpr (kRawProducts<E>)
      return {slot.probability, kKeyBlock, kKeyBlock, 0};
    else
      return {slot.logits, L, L, args.queries * L};
  }

  // The logits of one query and `count` keys become probabilities relative to the maximum so far, and what was summed
  // before is brought to that. A query whose logits are all -inf keeps most = -inf and sum = 0.
  void softmax_step(const Slot& slot, int64_t r, int64_t count, bool rescale) const {
    const A infinity = std::numeric_limits<A>::infinity();
    const auto place = [&](int64_t j) { return slot.logits + j / L * args.queries * L + r * L + j % L; };
    const int64_t whole = round_up(count, W);
    A* const last = place(whole - W);
    for (int64_t j = count; j < whole; ++j) last[j - (whole - W)] = 0;
    const A before = slot.most[r];
    Vec<A> largest = broadcast(before);
    for (int64_t j = 0; j < whole; j += W) {
      Vec<A> t = load(place(j)) * sign;
      if (slot.bias) t += load(slot.bias + j);
      store(place(j), t);
      if (j + W <= count) largest = vmax(largest, t);
    }
    for (int64_t j = count / W * W; j < count; ++j) largest[0] = std::max(A(largest[0]), *place(j));
    for (int64_t j = count; j < whole; ++j) last[j - (whole - W)] = -infinity;
    const A most = largest_lane<A>(largest), shift = most == -infinity ? A(0) : most;
    const A alpha = exp2(broadcast((before - shift) * c))[0];
    slot.most[r] = most;

    constexpr int64_t kRun = 8 * W;  // short runs first, or small probabilities would be rounded away
    double sum = 0, divisor = 0;
    for (int64_t begin = 0; begin < whole; begin += kRun) {
      Vec<A> run{};
      for (int64_t j = begin; j < std::min(whole, begin + kRun); j += W) {
        const Vec<A> p = exp2((load(place(j)) - shift) * c);
        run += p;
        store(place(j), p);
      }
      if constexpr (kRawProducts<E>) {
        const auto rounded = [&](int64_t j) -> E& { return slot.probability[row_place<E>(r, j, kKeyBlock)]; };
        const int64_t end = std::min(count, begin + kRun);
        for (int64_t j = begin; j < end; j += W) {
          const A* p = place(j);
          if (j + W <= end) {  // a number that the compiler knows
            for (int64_t l = 0; l < W; ++l) rounded(j + l) = narrow<E>(p[l]);
          } else {
            for (int64_t l = 0; l < end - j; ++l) rounded(j + l) = narrow<E>(p[l]);
          }
        }
        divisor += lane_sum<E>(end - begin, [&](int64_t j) { return double(widen(rounded(begin + j))); });
      }
      double lanes[W];
      for (int64_t l = 0; l < W; ++l) lanes[l] = double(run[l]);
      const double of_run = sum_of_lanes<W>(lanes);
      sum += of_run;
      if (!kRawProducts<E>) divisor += of_run;
    }
    if constexpr (kRawProducts<E>)
      for (int64_t j = count; j < round_up(count, G); ++j) slot.probability[row_place<E>(r, j, kKeyBlock)] = E{};
    slot.sum[r] = slot.sum[r] * double(alpha) + sum;
    slot.divisor[r] = slot.divisor[r] * double(alpha) + divisor;
    if (rescale && !(alpha == 1))
      for (int64_t p = 0; p < channel_panels; ++p) {
        A* out = slot.output + (p * args.queries + r) * L;
        for (int64_t l = 0; l < L; ++l) out[l] *= alpha;
      }
  }

  void write(int64_t batch, const Slot& slot) const {
    const A* pooled = args.pooled ? static_cast<const A*>(args.pooled) + batch * args.channels : nullptr;
    A* stats = static_cast<A*>(args.stats) + batch * args.queries * 2;
    for (int64_t r = 0; r < args.queries; ++r) {
      stats[2 * r] = slot.most[r];
      stats[2 * r + 1] = static_cast<A>(1 / slot.sum[r]);
    }
    for (int64_t p = 0; p < channel_panels; ++p) {
      const int64_t first = p * L;
      const A *from = slot.output + p * args.queries * L, *centre = slot.value_mean ? slot.value_mean + first : nullptr;
      const A* beside = pooled ? pooled + first : nullptr;
      const double* divisor = slot.divisor;
      const auto values = [=](int64_t r) {
        const A *row = from + r * L, factor = static_cast<A>(1 / divisor[r]);
        return [=](int64_t lane) {
          return row[lane] * factor + ((centre ? centre[lane] : A(0)) + (beside ? beside[lane] : A(0)));
        };
      };
      const auto write_to = [&](const View& view, const auto& round) {
        Src* out = static_cast<Src*>(view.data) + view.batch[batch] + first * view.channel;
        write_lanes(out, view.position, view.channel, args.queries, std::min<int64_t>(L, args.channels - first),
                    [=](int64_t r) { return [=, value = values(r)](int64_t lane) { return round(value(lane)); }; });
      };
      write_to(args.output, [](A x) { return narrow<Src>(x); });
      if (args.residual.data) write_to(args.residual, [](A x) { return narrow<Src>(x - widen(narrow<Src>(x))); });
    }
  }
};

}  // namespace DNL_ISA
}  // namespace dnl
