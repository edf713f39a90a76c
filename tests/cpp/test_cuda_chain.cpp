// The CUDA kernels and the drivers that launch them, on the host (emulator.h), against plain loops in double: every
// operator, every type, layouts, several chunks, small grids, both thread orders. Library products are plain loops,
// which check that their operands are what the driver promises. No GPU, no CUDA toolkit.
#include <atomic>
#include <thread>

#include "core/cuda/per_device.h"
#include "core/tf32.cpp"  // this program is one file
#include "cuda_host.h"
#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/pairwise/fused/forward.cuh"
#include "ops/unary/unary_cuda.cuh"
#include "ops/whiten/whiten_cuda.cuh"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Pairwise
// ---------------------------------------------------------------------------------------------------------------------

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
    device.tf32 = kTf32;
    pairwise_backward_cuda<T>(args, device, t.limits, t.fused.capability ? map_stages(t.fused) : 0);
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

template <class T>
void test_pairwise_cases() {
  const ChunkLimits all, few{24, int64_t(1) << 20, 8}, tiny{1 << 20, 512, 8};
  test_pairwise<T>({2, 33, 29, 8, 12, Layout::rows, true, true, all});
  test_pairwise<T>({2, 33, 29, 8, 12, Layout::rows, true, true, few});
  test_pairwise<T>({3, 40, 72, 5, 7, Layout::channel_first, true, true, few});
  test_pairwise<T>({2, 48, 64, 16, 8, Layout::channel_first, true, false, few});
  test_pairwise<T>({2, 21, 50, 3, 9, Layout::gaps, true, true, tiny});
  test_pairwise<T>({3, 40, 24, 8, 16, Layout::heads, false, true, few});
  test_pairwise<T>({5, 7, 6, 4, 3, Layout::rows, false, false, few});   // several batch elements in a chunk
  test_pairwise<T>({1, 40, 64, 48, 8, Layout::rows, true, true, few});  // wider than a chunk is high
  test_pairwise<T>({1, 1, 1, 1, 1, Layout::rows, true, true, all});
  test_pairwise<T>({2, 9, 5, 4, 0, Layout::rows, true, true, all});  // no channels
  for (unsigned needs = 0; needs < 16; ++needs)
    test_pairwise<T>({2, 19, 26, 4, 5, Layout::channel_first, true, true, few, needs});
  for (double mean : {10., 30.}) test_pairwise<T>({1, 70, 70, 16, 16, Layout::rows, true, true, few, 15, mean});
  test_pairwise<T>({1, 70, 70, 16, 16, Layout::rows, false, true, few, 15, 3});    // the query mean decides
  test_pairwise<T>({1, 40, 300, 8, 8, Layout::rows, true, true, few, 15, 0, 20});  // hot logits
  // Rows long enough that every warp has a share.
  test_pairwise<T>({1, 1100, 30, 4, 4, Layout::rows, true, true, few, 15, 3});
  test_pairwise<T>({1, 30, 1100, 4, 4, Layout::rows, true, true, few, 15, 3});
}

// Every tile of the fused path, tails of every kind, slices, splits; and no ldmatrix row waits for another's bank.
template <class E>
void test_fused_cases() {
  using T = ResultOf<E>;
  const auto test_pairwise = [](const Case& t) { ::test_pairwise<T, E>(t); };
  emulator::machine().statistics = {};
  const ChunkLimits all, few{136, int64_t(1) << 20, 8};
  const Gpu a100{80, 1, shared_bytes_of(80)}, ada{89, 1, shared_bytes_of(89)}, many{89, 64, shared_bytes_of(89)};
  for (const Gpu& gpu : {a100, ada}) {
    test_pairwise({2, 33, 29, 8, 12, Layout::rows, true, true, all, 15, 0, 3, gpu});
    test_pairwise({1, 140, 130, 72, 64, Layout::rows, true, true, few, 15, 10, 3, gpu});
    test_pairwise({2, 136, 72, 40, 48, Layout::channel_first, true, true, few, 15, 3, 3, gpu});
    test_pairwise({2, 21, 67, 3, 9, Layout::gaps, false, true, all, 15, 3, 3, gpu});
    test_pairwise({3, 40, 24, 8, 16, Layout::heads, true, false, all, 15, 0, 20, gpu});
    // The widest tiles of floats take more than ada has.
    const int64_t width = std::is_same_v<E, Tf32> && gpu.capability == 89 ? 192 : 256;
    test_pairwise({1, 65, 65, width, 256, Layout::rows, true, true, all, 15, 0, 3, gpu});
    test_pairwise({1, 30, 66, 16, 520, Layout::channel_first, true, true, all, 15, 3, 3, gpu});  // two slices
    test_pairwise({1, 1, 1, 1, 1, Layout::rows, true, true, all, 15, 0, 3, gpu});
  }
  test_pairwise({1, 40, 900, 8, 8, Layout::rows, true, true, all, 15, 3, 3, many});
  test_pairwise({1, 20, 600, 8, 600, Layout::channel_first, true, true, all, 15, 3, 20, many});  // slices and splits
  for (unsigned needs = 0; needs < 16; ++needs)
    test_pairwise({1, 19, 26, 4, 5, Layout::channel_first, true, true, all, needs, 0, 3, a100});
  const auto& seen = emulator::machine().statistics;
  CHECK(seen.matrix_rows > 0 && seen.matrix_conflicts == 0, "%ld of %ld groups of rows meet in a bank",
        long(seen.matrix_conflicts), long(seen.matrix_rows));
}

// ---------------------------------------------------------------------------------------------------------------------
// The other operators
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void test_whiten() {
  for (Layout layout : {Layout::rows, Layout::channel_first, Layout::gaps, Layout::heads}) {
    Tensor<T> x(3, 1100, 37, layout, 30), y(3, 1100, 37, layout);
    const WhitenArgs args{x.view, y.view, kType<T>, 3, 1100, 37};
    HostDevice device;
    whiten_cuda<T>(args, device);
    y.read();
    const double error = relative(y.value, centred(x.value, 3, 1100, 37));
    CHECK(error <= kBound<T>, "whiten: error %.2g, layout %d", error, int(layout));
  }
}

template <class T>
void test_softmax() {
  for (Layout layout : {Layout::rows, Layout::channel_first, Layout::gaps}) {
    const int64_t rows = 5, columns = 1500;
    Tensor<T> x(rows, columns, 1, layout, 8, 4), p(rows, columns, 1, layout), dp(rows, columns, 1, layout),
        dx(rows, columns, 1, layout);
    SoftmaxArgs args{x.view, {}, p.view, kType<T>, rows, columns};
    HostDevice device;
    softmax_cuda<T>(args, device);
    p.read();
    Values want, want_dx;
    for (int64_t r = 0; r < rows; ++r) {
      const Values row = softmax(x.value.data() + r * columns, columns);
      want.insert(want.end(), row.begin(), row.end());
      double dot = 0;
      for (int64_t j = 0; j < columns; ++j) dot += p.value[r * columns + j] * dp.value[r * columns + j];
      for (int64_t j = 0; j < columns; ++j)
        want_dx.push_back(p.value[r * columns + j] * (dp.value[r * columns + j] - dot));
    }
    const double error = relative(p.value, want);
    CHECK(error <= kBound<T>, "softmax: error %.2g", error);
    args.input = dp.view, args.probability = p.view, args.output = dx.view;
    softmax_backward_cuda<T>(args, device);
    dx.read();
    const double error_dx = relative(dx.value, want_dx);
    CHECK(error_dx <= kBound<T>, "softmax backward: error %.2g", error_dx);
  }
}

template <class T>
void test_unary() {
  using A = AccOf<T>;
  for (Layout layout : {Layout::rows, Layout::channel_first, Layout::gaps}) {
    const int64_t B = 2, M = 700, C = 11;
    Tensor<T> m(B, M, 1, layout), v(B, M, C, layout, 3), dm(B, M, 1, layout), dv(B, M, C, layout);
    std::vector<A> pooled(B * C), lse(B), grad(B * C);
    for (A& g : grad) g = A(std::normal_distribution<double>()(generator));
    UnaryArgs args{};
    args.mask = m.view, args.value = v.view, args.pooled = pooled.data(), args.lse = lse.data();
    args.dtype = kType<T>, args.batches = B, args.keys = M, args.channels = C;
    HostDevice device;
    unary_forward_cuda<T>(args, device);
    args.grad_pooled = grad.data(), args.grad_mask = dm.view, args.grad_value = dv.view;
    unary_backward_cuda<T>(args, device);
    dm.read(), dv.read();
    Values want(B * C), want_dm(B * M), want_dv(B * M * C);
    for (int64_t b = 0; b < B; ++b) {
      const Values u = softmax(m.value.data() + b * M, M);
      for (int64_t j = 0; j < M; ++j)
        for (int64_t c = 0; c < C; ++c) want[b * C + c] += u[j] * v.value[(b * M + j) * C + c];
      for (int64_t j = 0; j < M; ++j)
        for (int64_t c = 0; c < C; ++c) {
          want_dv[(b * M + j) * C + c] = u[j] * grad[b * C + c];
          want_dm[b * M + j] += u[j] * grad[b * C + c] * (v.value[(b * M + j) * C + c] - want[b * C + c]);
        }
    }
    const double error = relative(Values(pooled.begin(), pooled.end()), want);
    CHECK(error <= kBound<AccOf<T>>, "pooling: error %.2g", error);
    CHECK(relative(dm.value, want_dm) <= kBound<T>, "dm: error %.2g", relative(dm.value, want_dm));
    CHECK(relative(dv.value, want_dv) <= kBound<T>, "dv: error %.2g", relative(dv.value, want_dv));
  }
}

template <class T>
void test_type() {
  test_whiten<T>();
  test_softmax<T>();
  test_unary<T>();
  test_pairwise_cases<T>();
  if constexpr (!std::is_same_v<T, double>) test_fused_cases<FusedOf<T>>();
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared pieces
// ---------------------------------------------------------------------------------------------------------------------

void test_online_softmax() {
  OnlineSoftmax<double> left, right, none;
  const double a[3] = {1, 500, -3}, b[3] = {499, -kInfinity, 2};
  left.add(a);
  right.add(b);
  left.merge(right);
  left.merge(none);
  const double want = 500 + std::log(1 + std::exp(-1.0));
  CHECK(std::abs(left.lse() - want) < 1e-12 * want, "lse %.17g, want %.17g", left.lse(), want);
  CHECK(none.lse() == -kInfinity && none.sum == 0, "nothing added");
  for (double bad : {kInfinity, std::nan("")}) {
    OnlineSoftmax<double> state;
    const double x[2] = {bad, 1};
    state.add(x);
    state.merge(right);
    CHECK(std::isnan(state.sum), "sum %g after %g", state.sum, bad);
  }
}

void test_batch() {
  // (2, 3, 4) with strides (100, 7, 2), then with neighbours that merge, then one that repeats.
  const int64_t sizes[3] = {2, 3, 4}, strides[3][3] = {{100, 7, 2}, {12, 4, 1}, {0, 5, 0}};
  const int dims[3] = {3, 1, 3};
  for (int t = 0; t < 3; ++t) {
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < sizes[0]; ++i)
      for (int64_t j = 0; j < sizes[1]; ++j)
        for (int64_t l = 0; l < sizes[2]; ++l)
          offsets.push_back(i * strides[t][0] + j * strides[t][1] + l * strides[t][2]);
    offsets.shrink_to_fit();  // a sanitizer then sees a read beyond the last one
    Batch batch;
    CHECK(batch_of_offsets(offsets.data(), offsets.size(), batch) && batch.dims == dims[t], "%d dims", batch.dims);
    for (size_t i = 0; i < offsets.size(); ++i) CHECK(batch.offset(i) == offsets[i], "offset %zu of case %d", i, t);
  }
  std::vector<int64_t> offsets{0};  // nine dimensions that do not merge
  for (int d = 0, stride = 1; d < 9; ++d, stride *= 3)
    for (size_t i = 0, n = offsets.size(); i < n; ++i) offsets.push_back(offsets[i] + stride);
  Batch batch;
  CHECK(!batch_of_offsets(offsets.data(), offsets.size(), batch), "nine dimensions");
}

void test_chunks() {
  for (int64_t batches : {1, 3, 64})
    for (int64_t rows : {1, 100, 4096, 9409, 50000})
      for (int64_t columns : {1, 9409, 1 << 20}) {
        const ChunkLimits limits;
        const Chunks chunks(batches, rows, columns, 4, limits);
        int64_t seen = 0;
        chunks.for_each(batches, rows, [&](int64_t, int64_t group, int64_t first, int64_t count) {
          seen += group * count;
          CHECK(first % limits.step == 0, "a chunk starts at %ld", long(first));
          const bool small = group * count * pitch_of(columns) * 4 <= limits.bytes;
          CHECK(small || (group == 1 && count <= limits.step), "a chunk of %ld x %ld rows", long(group), long(count));
        });
        CHECK(seen == batches * rows, "%ld of %ld rows", long(seen), long(batches * rows));
      }
}

// Not a number and infinity come out where the definition has them.
template <class T>
void test_special() {
  const auto outputs = [](int where, double bad) {
    const int64_t N = 12, D = 8, C = 8;
    Tensor<T> q(1, N, D, Layout::rows), k(1, N, D, Layout::rows), v(1, N, C, Layout::rows), y(1, N, C, Layout::rows);
    (where == 0 ? q : where == 1 ? k : v).set(0, 5, 3, bad);
    std::vector<AccOf<T>> stats(2 * N);
    PairwiseArgs args{};
    args.query = q.view, args.key = k.view, args.value = v.view, args.output = y.view, args.stats = stats.data();
    args.dtype = kType<T>, args.batches = 1, args.queries = args.keys = N, args.width = D, args.channels = C;
    args.scale = 0.1, args.whiten = true;
    HostDevice device;
    pairwise_forward_cuda<T>(args, device);
    y.read();
    return y.value;
  };
  for (double bad : {kInfinity, -kInfinity, std::nan("")}) {
    for (int where : {0, 1})
      for (double x : outputs(where, bad)) CHECK(std::isnan(x), "got %g for %g in operand %d", x, bad, where);
    const Values y = outputs(2, bad);
    for (size_t i = 0; i < y.size(); ++i) {
      const bool same = i % 8 != 3 ? std::isfinite(y[i]) : std::isnan(bad) ? std::isnan(y[i]) : y[i] == bad;
      CHECK(same, "got %g in channel %zu for %g in the values", y[i], i % 8, bad);
    }
  }
}

// One search per device, whichever threads ask; one that fails is tried again.
void test_per_device() {
  PerDevice<int> known;
  std::atomic<int> searches{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 100; ++i) {
        const int value = known.get(t % 2, [&] { return ++searches, 10 + t % 2; });
        CHECK(value == 10 + t % 2, "device %d has %d", t % 2, value);
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(searches == 2, "%d searches for two devices", searches.load());
  try {
    known.get(2, []() -> int { throw std::runtime_error("no device"); });
    CHECK(false, "an error is lost");
  } catch (const std::runtime_error&) {
  }
  CHECK(known.get(2, [] { return 5; }) == 5, "no second search");
}

void test_tf32_query() {
  CHECK(!tf32_allowed(), "allowed by nobody");
  set_tf32_query([] { return true; });
  CHECK(tf32_allowed(), "the answer is lost");
  set_tf32_query(nullptr);
}

void test_half_types() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const __half h{static_cast<uint16_t>(bits)};
    const __nv_bfloat16 b{static_cast<uint16_t>(bits)};
    const float x = __half2float(h), z = __bfloat162float(b);
    CHECK(x != x || __float2half_rn(x).bits == bits, "float16 %04x", bits);
    CHECK(z != z || __float2bfloat16_rn(z).bits == bits, "bfloat16 %04x", bits);
  }
  CHECK(__float2half_rn(65519).bits == 0x7bff && __float2half_rn(65520).bits == 0x7c00, "rounding at the top");
  CHECK(__float2half_rn(1 + 1 / 2048.0f).bits == 0x3c00 && __float2half_rn(1 + 3 / 2048.0f).bits == 0x3c02, "ties");
}

}  // namespace

// Arguments: the orders of turns to test (ascending, descending, random), by default all.
int main(int argc, char** argv) {
  const std::pair<const char*, emulator::Turns> every_turns[] = {{"ascending", emulator::Turns::ascending},
                                                                 {"descending", emulator::Turns::descending},
                                                                 {"random", emulator::Turns::random}};
  test_half_types();
  test_per_device();
  test_tf32_query();
  test_online_softmax();
  test_batch();
  test_chunks();
  for (const auto& [name, turns] : every_turns) {
    if (argc > 1 && std::find(argv + 1, argv + argc, std::string(name)) == argv + argc) continue;
    emulator::machine().options.turns = turns;
    generator.seed(1);
    test_type<double>();
    test_type<float>();
    test_type<__nv_bfloat16>();
    test_type<__half>();
    test_special<double>();
    test_special<float>();
    test_special<__nv_bfloat16>();
    test_special<__half>();
  }
  return report();
}
