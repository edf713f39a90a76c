// Pairwise attention by the chain, kernels and drivers, on the host (emulator.h) against plain loops in double: every
// type, layouts, several chunks, rows in shared memory and not, both thread orders. Library products are plain loops,
// which check that their operands are what the driver promises. No GPU, no CUDA toolkit.
#include "pairwise_host.h"

namespace {

template <class T>
void test_cases() {
  const ChunkLimits all, few{8, int64_t(1) << 20, 8}, tiny{1 << 20, 512, 8};
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
  for (const Layout layout : {Layout::rows, Layout::channel_first})  // and extents of whole lines
    test_pairwise<T>({1, 8, 16, 8, 0, layout, true, true, all});
  for (unsigned needs = 0; needs < 16; ++needs)
    test_pairwise<T>({2, 19, 26, 4, 5, Layout::channel_first, true, true, few, needs});
  for (double mean : {10., 30.}) test_pairwise<T>({1, 70, 70, 16, 16, Layout::rows, true, true, few, 15, mean});
  test_pairwise<T>({1, 70, 70, 16, 16, Layout::rows, false, true, few, 15, 3});    // the query mean decides
  test_pairwise<T>({1, 40, 300, 8, 8, Layout::rows, true, true, few, 15, 0, 20});  // hot logits
  // Rows long enough that every warp has a share.
  test_pairwise<T>({1, 1100, 30, 4, 4, Layout::rows, true, true, few, 15, 3});
  test_pairwise<T>({1, 30, 1100, 4, 4, Layout::rows, true, true, few, 15, 3});
}

// A device that knows the most dynamic shared memory that was asked for.
struct RecordingDevice : HostDevice {
  int64_t most_shared_bytes = 0;

  using HostDevice::launch;
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Tasks& tasks, const Arguments&... arguments) {
    most_shared_bytes = std::max(most_shared_bytes, tasks.shared_bytes);
    HostDevice::launch(kernel, tasks, arguments...);
  }
};

// The bits of all results do not depend on how much of a row stays in shared memory.
template <class T>
void test_kept_rows() {
  const int64_t B = 2, N = 37, M = 1300, D = 8, C = 12;
  Tensor<T> q(B, N, D, Layout::rows), k(B, M, D, Layout::rows), v(B, M, C, Layout::rows), dy(B, N, C, Layout::rows);
  const auto results = [&](int shared_bytes) {
    Tensor<T> y(B, N, C, Layout::rows), rest(B, N, C, Layout::rows), dq(B, N, D, Layout::rows),
        dk(B, M, D, Layout::rows), dv(B, M, C, Layout::rows);
    std::vector<AccOf<T>> stats(2 * B * N);
    PairwiseArgs args{};
    args.query = q.view, args.key = k.view, args.value = v.view, args.output = y.view, args.stats = stats.data();
    if (kHalf<T>) args.residual = rest.view;
    args.dtype = kType<T>, args.batches = B, args.queries = N, args.keys = M, args.width = D, args.channels = C;
    args.scale = 0.4, args.whiten = true;
    RecordingDevice device;
    device.on.shared_bytes = shared_bytes;
    pairwise_forward_cuda<T>(args, device);
    args.grad_output = dy.view, args.grad_query = dq.view, args.grad_key = dk.view, args.grad_value = dv.view;
    pairwise_backward_cuda<T>(args, device);
    Values all(stats.begin(), stats.end());
    for (Tensor<T>* x : {&y, &dq, &dk, &dv}) x->read(), all.insert(all.end(), x->value.begin(), x->value.end());
    return std::pair{all, device.most_shared_bytes};
  };
  const int row = pitch_of(M) * sizeof(AccOf<T>);
  const auto none = results(0), one = results(2 * (row + kReservedBytes)),
             both = results(2 * (2 * row + kReservedBytes));
  CHECK(none.first == one.first && none.first == both.first, "other bits, dtype %d", int(kType<T>));
  CHECK(none.second == 0 && one.second == row && both.second == (kHalf<T> ? row : 2 * row),
        "%ld, %ld and %ld bytes of rows of %d stay", long(none.second), long(one.second), long(both.second), row);
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

// A key whose logits are all -inf has no part in anything, and its infinity does not reach the others by the zeros that
// fill up the extents of products. As a part, since centred queries of float have both signs.
template <class T>
void test_masked_key() {
  const int64_t N = 12, D = 8, C = 9, masked = 5;
  Tensor<T> q(1, N, D, Layout::rows), k(1, N, D, Layout::rows), v(1, N, C, Layout::rows), y(1, N, C, Layout::rows),
      dy(1, N, C, Layout::rows), dv(1, N, C, Layout::rows);
  for (int64_t i = 0; i < N; ++i) q.set(0, i, 3, 1 + 0.1 * double(i));
  k.set(0, masked, 3, -kInfinity);
  std::vector<AccOf<T>> stats(2 * N);
  PairwiseArgs args{};
  args.query = q.view, args.key = k.view, args.value = v.view, args.output = y.view, args.stats = stats.data();
  args.dtype = kType<T>, args.batches = 1, args.queries = args.keys = N, args.width = D, args.channels = C;
  args.scale = 0.5, args.part = true;
  HostDevice device;
  pairwise_forward_cuda<T>(args, device);
  const std::vector<AccOf<T>> delta(N);
  args.grad_output = dy.view, args.grad_value = dv.view, args.delta = delta.data();
  pairwise_backward_cuda<T>(args, device);
  y.read(), dv.read();
  for (double x : y.value) CHECK(std::isfinite(x), "y has %g", x);
  for (int64_t j = 0; j < N; ++j)
    for (int64_t c = 0; c < C; ++c) {
      const double x = dv.value[j * C + c];
      CHECK(std::isfinite(x) && (x == 0) == (j == masked), "dv of key %ld is %g", long(j), x);
    }
}

}  // namespace

int main(int argc, char** argv) {
  for_turns(argc, argv, [] {
    test_cases<double>();
    test_cases<float>();
    test_cases<__nv_bfloat16>();
    test_cases<__half>();
    test_kept_rows<double>();
    test_kept_rows<float>();
    test_kept_rows<__nv_bfloat16>();
    test_kept_rows<__half>();
    test_masked_key<double>();
    test_masked_key<float>();
    test_masked_key<__nv_bfloat16>();
    test_masked_key<__half>();
    test_special<double>();
    test_special<float>();
    test_special<__nv_bfloat16>();
    test_special<__half>();
  });
  return report();
}
