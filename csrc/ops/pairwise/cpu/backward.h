// Backward pass of whitened pairwise attention on the CPU.
//
//   P = 2^(c (t - shift)) factor,  dS = P (dO V^T - Delta),  Delta_i = <dy_i, y_i - pooled>
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K
//
// A thread owns a tile of keys (on the lanes), packs K and V for it once, and takes blocks of queries: S = Q K and
// dP = dO V (queries x keys) become P and dS in place; dV^T += dO^T P and dK^T += Q^T dS (channels x keys) stay with
// the tile; dQ += dS K goes to a buffer that all threads share. So that no two touch the same query at once, the
// queries are cut into as many ranges as threads share a batch element, and in step s thread t works on range (t + s)
// modulo that number. This needs no buffer for each thread and no lock, and the order of the sum is fixed for a given
// number of threads.
//
// Query and dO are packed once per group of batch elements, by rows (the depth is the channel) and by channels (the
// depth is the query). Of dO one of the two is in memory already in the order that the product reads, and is not
// copied.
#pragma once

#include "ops/pairwise/cpu/delta.h"
#include "ops/pairwise/cpu/direct.h"
#include "ops/pairwise/cpu/operands.h"

namespace dnl {
namespace DNL_ISA {

template <class Src, class E>
struct PairwiseBackward {
  using A = Acc<E>;
  using B = Block<E>;
  static constexpr int L = B::kLanes, G = B::kGroup, W = kWidth<A>;
  static constexpr int64_t kQueryBlock = B::kVectors == 2 ? 126 : 192;
  static constexpr int64_t kUnit = B::kRows;  // ranges of queries are multiples of it
  static constexpr int64_t kTilePanels = most_panels<E>();
  static_assert(kQueryBlock % kUnit == 0 && kUnit % G == 0, "a block of queries is whole rows and groups");
  static_assert(kUnit % B::kRowGroup == 0 && L % G == 0, "and whole groups of rows; a panel's rows are whole groups");
  static_assert(kTilePanels * L <= kDepthSlice<E> || kDepthSlice<E> % L == 0, "no slice ends within a run");

  const PairwiseArgs& args;
  const Executor& executor;
  const A sign, c;                     // t = sign S + bias; differences of t times c are exponents of 2
  const bool need_value, need_logits;  // logits: any gradient that goes through dS
  int64_t tile, tiles, group, sharing, range_rows, range_blocks, query_blocks;
  int64_t width_pitch, channel_pitch, width_panels;
  bool rows_in_place, columns_in_place;  // of dO

  Means<Src, E> means;
  E *query_rows, *query_columns, *grad_rows, *grad_columns;
  A *shift, *factor, *delta, *grad_query, *grad_pooled, *unary;
  double* delta_offsets;  // (batches, channels)
  size_t bytes;

  struct Slot {
    E *key, *key_columns, *value;              // panels: K (depth = channel), K (depth = key), V (depth = channel)
    A *bias, *column_sum;                      // per lane
    A *logits, *grad;                          // S then P; dP then dS
    E *probability, *grad_groups, *grad_rows;  // P and dS in groups, dS as rows: with bfloat16 products only
    A *grad_key, *grad_value;
  };
  std::vector<Slot> slots;

  PairwiseBackward(const PairwiseArgs& a, void* workspace, const Executor& e)
      : PairwiseBackward(a, Arena(workspace), e) {}

  void run() {
    means.compute(args, executor);
    unary_gradients<Src>(args, grad_pooled, unary, executor);
    for (int64_t b = 0; b < args.batches; ++b)
      delta_offset<Src>(args, b, value_mean(b), delta_offsets + b * args.channels);
    for (int64_t first = 0; first < args.batches; first += group) {
      const int64_t count = std::min(group, args.batches - first);
      executor.parallel(count * query_blocks, [&](int64_t task) {
        pack_queries(first + task / query_blocks, task / query_blocks, task % query_blocks);
      });
      if (sharing == 1) {
        executor.parallel(count, [&](int64_t place) {
          for (int64_t key = 0; key < tiles; ++key) step(first + place, place, key, 0, slots[place]);
        });
      } else {
        for (int64_t round = 0; round < tiles; round += sharing)
          for (int64_t s = 0; s < sharing; ++s)
            executor.parallel(count * sharing, [&](int64_t task) {
              const int64_t place = task / sharing, key = round + task % sharing;
              if (key < tiles) step(first + place, place, key, s, slots[task]);
            });
      }
      if (args.grad_query.data)
        executor.parallel(count * width_panels, [&](int64_t task) {
          write_query(first + task / width_panels, task / width_panels, task % width_panels);
        });
    }
  }

 private:
  PairwiseBackward(const PairwiseArgs& a, Arena arena, const Executor& e)
      : args(a),
        executor(e),
        sign(static_cast<A>(a.sign())),
        c(a.magnitude<A>(kLog2e<double>)),
        need_value(a.grad_value.data),
        need_logits(a.grad_query.data || a.grad_key.data),
        means(a, arena) {
    width_pitch = round_up(args.width, G);
    channel_pitch = round_up(args.channels, G);
    width_panels = ceil_div(args.width, L);

    // Enough batch elements to give each thread its own, or threads that share one.
    const int64_t threads = executor.threads;
    int64_t panels = kTilePanels;
    if (args.batches % threads == 0 || args.batches >= 4 * threads) {
      sharing = 1;
      group = std::min(args.batches, threads);
    } else {
      while (panels > 1 && ceil_div(args.keys, panels * L) < 2 * threads) --panels;
      sharing = std::min({threads, ceil_div(args.keys, panels * L), ceil_div(args.queries, kQueryBlock)});
      group = std::min(args.batches, std::max<int64_t>(1, threads / sharing));
    }
    range_rows = round_up(ceil_div(args.queries, sharing), kUnit);
    range_blocks = ceil_div(range_rows, kQueryBlock);
    query_blocks = sharing * range_blocks;
    panels = std::min(panels, ceil_div(args.keys, L));
    tile = panels * L;
    tiles = ceil_div(args.keys, tile);

    const int64_t queries = query_blocks * kQueryBlock;
    const bool want_query = args.grad_query.data, want_key = args.grad_key.data;
    query_rows = arena.take<E>(group * row_space<E>(args.queries) * width_pitch);
    query_columns = want_key ? arena.take<E>(group * queries * row_space<E>(args.width)) : nullptr;
    rows_in_place = lies_ready(args.grad_output.channel, args.channels);
    columns_in_place = lies_ready(args.grad_output.position, args.queries);
    const bool copy_rows = need_logits && !rows_in_place, copy_columns = need_value && !columns_in_place;
    grad_rows = copy_rows ? arena.take<E>(group * row_space<E>(args.queries) * channel_pitch) : nullptr;
    grad_columns = copy_columns ? arena.take<E>(group * queries * row_space<E>(args.channels)) : nullptr;
    shift = arena.take<A>(group * args.queries);
    factor = arena.take<A>(group * args.queries);
    delta = arena.take<A>(group * args.queries);
    delta_offsets = arena.take<double>(args.batches * args.channels);
    grad_query = want_query ? arena.take<A>(group * width_panels * args.queries * L) : nullptr;
    const bool has_unary = args.mask.data;
    grad_pooled = has_unary ? arena.take<A>(args.batches * args.channels) : nullptr;
    unary = has_unary ? arena.take<A>(args.batches * args.keys) : nullptr;
    slots.resize(group * sharing);
    for (Slot& slot : slots) {
      slot.key = arena.take<E>(panels * width_pitch * L);
      slot.key_columns = want_query ? arena.take<E>(width_panels * round_up(tile, G) * L) : nullptr;
      slot.value = need_logits ? arena.take<E>(panels * channel_pitch * L) : nullptr;
      slot.bias = arena.take<A>(tile);
      slot.column_sum = arena.take<A>(tile);
      slot.logits = arena.take<A>(panels * kQueryBlock * L);
      slot.grad = need_logits ? arena.take<A>(panels * kQueryBlock * L) : nullptr;
      slot.probability = kRawProducts<E> ? arena.take<E>(panels * kQueryBlock * L) : nullptr;
      slot.grad_groups = kRawProducts<E> ? arena.take<E>(panels * kQueryBlock * L) : nullptr;
      slot.grad_rows = kRawProducts<E> ? arena.take<E>(panels * kQueryBlock * L) : nullptr;
      slot.grad_key = want_key ? arena.take<A>(panels * args.width * L) : nullptr;
      slot.grad_value = need_value ? arena.take<A>(panels * args.channels * L) : nullptr;
    }
    bytes = arena.used();
  }

  // Blocks are cut within each range. Ranges have equal sizes, as nearly as possible: threads wait for the slowest.
  int64_t first_of(int64_t block) const {
    const int64_t within = std::min(block % range_blocks * kQueryBlock, range_rows);
    return std::min(block / range_blocks * range_rows + within, args.queries);
  }

  // Whether rows of `depth` elements `stride` apart can be an operand as they are.
  static bool lies_ready(int64_t stride, int64_t depth) {
    return std::is_same_v<Src, E> && B::kRowGroup == 1 && stride == 1 && depth % G == 0;
  }
  // dO of queries from `first` on by rows, and by channels.
  RowOperand<E> grad_rows_from(int64_t batch, int64_t place, int64_t first) const {
    if (rows_in_place) return {in_place(batch, first), args.grad_output.position, args.channels, 0};
    return {grad_rows + row_of(place, first) * channel_pitch, channel_pitch, channel_pitch, 0};
  }
  RowOperand<E> grad_columns_of(int64_t batch, int64_t place, int64_t block) const {
    if (columns_in_place) return {in_place(batch, first_of(block)), args.grad_output.channel, kQueryBlock, 0};
    return {grad_columns + column_of(place, block) * row_space<E>(args.channels), kQueryBlock, kQueryBlock, 0};
  }
  // Where a query's row is in a packed copy by rows.
  int64_t row_of(int64_t place, int64_t query) const { return place * row_space<E>(args.queries) + query; }
  // Where a block begins in a packed copy by channels.
  int64_t column_of(int64_t place, int64_t block) const { return (place * query_blocks + block) * kQueryBlock; }
  const E* in_place(int64_t batch, int64_t first) const {
    return reinterpret_cast<const E*>(element<Src>(args.grad_output, batch) + first * args.grad_output.position);
  }

  const A* mean(const A* means_of, int64_t batch) const { return means_of ? means_of + batch * args.width : nullptr; }
  const A* packing_mean(const A* means_of, int64_t batch) const {
    return centred_logits<Src, E>(args) ? mean(means_of, batch) : nullptr;
  }

  const A* value_mean(int64_t batch) const { return means.value ? means.value + batch * args.channels : nullptr; }

  void pack_queries(int64_t batch, int64_t place, int64_t block) {
    const int64_t first = first_of(block), count = first_of(block + 1) - first;
    const int64_t row = place * args.queries + first, column = column_of(place, block);
    const A* query_mean = packing_mean(means.query, batch);
    pack_rows(by_position<Src>(args.query, batch, first, query_mean), count, args.width, width_pitch,
              query_rows + row_of(place, first) * width_pitch);
    if (query_columns)
      pack_rows(by_channel<Src>(args.query, batch, first, query_mean), args.width, count, kQueryBlock,
                query_columns + column * row_space<E>(args.width));
    if (grad_rows)
      pack_rows(by_position<Src>(args.grad_output, batch, first, nullptr), count, args.channels, channel_pitch,
                grad_rows + row_of(place, first) * channel_pitch);
    if (grad_columns)
      pack_rows(by_channel<Src>(args.grad_output, batch, first, nullptr), args.channels, count, kQueryBlock,
                grad_columns + column * row_space<E>(args.channels));

    const A* stats = static_cast<const A*>(args.stats) + (batch * args.queries + first) * 2;
    for (int64_t i = 0; i < count; ++i) shift[row + i] = stats[2 * i], factor[row + i] = stats[2 * i + 1];
    if (need_logits && args.delta)
      std::copy_n(static_cast<const A*>(args.delta) + batch * args.queries + first, count, delta + row);
    else if (need_logits)
      compute_delta<Src>(args, delta_offsets + batch * args.channels, batch, first, count, delta + row);
    if (grad_query)
      for (int64_t p = 0; p < width_panels; ++p) {
        A* out = grad_query + ((place * width_panels + p) * args.queries + first) * L;
        std::fill(out, out + count * L, A(0));
      }
  }

  // Tile `key` against the s-th of its ranges of queries; packs the tile first and writes its gradients last.
  void step(int64_t batch, int64_t place, int64_t key, int64_t s, const Slot& slot) {
    const int64_t first = key * tile, count = std::min(tile, args.keys - first), panels = ceil_div(count, L);
    if (s == 0) pack_tile(batch, first, count, slot);
    const int64_t range = (key % sharing + s) % sharing;
    const int64_t begin = range * range_blocks;
    for (int64_t block = begin; block < begin + range_blocks; ++block)
      run_block(batch, place, block, count, panels, s == 0 && block == begin, slot);
    if (s == sharing - 1) write_tile(batch, first, count, slot);
  }

  void pack_tile(int64_t batch, int64_t first, int64_t count, const Slot& slot) {
    pack_panels(by_channel<Src>(args.key, batch, first, packing_mean(means.key, batch)), args.width, count, slot.key,
                width_pitch * L);
    if (slot.key_columns)  // dS multiplies the centred key in every type: rows of dS sum to zero only up to rounding
      pack_panels(by_position<Src>(args.key, batch, first, mean(means.key, batch)), count, args.width, slot.key_columns,
                  round_up(tile, G) * L);
    if (slot.value)
      pack_panels(by_channel<Src>(args.value, batch, first, value_mean(batch)), args.channels, count, slot.value,
                  channel_pitch * L);
    // Lanes beyond the last key get P = 0: a pair of bfloat16 depths may read one of them.
    std::fill(slot.bias, slot.bias + count, A(0));
    std::fill(slot.bias + count, slot.bias + tile, -std::numeric_limits<A>::infinity());
    if (kRawProducts<E> && means.query)
      key_bias<Src>(args, batch, first, first + count, means.query, means.key, sign, slot.bias);
    std::fill(slot.column_sum, slot.column_sum + tile, A(0));
  }

  void run_block(int64_t batch, int64_t place, int64_t block, int64_t keys, int64_t panels, bool fresh,
                 const Slot& slot) {
    const int64_t first = first_of(block), rows = first_of(block + 1) - first;
    const int64_t row = place * args.queries + first, column = column_of(place, block);
    constexpr int64_t kPanel = kQueryBlock * L;
    // Panel by panel, so that the step finds its logits in L2.
    for (int64_t p = 0; p < panels; ++p) {
      product<E, Into::store>(rows, 1, width_pitch,
                              {query_rows + row_of(place, first) * width_pitch, width_pitch, width_pitch, 0},
                              {slot.key + p * width_pitch * L, 0}, {slot.logits + p * kPanel, 0});
      if (need_logits)
        product<E, Into::store>(rows, 1, channel_pitch, grad_rows_from(batch, place, first),
                                {slot.value + p * channel_pitch * L, 0}, {slot.grad + p * kPanel, 0});
      softmax_step(slot, p, rows, row);
    }

    const int64_t depth = round_up(rows, G);
    if (need_value)
      accumulate<E>(fresh, args.channels, panels, depth, grad_columns_of(batch, place, block),
                    {probability(slot), kPanel}, {slot.grad_value, args.channels * L});
    if (slot.grad_key)
      accumulate<E>(fresh, args.width, panels, depth,
                    {query_columns + column * row_space<E>(args.width), kQueryBlock, kQueryBlock, 0},
                    {grad_groups(slot), kPanel}, {slot.grad_key, args.width * L});
    if (grad_query)
      product<E, Into::add>(rows, width_panels, round_up(keys, G), {grad_row_operand(slot), L, L, kPanel},
                            {slot.key_columns, round_up(tile, G) * L},
                            {grad_query + (place * width_panels * args.queries + first) * L, args.queries * L});
  }

  static E* probability(const Slot& slot) {
    if constexpr (kRawProducts<E>)
      return slot.probability;
    else
      return slot.logits;
  }
  static E* grad_groups(const Slot& slot) {
    if constexpr (kRawProducts<E>)
      return slot.grad_groups;
    else
      return slot.grad;
  }
  static E* grad_row_operand(const Slot& slot) {
    if constexpr (kRawProducts<E>)
      return slot.grad_rows;
    else
      return slot.grad;
  }

  // P = 2^(c (t - shift)) factor, dS = P (dP - Delta), for one panel (queries x keys); `row` is the first query's
  // place. dS as softmax_jacobian() in online_softmax.h.
  void softmax_step(const Slot& slot, int64_t panel, int64_t rows, int64_t row) const {
    const A *row_shift = shift + row, *row_factor = factor + row, *row_delta = delta + row;
    A *s = slot.logits + panel * kQueryBlock * L, *d = slot.grad + panel * kQueryBlock * L;
    constexpr int V = B::kVectors;
    const Vec<A> one = broadcast(A(1));
    Vec<A> bias[V], column_sum[V];
    for (int v = 0; v < V; ++v) {
      bias[v] = load(slot.bias + panel * L + v * W);
      column_sum[v] = Vec<A>{};
    }
    for (int64_t r = 0; r < rows; r += G)
      for (int v = 0; v < V; ++v) {
        Vec<A> p[G], g[G];
        for (int i = 0; i < G; ++i) {
          p[i] = g[i] = Vec<A>{};
          if (G > 1 && r + i >= rows) continue;
          const int64_t at = (r + i) * L + v * W;
          p[i] = exp2((load(s + at) * sign + bias[v] - row_shift[r + i]) * c) * row_factor[r + i];
          if (need_logits) g[i] = (p[i] == one ? Vec<A>{} : p[i]) * (load(d + at) - row_delta[r + i]);
        }
        if constexpr (G == 1) {
          store(s + r * L + v * W, p[0]);
          if (need_logits) store(d + r * L + v * W, g[0]);
        } else {
          store_half_rows(slot, panel, r, v, p, g, column_sum[v]);
        }
      }
    for (int v = 0; v < V; ++v) {
      A* total = slot.column_sum + panel * L + v * W;
      store(total, load(total) + column_sum[v]);
    }
  }

  // P and dS of a group of query rows, rounded; dS as rows too, and its column sums as rounded, which is what makes the
  // correction by the query mean in write_tile exact.
  void store_half_rows(const Slot& slot, int64_t panel, int64_t r, int v, const Vec<A> (&p)[G], const Vec<A> (&g)[G],
                       Vec<A>& column_sum) const {
    const int64_t group = panel * kQueryBlock * L + r * L + v * W * G;
    store_group(slot.probability + group, p);
    if (!need_logits) return;
    store_group(slot.grad_groups + group, g);
    store_rows(slot.grad_rows + panel * kQueryBlock * L + row_place<E>(r, v * W, L), g, column_sum);
  }

  void write_tile(int64_t batch, int64_t first, int64_t count, const Slot& slot) const {
    const A* query_mean = kRawProducts<E> ? mean(means.query, batch) : nullptr;
    const A* g = grad_pooled ? grad_pooled + batch * args.channels : nullptr;
    const A* u = unary ? unary + batch * args.keys + first : nullptr;
    const A scale = static_cast<A>(args.gradient_scale());
    if (slot.grad_key)
      write_panels(args.grad_key, batch, first, count, args.width, slot.grad_key, slot.column_sum, query_mean, A(-1),
                   scale);
    if (need_value)
      write_panels(args.grad_value, batch, first, count, args.channels, slot.grad_value, u, g, A(1), A(1));
  }

  // scale (x + sign along_c across_lane), or scale x where `along` is null.
  static void write_panels(const View& view, int64_t batch, int64_t first, int64_t count, int64_t channels,
                           const A* from, const A* across, const A* along, A sign, A scale) {
    Src* out = static_cast<Src*>(view.data) + view.batch[batch] + first * view.position;
    for (int64_t p = 0; p * L < count; ++p, out += L * view.position) {
      const A *panel = from + p * channels * L, *beside = along ? across + p * L : nullptr;
      const int64_t lanes = std::min<int64_t>(L, count - p * L);
      if (along)
        write_lanes(out, view.channel, view.position, channels, lanes, [=](int64_t ch) {
          return [=, x = panel + ch * L, factor = sign * along[ch]](int64_t lane) {
            return narrow<Src>(scale * (x[lane] + beside[lane] * factor));
          };
        });
      else
        write_lanes(out, view.channel, view.position, channels, lanes, [=](int64_t ch) {
          return [=, x = panel + ch * L](int64_t lane) { return narrow<Src>(scale * x[lane]); };
        });
    }
  }

  // dq = scale (accumulated - its mean over queries), for one panel of channels.
  void write_query(int64_t batch, int64_t place, int64_t panel) const {
    const A* from = grad_query + (place * width_panels + panel) * args.queries * L;
    const int64_t channels = std::min<int64_t>(L, args.width - panel * L);
    A mean_of[L] = {};
    if (args.whiten) {
      double sum[L] = {};
      for (int64_t i = 0; i < args.queries; ++i)
        for (int64_t ch = 0; ch < L; ++ch) sum[ch] += double(from[i * L + ch]);
      for (int64_t ch = 0; ch < L; ++ch) mean_of[ch] = static_cast<A>(sum[ch] / args.queries);
    }
    const View& view = args.grad_query;
    const A scale = static_cast<A>(args.gradient_scale());
    Src* out = static_cast<Src*>(view.data) + view.batch[batch] + panel * L * view.channel;
    const A* mean_at = mean_of;  // a lambda would copy the array
    write_lanes(out, view.position, view.channel, args.queries, channels, [=](int64_t i) {
      return [=, x = from + i * L](int64_t ch) { return narrow<Src>(scale * (x[ch] - mean_at[ch])); };
    });
  }
};

inline size_t pairwise_backward_workspace(const PairwiseArgs& args, const Executor& executor) {
  size_t bytes = 0;
  dispatch_products(args.dtype, [&](auto src, auto e) {
    using Direct = DirectPairwise<decltype(src)>;
    bytes = Direct::takes(args) ? Direct(args, true, nullptr, executor).bytes
                                : PairwiseBackward<decltype(src), decltype(e)>(args, nullptr, executor).bytes;
  });
  return bytes;
}

inline void pairwise_backward(const PairwiseArgs& args, void* workspace, const Executor& executor) {
  dispatch_products(args.dtype, [&](auto src, auto e) {
    using Direct = DirectPairwise<decltype(src)>;
    if (Direct::takes(args)) return Direct(args, true, workspace, executor).backward();
    PairwiseBackward<decltype(src), decltype(e)>(args, workspace, executor).run();
  });
}

}  // namespace DNL_ISA
}  // namespace dnl
