// A call of pairwise attention on the host, forward and backward, by the chain or by the fused kernels, against the
// definition in double.
#pragma once

#include "cuda_host.h"
#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/pairwise/fused/forward.cuh"
#include "ops/unary/unary_cuda.cuh"

struct Case {
  int64_t batches, queries, keys, width, channels;
  Layout layout;
  bool whiten, mask;
  ChunkLimits limits;
  unsigned needs = 15;  // bits: query, key, value, mask
  double mean = 0, logit = 3;
  Gpu fused{};  // where the call takes the fused path; capability = 0: the chain
};

// E is what the fused path multiplies; the results are held to what its rounding leaves.
template <class T, class E = T>
void test_pairwise(const Case& t) {
  using A = AccOf<T>;
  constexpr bool kTf32 = std::is_same_v<E, Tf32>;
  const int64_t B = t.batches, N = t.queries, M = t.keys, D = t.width, C = t.channels;
  Tensor<T> q(B, N, D, t.layout, t.mean), k(B, M, D, t.layout, t.mean), v(B, M, C, t.layout, t.mean),
      dy(B, N, C, t.layout), m(B, M, 1, t.layout), y(B, N, C, t.layout), rest(B, N, C, Layout::rows);
  Tensor<T> dq(B, N, D, t.layout), dk(B, M, D, t.layout), dv(B, M, C, t.layout), dm(B, M, 1, t.layout);
  const double scale = t.logit / std::sqrt(double(D));
  std::vector<A> stats(2 * B * N), pooled(B * C), mask_lse(B);

  PairwiseArgs args{};
  args.query = q.view, args.key = k.view, args.value = v.view, args.output = y.view;
  if (kHalf<T>) args.residual = rest.view;
  args.stats = stats.data();
  args.dtype = kType<T>;
  args.batches = B, args.queries = N, args.keys = M, args.width = D, args.channels = C;
  args.scale = scale;
  args.whiten = t.whiten;
  if (t.mask) {
    UnaryArgs unary{};
    unary.mask = m.view, unary.value = v.view, unary.pooled = pooled.data(), unary.lse = mask_lse.data();
    unary.dtype = kType<T>;
    unary.batches = B, unary.keys = M, unary.channels = C;
    HostDevice device;
    unary_forward_cuda<T>(unary, device);
    args.pooled = pooled.data(), args.mask_lse = mask_lse.data();
  }
  {
    HostDevice device;
    if constexpr (kHalf<T> || kTf32) {
      if (t.fused.capability) {
        emulator::machine().options.max_shared_bytes = t.fused.shared_bytes;
        PairwiseShape shape = shape_of<T>(args);
        shape.tf32 = kTf32;
        const PairwisePlan plan = plan_pairwise(shape, t.fused, CudaPath::fused, false);
        pairwise_fused_forward_cuda<E>(args, device, plan.forward);
      }
    }
    if (!t.fused.capability) pairwise_forward_cuda<T>(args, device, t.limits);
  }
  args.grad_output = dy.view;
  if (t.mask) args.mask = m.view;
  if (t.needs & 1) args.grad_query = dq.view;
  if (t.needs & 2) args.grad_key = dk.view;
  if (t.needs & 4) args.grad_value = dv.view;
  if (t.mask && t.needs & 8) args.grad_mask = dm.view;
  {
    HostDevice device;
    if (t.fused.capability) device.on.shared_bytes = t.fused.shared_bytes;
    device.blas.tf32 = kTf32;
    device.whole_lines = !t.fused.capability || !kHalf<T>;  // the backward of float is the chain's
    pairwise_backward_cuda<T>(args, device, t.limits,
                              {t.fused.capability ? BackwardMap::fused : BackwardMap::products});
  }
  for (Tensor<T>* x : {&y, &dq, &dk, &dv, &dm}) x->read();

  // The definition, in double.
  const Values qc = t.whiten ? centred(q.value, B, N, D) : q.value, kc = t.whiten ? centred(k.value, B, M, D) : k.value;
  Values want_y(B * N * C), want_dq(B * N * D), want_dk(B * M * D), want_dv(B * M * C), want_dm(B * M);
  for (int64_t b = 0; b < B; ++b) {
    const Values u = t.mask ? softmax(m.value.data() + b * M, M) : Values(M);
    Values pool(C), grad_sum(C);
    for (int64_t j = 0; j < M; ++j)
      for (int64_t c = 0; c < C; ++c) pool[c] += u[j] * v.value[(b * M + j) * C + c];
    for (int64_t i = 0; i < N; ++i) {
      Values s(M), dp(M);
      const double* g = dy.value.data() + (b * N + i) * C;
      for (int64_t j = 0; j < M; ++j)
        for (int64_t d = 0; d < D; ++d) s[j] += scale * qc[(b * N + i) * D + d] * kc[(b * M + j) * D + d];
      const Values p = softmax(s.data(), M);
      double delta = 0;
      for (int64_t c = 0; c < C; ++c) {
        grad_sum[c] += g[c];
        want_y[(b * N + i) * C + c] = pool[c];
      }
      for (int64_t j = 0; j < M; ++j) {
        for (int64_t c = 0; c < C; ++c) {
          want_y[(b * N + i) * C + c] += p[j] * v.value[(b * M + j) * C + c];
          want_dv[(b * M + j) * C + c] += p[j] * g[c];
          dp[j] += g[c] * v.value[(b * M + j) * C + c];
        }
        delta += p[j] * dp[j];
      }
      for (int64_t j = 0; j < M; ++j)
        for (int64_t d = 0; d < D; ++d) {
          const double ds = scale * p[j] * (dp[j] - delta);
          want_dq[(b * N + i) * D + d] += ds * kc[(b * M + j) * D + d];
          want_dk[(b * M + j) * D + d] += ds * qc[(b * N + i) * D + d];
        }
    }
    for (int64_t j = 0; j < M; ++j)
      for (int64_t c = 0; c < C; ++c) {
        want_dv[(b * M + j) * C + c] += u[j] * grad_sum[c];
        want_dm[b * M + j] += u[j] * grad_sum[c] * (v.value[(b * M + j) * C + c] - pool[c]);
      }
  }
  if (t.whiten) want_dq = centred(want_dq, B, N, D);

  // TF32 has the 11 bits of float16, but inputs that are not rounded to them yet: logits are off by half a unit in the
  // last place of their size, and P by as much.
  const double bound = kTf32 ? kBound<__half> + t.logit * 0x1p-12 : kBound<T>;
  const auto check = [&](const char* name, const Values& got, const Values& want, double factor) {
    const double error = relative(got, want);
    CHECK(error <= bound * factor,
          "%s: error %.2g, dtype %d, B %ld N %ld M %ld D %ld C %ld layout %d whiten %d mask %d needs %u mean %g", name,
          error, int(kType<T>), long(B), long(N), long(M), long(D), long(C), int(t.layout), t.whiten, t.mask, t.needs,
          t.mean);
  };
  check("y", y.value, want_y, 1);
  if (t.needs & 1) check("dq", dq.value, want_dq, 2);
  if (t.needs & 2) check("dk", dk.value, want_dk, 2);
  if (t.needs & 4) check("dv", dv.value, want_dv, 1);
  if (t.mask && t.needs & 8) check("dm", dm.value, want_dm, 2);
}
