// What the CUDA operators share on the host's side: memory, products as BLAS takes them, batches, what is known of a
// device, statistics of a softmax, 16-bit types.
#include <atomic>
#include <thread>

// clang-format off
#include "cuda_host.h"
// clang-format on
#include "core/cuda/per_device.h"
#include "core/cuda/workspace.h"
#include "core/tf32.cpp"  // this program is one file

namespace {

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

// The pieces are those that were counted, aligned, apart, and no more than that.
void test_workspace() {
  std::vector<char*> pieces;
  const auto take = [&](auto& from) {
    pieces = {reinterpret_cast<char*>(from.template allocate<float>(3)),
              reinterpret_cast<char*>(from.template allocate<double>(0)),
              reinterpret_cast<char*>(from.template allocate<char>(kPieceAlignment)),
              reinterpret_cast<char*>(from.template allocate<double>(1))};
    from.launch(nullptr, 1);
  };
  WorkspaceSize size(Gpu{90, 132, 1});
  take(size);
  CHECK(size.gpu().multiprocessors == 132, "another GPU");
  CHECK(size.bytes() == 3 * kPieceAlignment, "%ld bytes", long(size.bytes()));
  for (int i : {0, 2, 3})
    CHECK(pieces[i] && reinterpret_cast<uintptr_t>(pieces[i]) % kPieceAlignment == 0, "piece %d", i);
  CHECK(!pieces[1], "an empty piece has an address");

  alignas(kPieceAlignment) static char memory[3 * kPieceAlignment];
  Pieces real(memory, sizeof(memory));
  CHECK(real.take<float>(3) == static_cast<void*>(memory) && real.take<double>(0) == nullptr, "first pieces");
  CHECK(real.take<char>(kPieceAlignment) == memory + kPieceAlignment, "second piece");
  CHECK(real.take<double>(1) == static_cast<void*>(memory + 2 * kPieceAlignment), "third piece");
  try {
    real.take<char>(1);
    CHECK(false, "a piece beyond the end");
  } catch (const std::logic_error&) {
  }
}

// A limit is raised where it must be, and not again.
void test_limits() {
  Limits<int> limits;
  std::vector<int64_t> raised;
  for (const auto& [key, value] : {std::pair{1, 5}, {1, 4}, {1, 5}, {2, 4}, {1, 6}, {2, 4}})
    limits.at_least(key, value, [&] { raised.push_back(10 * key + value); });
  CHECK((raised == std::vector<int64_t>{15, 24, 16}), "%zu raised", raised.size());
  try {
    limits.at_least(3, 1, [] { throw std::runtime_error("refused"); });
    CHECK(false, "an error is lost");
  } catch (const std::runtime_error&) {
  }
  limits.at_least(3, 1, [&] { raised.push_back(31); });
  CHECK(raised.back() == 31, "a refused limit counts as raised");
}

// Every order of operands and results, a batch of three or a batch of one that starts later, added or not.
template <class T, class Out>
void test_gemm() {
  constexpr int64_t B = 3, M = 8, N = 16, K = 24;
  std::normal_distribution<double> normal;
  for (int orders = 0; orders < 8; ++orders)
    for (int64_t first : {0, 2})
      for (bool accumulate : {false, true}) {
        const auto matrix = [&](auto& data, bool transposed, int64_t rows, int64_t columns) {
          using Element = typename std::decay_t<decltype(data)>::value_type;
          const int64_t outer = transposed ? columns : rows, pitch = (transposed ? rows : columns) + kPitch;
          data.resize(B * outer * pitch);
          for (Element& x : data) x = rounded<Element>(static_cast<AccOf<Element>>(normal(generator)));
          const auto result = dense(data.data(), B, outer, pitch);
          return (transposed ? result.transposed() : result).from(first, 0);
        };
        std::vector<T> left, right;
        std::vector<Out> result;
        const auto a = matrix(left, orders & 1, M, K), b = matrix(right, orders & 2, K, N);
        const auto c = matrix(result, orders & 4, M, N);
        Values want, got;
        for (int64_t e = 0; e < B - first; ++e)
          for (int64_t i = 0; i < M; ++i)
            for (int64_t j = 0; j < N; ++j) {
              double sum = accumulate ? *c.element(e, i, j) : 0;
              for (int64_t l = 0; l < K; ++l) sum += double(wide(*a.element(e, i, l))) * wide(*b.element(e, l, j));
              want.push_back(sum);
            }
        HostDevice device;
        device.product(a.read(), b.read(), c, B - first, M, N, K, accumulate);
        for (int64_t e = 0; e < B - first; ++e)
          for (int64_t i = 0; i < M; ++i)
            for (int64_t j = 0; j < N; ++j) got.push_back(*c.element(e, i, j));
        CHECK(relative(got, want) < kBound<Out> / 10, "dtype %d, orders %d, from %ld, accumulate %d: error %.2g",
              int(kType<T>), orders, long(first), accumulate, relative(got, want));
      }
}

// What cuBLAS refuses is an error.
void test_refused_product() {
  float x[64] = {};
  const Matrix<const float> rows{x, single_batch(1, 0), 4, 1};  // four apart, eight of them long
  try {
    cublasContext context;
    cublas_gemm(&context, gemm_of(rows, rows, Matrix<float>{x, single_batch(1, 0), 8, 1}, 1, 8, 8, 8), false);
    CHECK(false, "a refused product counts as done");
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()).find("not valid") != std::string::npos, "%s", error.what());
  }
}

}  // namespace

int main() {
  test_half_types();
  test_per_device();
  test_limits();
  test_tf32_query();
  test_online_softmax();
  test_batch();
  test_workspace();
  test_gemm<double, double>();
  test_gemm<float, float>();
  test_gemm<__nv_bfloat16, float>();
  test_gemm<__half, float>();
  test_refused_product();
  return report();
}
