// A random case of pairwise attention, its definition in double, and what is asked of the results: for the chain
// (chain.cpp) and for the fused kernels (fused.cpp).
#pragma once

#include "gate.h"
#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/unary/unary_cuda.cuh"

namespace gates {

struct PairwiseCase {
  int64_t batches, queries, keys, width, channels;
  Layout layout;
  bool whiten, mask;
  bool part = false;    // as a part of all keys (ops/pairwise/pairwise.h)
  unsigned needs = 15;  // bits: query, key, value, mask
  double mean = 0, logit = 3;
  ChunkLimits limits = {};
  int64_t most_blocks = 3;

  std::string text(DType dtype) const {
    return message("dtype ", int(dtype), " B ", batches, " Nq ", queries, " Nk ", keys, " D ", width, " C ", channels,
                   " layout ", int(layout), " whiten ", whiten, " mask ", mask, " part ", part, " needs ", needs,
                   " mean ", mean, " logit ", logit);
  }
};

struct PairwiseValues {
  Values y, lse, dq, dk, dv, dm;
};

// E is what products multiply: T, or Tf32 for float.
template <class T, class E = T>
struct PairwiseProblem {
  using A = AccOf<T>;
  const PairwiseCase t;
  const int64_t B = t.batches, N = t.queries, M = t.keys, D = t.width, C = t.channels;
  Tensor<T> q, k, v, dy, m, y, rest, dq, dk, dv, dm;
  std::vector<A> stats, pooled, mask_lse, delta;
  PairwiseArgs args{};
  HostDevice device;
  PairwiseValues size;  // magnitudes of what is added up

  explicit PairwiseProblem(const PairwiseCase& c)
      : t(c),
        q(B, N, D, t.layout, t.mean),
        k(B, M, D, t.layout, t.mean),
        v(B, M, C, t.layout, t.mean),
        dy(B, N, C, t.layout),
        m(B, M, 1, t.layout),
        y(B, N, C, t.layout),
        rest(B, N, C, Layout::rows),
        dq(B, N, D, t.layout),
        dk(B, M, D, t.layout),
        dv(B, M, C, t.layout),
        dm(B, M, 1, t.layout),
        stats(2 * B * N),
        pooled(B * C),
        mask_lse(B) {
    device.most_blocks = t.most_blocks;
    device.blas.tf32 = !std::is_same_v<E, T>;
    args.query = q.view, args.key = k.view, args.value = v.view, args.output = y.view;
    if (kHalf<T>) args.residual = rest.view;
    args.stats = stats.data();
    args.dtype = kType<T>;
    args.batches = B, args.queries = N, args.keys = M, args.width = D, args.channels = C;
    args.scale = scale();
    args.whiten = t.whiten, args.part = t.part;
    if (!t.mask) return;
    UnaryArgs unary{};
    unary.mask = m.view, unary.value = v.view, unary.pooled = pooled.data(), unary.lse = mask_lse.data();
    unary.dtype = kType<T>;
    unary.batches = B, unary.keys = M, unary.channels = C;
    unary_forward_cuda<T>(unary, device);
    args.pooled = pooled.data(), args.mask_lse = mask_lse.data();
  }
  double scale() const { return t.logit / std::sqrt(double(D)); }

  // After the forward. Of a part, the caller takes Delta from whole rows: here those of the part.
  void want_gradients() {
    if (t.part) {
      y.read(), rest.read();
      for (int64_t i = 0; i < B * N; ++i) {
        double sum = 0;
        for (int64_t c = 0; c < C; ++c)
          sum += dy.value[i * C + c] * (y.value[i * C + c] + (kHalf<T> ? rest.value[i * C + c] : 0));
        delta.push_back(static_cast<A>(sum));
      }
      args.delta = delta.data();
    }
    args.grad_output = dy.view;
    if (t.mask) args.mask = m.view;
    if (t.needs & 1) args.grad_query = dq.view;
    if (t.needs & 2) args.grad_key = dk.view;
    if (t.needs & 4) args.grad_value = dv.view;
    if (t.mask && t.needs & 8) args.grad_mask = dm.view;
  }

  // The steps of the definition, each result rounded by `round`.
  template <class Round>
  PairwiseValues steps(Round round) {
    PairwiseValues x{Values(B * N * C), Values(B * N),     Values(B * N * D),
                     Values(B * M * D), Values(B * M * C), Values(B * M)};
    size = x;
    const Values qc = t.whiten ? less_mean(q.value, N, round) : q.value;
    const Values kc = t.whiten ? less_mean(k.value, M, round) : k.value;
    // Kernels take keys less their mean where dS multiplies them, and logits have the roundoff of a float sum.
    const Values key = t.part ? k.value : less_mean(k.value, M, Exact{});
    const double sums = kSumRoundoff<T> / kRoundoff<E>;
    for (int64_t b = 0; b < B; ++b) {
      Values u = t.mask ? softmax(m.value.data() + b * M, M) : Values(M), pool(C), grad_sum(C);
      for (double& value : u) value = round(value);
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t j = 0; j < M; ++j) pool[c] += u[j] * v.value[(b * M + j) * C + c];
        for (int64_t i = 0; i < N; ++i) grad_sum[c] += dy.value[(b * N + i) * C + c];
        pool[c] = round(pool[c]), grad_sum[c] = round(grad_sum[c]);
      }
      for (int64_t i = 0; i < N; ++i) row(b, i, qc, kc, key, pool, sums, round, x);
      for (int64_t j = 0; j < M; ++j) {
        double du = 0, mean = 0, dus = 0;
        for (int64_t c = 0; c < C; ++c) {
          const double g = grad_sum[c], value = v.value[(b * M + j) * C + c];
          double& to = x.dv[(b * M + j) * C + c];
          to = t.mask ? round(round(to) + round(u[j] * g)) : round(to);
          size.dv[(b * M + j) * C + c] += std::abs(u[j] * g);
          du += g * value, dus += std::abs(g) * (std::abs(value) + std::abs(pool[c])), mean += g * pool[c];
        }
        x.dm[b * M + j] = round(u[j] * (round(du) - mean));
        size.dm[b * M + j] = 2 * std::abs(x.dm[b * M + j]) + u[j] * dus * 16 * sums;
      }
    }
    if (t.whiten) x.dq = less_mean(x.dq, N, round), x.dk = less_mean(x.dk, M, round);
    return x;
  }

  // What came out, against the definition.
  void compare(bool forward, bool backward) {
    for (Tensor<T>* tensor : {&y, &dq, &dk, &dv, &dm}) tensor->read();
    const PairwiseValues eager = steps(Eager<E>{}), want = steps(Exact{});
    const std::string what = t.text(kType<T>);
    const double u = kRoundoff<E>, tiny = std::is_same_v<T, __half> ? 0x1p-14 : 0;
    for (Values* x : {&size.y, &size.dq, &size.dk, &size.dv, &size.dm})
      for (double& value : *x) value += tiny;
    if (forward) {
      Values both(B * N);
      for (int64_t i = 0; i < B * N; ++i)
        both[i] = double(stats[2 * i]) * std::abs(scale()) - std::log(double(stats[2 * i + 1]));
      close("y", y.value, want.y, eager.y, size.y, 2, u, what);
      close("lse", both, want.lse, device.blas.tf32 ? eager.lse : want.lse, size.lse, 2, kSumRoundoff<T>, what);
    }
    if (!backward) return;
    if (t.needs & 1) close("dq", dq.value, want.dq, eager.dq, size.dq, 3, u, what);
    if (t.needs & 2) close("dk", dk.value, want.dk, eager.dk, size.dk, 3, u, what);
    if (t.needs & 4) close("dv", dv.value, want.dv, eager.dv, size.dv, 3, u, what);
    if (t.mask && t.needs & 8) close("dm", dm.value, want.dm, eager.dm, size.dm, 3, u, what);
  }

 private:
  template <class Round>
  Values less_mean(const Values& x, int64_t positions, Round round) const {
    Values y = x;
    const int64_t channels = x.size() / (B * positions);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < positions; ++i) sum += x[(b * positions + i) * channels + c];
        const double mean = round(sum / positions);
        for (int64_t i = 0; i < positions; ++i)
          y[(b * positions + i) * channels + c] = round(x[(b * positions + i) * channels + c] - mean);
      }
    return y;
  }

  // One query: its row of the map, its output, and what it adds to the gradients.
  template <class Round>
  void row(int64_t b, int64_t i, const Values& qc, const Values& kc, const Values& key, const Values& pool, double sums,
           Round round, PairwiseValues& x) {
    Values s(M), dp(M), dps(M);
    const double *g = dy.value.data() + (b * N + i) * C, *query = q.value.data() + (b * N + i) * D;
    double spread = 0;    // of a logit: the largest sum of magnitudes
    double rounding = 0;  // of a logit in TF32: the largest sum of independent roundings of what it multiplies
    for (int64_t j = 0; j < M; ++j) {
      double dot = 0, magnitude = 0, square = 0;
      for (int64_t d = 0; d < D; ++d) {
        dot += round.operand(qc[(b * N + i) * D + d]) * round.operand(kc[(b * M + j) * D + d]);
        const double term = query[d] * (kHalf<T> ? k.value : key)[(b * M + j) * D + d];
        magnitude += std::abs(term), square += term * term;
      }
      s[j] = round(scale() * round(dot));
      spread = std::max(spread, std::abs(scale()) * magnitude);
      if (!std::is_same_v<E, T>) rounding = std::max(rounding, std::abs(scale()) * std::sqrt(square));
    }
    Values p = softmax(s.data(), M);
    const double most = *std::max_element(s.begin(), s.end());
    double sum = 0, delta = 0, deltas = 0;
    for (int64_t j = 0; j < M; ++j) sum += std::exp(s[j] - most);
    // Kernels leave out a constant of the row: see the head of ops/pairwise/chain/operands.cuh.
    double constant = 0;
    if (t.whiten == kHalf<T> && !t.part)
      for (int64_t d = 0; d < D; ++d)
        constant += scale() * query[d] * (k.value[b * M * D + d] - key[b * M * D + d]) * (kHalf<T> ? 1 : -1);
    x.lse[b * N + i] = most + std::log(sum) + constant,
                  size.lse[b * N + i] = 4 * (1 + std::abs(most) + std::abs(constant) + spread);
    if (device.blas.tf32) size.lse[b * N + i] += spread / sums;  // operands are rounded, not the lse
    for (double& value : p) value = round(value);
    const double u = kRoundoff<E>, logit_error = rounding + sums * (1 + spread);  // in units of u
    const double loose = 1 + 2 * logit_error;
    // Where rounding may choose another key, bounds are all that can be asked.
    const double undecided = u * logit_error > 0.1 ? 1 / u : 0;
    Values out(C);
    for (int64_t j = 0; j < M; ++j)
      for (int64_t c = 0; c < C; ++c) {
        const double value = v.value[(b * M + j) * C + c];
        out[c] += round.operand(p[j]) * round.operand(value);
        size.y[(b * N + i) * C + c] += (p[j] * loose + undecided) * std::abs(value);
        x.dv[(b * M + j) * C + c] += round.operand(p[j]) * round.operand(g[c]);
        size.dv[(b * M + j) * C + c] += (p[j] * loose + undecided) * std::abs(g[c]);
        dp[j] += round.operand(g[c]) * round.operand(value), dps[j] += std::abs(g[c] * value);
      }
    for (int64_t c = 0; c < C; ++c) {
      x.y[(b * N + i) * C + c] = t.mask ? round(round(out[c]) + pool[c]) : round(out[c]);
      if (t.mask) size.y[(b * N + i) * C + c] += std::abs(pool[c]);
    }
    for (int64_t j = 0; j < M; ++j) {
      dp[j] = round(dp[j]);
      delta += p[j] * dp[j], deltas += p[j] * dps[j];
    }
    // Delta of a part is the caller's, from y and dy, of which dP has the operands rounded to TF32.
    const double apart = t.part && !std::is_same_v<E, T> ? 2 : 0;
    for (int64_t j = 0; j < M; ++j) {
      const double ds = round(scale() * round(p[j] * (dp[j] - delta)));
      const double magnitude =
          std::abs(ds) * (1 + rounding + sums * spread) +
          std::abs(scale()) * (dps[j] + deltas) * (p[j] * (apart + 4 * sums * (1 + spread)) + undecided);
      for (int64_t d = 0; d < D; ++d) {
        const int64_t at_query = (b * N + i) * D + d, at_key = (b * M + j) * D + d;
        x.dq[at_query] += round.operand(ds) * round.operand(kc[at_key]),
            size.dq[at_query] += magnitude * std::abs(key[at_key]);
        x.dk[at_key] += round.operand(ds) * round.operand(qc[at_query]),
            size.dk[at_key] += magnitude * std::abs(q.value[at_query]);
      }
    }
  }
};

// Powers of ten that a scale may have: of double and float, what logits can be; of the halves, what gradients can be.
template <class T>
constexpr int kLargestScale = std::is_same_v<T, double>   ? 200
                              : std::is_same_v<T, __half> ? 1
                                                          : 30;

template <class T>
PairwiseCase any_pairwise(Draw& draw, int64_t most, int64_t most_width, int64_t most_channels) {
  PairwiseCase t{};
  t.batches = draw.upto(1, 3);
  t.queries = draw.size(most), t.keys = draw.size(most);
  t.width = draw.size(most_width), t.channels = draw.size(most_channels);
  t.layout = any_layout(draw);
  t.whiten = draw.chance(0.7), t.mask = draw.chance(0.6), t.part = draw.chance(0.15);
  if (t.part) t.whiten = t.mask = false;
  t.needs = draw.chance(0.7) ? 15 : static_cast<unsigned>(draw.upto(0, 15));
  t.mean = draw.of({0.0, 0.0, 3.0, 10.0});
  const double large = std::pow(10.0, double(draw.upto(0, kLargestScale<T>)));
  t.logit = draw.of({1.0, 3.0, 3.0, 12.0, -3.0, large, -large});
  // All rows at once; few rows at a time; as few as steps of eight allow.
  t.limits = draw.of({ChunkLimits{}, ChunkLimits{8, int64_t(1) << 20, 8}, ChunkLimits{1 << 20, 512, 8}});
  t.most_blocks = draw.of({1, 2, 3});
  return t;
}

}  // namespace gates
