// Forward pass of whitened pairwise attention on the CPU.
//
// Once per call K is packed by rows and V by channels, in blocks of kKeyBlock keys. Then a thread takes a tile of
// queries (on the lanes), packs it, and for each block of keys computes t = sign K Q (keys x queries), turns it into P
// = 2^(c (t - m)) with a running maximum m per query, and adds V P (channels x queries) to its output, which that
// product first rescales by 2^(c (m_old - m)). A key is a row here, so maximum and sum run down the rows with no
// reduction across lanes, and the last block may have fewer rows.
#pragma once

#include "ops/pairwise/cpu/direct.h"
#include "ops/pairwise/cpu/few_queries.h"
#include "ops/pairwise/cpu/operands.h"

namespace dnl {
namespace DNL_ISA {

template <class Src, class E>
struct PairwiseForward {
  using A = Acc<E>;
  using B = Block<E>;
  static constexpr int L = B::kLanes, G = B::kGroup, W = kWidth<A>;
  static constexpr int64_t kKeyBlock = B::kVectors == 2 ? 252 : 384;
  static constexpr int64_t kTilePanels = most_panels<E>();
  static_assert(kKeyBlock % B::kRows == 0 && kKeyBlock % G == 0, "a block of keys is whole rows and whole groups");
  static_assert(kKeyBlock % B::kRowGroup == 0, "and whole groups of rows");

  const PairwiseArgs& args;
  const Executor& executor;
  const A sign, c;  // t = sign S + bias; differences of t times c are exponents of 2
  int64_t tile, tiles, key_blocks, group, workers;
  int64_t key_pitch, panel_depth;

  Means<Src, E> means;
  E *key_rows, *value_rows;
  A* bias;
  size_t bytes;

  // A worker's own buffers.
  struct Slot {
    E *query, *probability;
    A *logits, *output, *most, *alpha;
    A *sum, *divisor;  // of the probabilities, and of the probabilities as rounded for the product
  };
  std::vector<Slot> slots;

  PairwiseForward(const PairwiseArgs& a, void* workspace, const Executor& e)
      : PairwiseForward(a, Arena(workspace), e) {}

  void run() {
    means.compute(args, executor);
    for (int64_t first = 0; first < args.batches; first += group) {
      const int64_t count = std::min(group, args.batches - first);
      executor.parallel(count * key_blocks, [&](int64_t task) {
        pack_keys(first + task / key_blocks, task / key_blocks, task % key_blocks);
      });
      share_out(executor, workers, count * tiles, [&](int64_t task, int64_t worker) {
        run_tile(first + task / tiles, task / tiles, task % tiles, slots[worker]);
      });
    }
  }

 private:
  PairwiseForward(const PairwiseArgs& a, Arena arena, const Executor& e)
      : args(a), executor(e), sign(static_cast<A>(a.sign())), c(a.magnitude<A>(kLog2e<double>)), means(a, arena) {
    key_pitch = round_up(args.width, G);
    panel_depth = key_pitch;
    key_blocks = ceil_div(args.keys, kKeyBlock);
    // Tiles of kTilePanels panels, fewer where that leaves a thread idle; batch elements are packed in groups that keep
    // all threads busy, so that the packed copies stay small.
    int64_t panels = kTilePanels;
    while (panels > 1 && args.batches * ceil_div(args.queries, panels * L) < 2 * executor.threads) --panels;
    tile = panels * L;
    tiles = ceil_div(args.queries, tile);
    group = std::min(args.batches, ceil_div(4 * executor.threads, tiles));
    workers = std::min<int64_t>(executor.threads, group * tiles);

    key_rows = arena.take<E>(group * row_space<E>(args.keys) * key_pitch);
    value_rows = arena.take<E>(group * key_blocks * row_space<E>(args.channels) * kKeyBlock);
    bias = kRawProducts<E> && args.whiten ? arena.take<A>(group * args.keys) : nullptr;
    slots.resize(workers);
    for (Slot& slot : slots) {
      slot.query = arena.take<E>(panels * panel_depth * L);
      slot.logits = arena.take<A>(panels * kKeyBlock * L);
      slot.probability = kRawProducts<E> ? arena.take<E>(panels * kKeyBlock * L) : nullptr;
      slot.output = arena.take<A>(panels * args.channels * L);
      slot.most = arena.take<A>(tile);
      slot.sum = arena.take<A>(tile);
      slot.divisor = arena.take<A>(tile);
      slot.alpha = arena.take<A>(tile);
    }
    bytes = arena.used();
  }

  const A* mean(const A* means_of, int64_t batch) const {
    return means_of && centred_logits<Src, E>(args) ? means_of + batch * args.width : nullptr;
  }

  const A* value_mean(int64_t batch) const { return means.value ? means.value + batch * args.channels : nullptr; }

  E* keys_from(int64_t place, int64_t first) const {
    return key_rows + (place * row_space<E>(args.keys) + first) * key_pitch;
  }
  E* values_of(int64_t place, int64_t block) const {
    return value_rows + (place * key_blocks + block) * row_space<E>(args.channels) * kKeyBlock;
  }

  void pack_keys(int64_t batch, int64_t place, int64_t block) {
    const int64_t first = block * kKeyBlock, count = std::min(kKeyBlock, args.keys - first);
    pack_rows(by_position<Src>(args.key, batch, first, mean(means.key, batch)), count, args.width, key_pitch,
              keys_from(place, first));
    pack_rows(by_channel<Src>(args.value, batch, first, value_mean(batch)), args.channels, count, kKeyBlock,
              values_of(place, block));
    if (bias)
      key_bias<Src>(args, batch, first, first + count, means.query, means.key, sign, bias + place * args.keys + first);
  }

  void run_tile(int64_t batch, int64_t place, int64_t index, const Slot& slot) {
    const int64_t first = index * tile, count = std::min(tile, args.queries - first), panels = ceil_div(count, L);
    const A infinity = std::numeric_limits<A>::infinity();
    std::fill(slot.most, slot.most + panels * L, -infinity);
    std::fill(slot.sum, slot.sum + panels * L, A(0));
    std::fill(slot.divisor, slot.divisor + panels * L, A(0));
    pack_panels(by_channel<Src>(args.query, batch, first, mean(means.query, batch)), args.width, count, slot.query,
                panel_depth * L);

    for (int64_t block = 0; block < key_blocks; ++block) {
      const int64_t key = block * kKeyBlock, rows = std::min(kKeyBlock, args.keys - key);
      // Panel by panel, so that the step finds its logits in L2.
      for (int64_t p = 0; p < panels; ++p) {
        product<E, Into::store>(rows, 1, panel_depth, {keys_from(place, key), key_pitch, panel_depth, 0},
                                {slot.query + p * panel_depth * L, 0}, {slot.logits + p * kKeyBlock * L, 0});
        softmax_step(slot, p, rows, bias ? bias + place * args.keys + key : nullptr);
      }
      accumulate<E>(block == 0, args.channels, panels, round_up(rows, G),
                    {values_of(place, block), kKeyBlock, kKeyBlock, 0}, {probability(slot), kKeyBlock * L},
                    {slot.output, args.channels * L}, slot.alpha);
    }
    write(batch, first, count, slot);
  }

  static E* probability(const Slot& slot) {
    if constexpr (kRawProducts<E>)
      return slot.probability;
    else
      return slot.logits;
  }

  // One block of logits of one panel (rows x lanes) becomes probabilities relative to the maximum so far. `alpha` is
  // what earlier blocks' sums must be multiplied by. A lane whose logits are all -inf keeps most = -inf and sum = 0.
  void softmax_step(const Slot& slot, int64_t panel, int64_t rows, const A* row_bias) const {
    A* s = slot.logits + panel * kKeyBlock * L;
    E* p = probability(slot) + panel * kKeyBlock * L;
    constexpr int V = B::kVectors;
    Vec<A> most[V], shift[V], sum[V], divisor[V], block_sum[V]{}, block_divisor[V]{};
    const Vec<A> lowest = broadcast(-std::numeric_limits<A>::infinity());
    for (int v = 0; v < V; ++v) most[v] = load(slot.most + panel * L + v * W);
    const auto bias_of = [&](int64_t r) { return row_bias ? row_bias[r] : A(0); };
    const auto logit = [&](int64_t r, int v) { return load(s + r * L + v * W) * sign + bias_of(r); };
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < V; ++v) most[v] = vmax(most[v], logit(r, v));
    for (int v = 0; v < V; ++v) {
      const int64_t lane = panel * L + v * W;
      shift[v] = most[v] == lowest ? Vec<A>{} : most[v];
      const Vec<A> alpha = exp2((load(slot.most + lane) - shift[v]) * c);
      store(slot.alpha + lane, alpha);
      store(slot.most + lane, most[v]);
      sum[v] = load(slot.sum + lane) * alpha;
      divisor[v] = load(slot.divisor + lane) * alpha;
    }
    const auto exponential = [&](int64_t r, int v) { return exp2((logit(r, v) - shift[v]) * c); };
    // Sums of short runs first: in one running sum over all keys small probabilities would be rounded away.
    constexpr int64_t kRun = 32;
    for (int64_t first = 0; first < rows; first += kRun) {
      Vec<A> run[V]{}, rounded_run[V]{};
      for (int64_t r = first; r < std::min(rows, first + kRun); r += G) {
        for (int v = 0; v < V; ++v) {
          Vec<A> x[G];
#pragma GCC unroll 4
          for (int i = 0; i < G; ++i) {
            x[i] = i == 0 || r + i < rows ? exponential(r + i, v) : Vec<A>{};
            run[v] += x[i];
          }
          if constexpr (G == 1)
            store(s + r * L + v * W, x[0]);
          else
            rounded_run[v] += store_group(p + r * L + v * W * G, x);
        }
      }
      for (int v = 0; v < V; ++v) {
        block_sum[v] += run[v];
        block_divisor[v] += rounded_run[v];
      }
    }
    for (int v = 0; v < V; ++v) {
      sum[v] += block_sum[v];
      divisor[v] += block_divisor[v];
    }
    for (int v = 0; v < V; ++v) {
      store(slot.sum + panel * L + v * W, sum[v]);
      store(slot.divisor + panel * L + v * W, G == 1 ? sum[v] : divisor[v]);
    }
  }

  void write(int64_t batch, int64_t first, int64_t count, const Slot& slot) const {
    const A* pooled = args.pooled ? static_cast<const A*>(args.pooled) + batch * args.channels : nullptr;
    A* stats = static_cast<A*>(args.stats) + (batch * args.queries + first) * 2;
    for (int64_t i = 0; i < count; ++i) {
      stats[2 * i] = slot.most[i];
      stats[2 * i + 1] = A(1) / slot.sum[i];
      slot.alpha[i] = A(1) / slot.divisor[i];
    }
    const A* centre = value_mean(batch);
    for (int64_t p = 0; p * L < count; ++p) {
      const A *from = slot.output + p * args.channels * L, *factor = slot.alpha + p * L;
      const auto values = [=](int64_t ch) {
        const A offset = (centre ? centre[ch] : A(0)) + (pooled ? pooled[ch] : A(0));
        return [=](int64_t lane) { return from[ch * L + lane] * factor[lane] + offset; };
      };
      const auto write_to = [&](const View& view, const auto& round) {
        Src* out = static_cast<Src*>(view.data) + view.batch[batch] + (first + p * L) * view.position;
        write_lanes(out, view.channel, view.position, args.channels, std::min<int64_t>(L, count - p * L),
                    [=](int64_t ch) { return [=, value = values(ch)](int64_t lane) { return round(value(lane)); }; });
      };
      write_to(args.output, [](A x) { return narrow<Src>(x); });
      if (args.residual.data) write_to(args.residual, [](A x) { return narrow<Src>(x - widen(narrow<Src>(x))); });
    }
  }
};

inline size_t pairwise_forward_workspace(const PairwiseArgs& args, const Executor& executor) {
  size_t bytes = 0;
  dispatch_products(args.dtype, [&](auto src, auto e) {
    using Direct = DirectPairwise<decltype(src)>;
    using Few = FewQueries<decltype(src), decltype(e)>;
    bytes = Direct::takes(args) ? Direct(args, false, nullptr, executor).bytes
            : Few::takes(args)  ? Few(args, nullptr, executor).bytes
                                : PairwiseForward<decltype(src), decltype(e)>(args, nullptr, executor).bytes;
  });
  return bytes;
}

inline void pairwise_forward(const PairwiseArgs& args, void* workspace, const Executor& executor) {
  dispatch_products(args.dtype, [&](auto src, auto e) {
    using Direct = DirectPairwise<decltype(src)>;
    using Few = FewQueries<decltype(src), decltype(e)>;
    if (Direct::takes(args)) return Direct(args, false, workspace, executor).forward();
    if (Few::takes(args)) return Few(args, workspace, executor).run();
    PairwiseForward<decltype(src), decltype(e)>(args, workspace, executor).run();
  });
}

}  // namespace DNL_ISA
}  // namespace dnl
