// The CUDA kernels and drivers of whitening, softmax and pooling on the host (emulator.h) against plain loops in
// double.
#include "cuda_host.h"
#include "ops/unary/unary_cuda.cuh"
#include "ops/whiten/whiten_cuda.cuh"

namespace {

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
}

}  // namespace

int main(int argc, char** argv) {
  for_turns(argc, argv, [] {
    test_type<double>();
    test_type<float>();
    test_type<__nv_bfloat16>();
    test_type<__half>();
  });
  return report();
}
