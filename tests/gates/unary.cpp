// Random cases of row softmax and of unary pooling, forward and backward (ops/unary/unary_cuda.cuh).
#include "gate.h"
#include "ops/unary/unary_cuda.cuh"

namespace {

template <class T>
std::string describe(int64_t B, int64_t N, int64_t C, Layout layout) {
  return "B " + std::to_string(B) + " N " + std::to_string(N) + " C " + std::to_string(C) + " layout " +
         std::to_string(int(layout)) + " dtype " + std::to_string(int(kType<T>));
}

template <class T>
void test_softmax(gates::Draw& draw) {
  // Beyond kThreads * kQuad columns a thread adds to its state more than once.
  const int64_t R = draw.upto(1, 9), N = draw.chance(0.2) ? draw.upto(kThreads * kQuad + 1, 3000) : draw.size(1500);
  const Layout layout = gates::any_layout(draw);
  const double deviation = draw.of({1.0, 4.0, 20.0}), mean = draw.of({0.0, 30.0});
  Tensor<T> x(R, N, 1, layout, mean, deviation), p(R, N, 1, layout), dp(R, N, 1, layout), dx(R, N, 1, layout);
  SoftmaxArgs args{x.view, {}, p.view, kType<T>, R, N};
  HostDevice device;
  device.most_blocks = draw.of({1, 2, 3});
  softmax_cuda<T>(args, device);
  p.read();
  args.input = dp.view, args.probability = p.view, args.output = dx.view;
  softmax_backward_cuda<T>(args, device);
  dx.read();

  Values want, eager, size, want_dx, eager_dx, size_dx;
  const gates::Eager<T> round;
  const double sums = gates::kSumRoundoff<T> / gates::kRoundoff<T>;
  for (int64_t r = 0; r < R; ++r) {
    const double *in = x.value.data() + r * N, *out = p.value.data() + r * N, *grad = dp.value.data() + r * N;
    double largest = 0, dot = 0, dots = 0;
    for (int64_t j = 0; j < N; ++j) {
      largest = std::max(largest, std::abs(in[j]));
      dot += out[j] * grad[j], dots += std::abs(out[j] * grad[j]);
    }
    for (double value : softmax(in, N)) {
      want.push_back(value), eager.push_back(round(value));
      size.push_back(value * (1 + sums * (2 * largest + 8)));  // the argument of exp is rounded at its size
    }
    for (int64_t j = 0; j < N; ++j) {
      want_dx.push_back(out[j] * (grad[j] - dot)), eager_dx.push_back(round(out[j] * (grad[j] - round(dot))));
      size_dx.push_back(out[j] * (std::abs(grad[j]) + dots * (1 + 4 * sums)));
    }
  }
  const std::string what = describe<T>(R, N, 1, layout);
  // Subnormal float16 results are rounded at a fixed step.
  for (double& value : size) value += std::is_same_v<T, __half> ? 0x1p-14 : 0;
  for (double& value : size_dx) value += std::is_same_v<T, __half> ? 0x1p-14 : 0;
  gates::close("softmax", p.value, want, eager, size, 2, gates::kRoundoff<T>, what);
  gates::close("its gradient", dx.value, want_dx, eager_dx, size_dx, 3, gates::kRoundoff<T>, what);
}

template <class T>
void test_pooling(gates::Draw& draw) {
  using A = AccOf<T>;
  const int64_t B = draw.upto(1, 4), M = draw.size(1100), C = draw.size(70);
  const Layout layout = gates::any_layout(draw);
  Tensor<T> m(B, M, 1, layout, 0, draw.of({1.0, 8.0})), v(B, M, C, layout, draw.of({0.0, 3.0, 30.0})),
      dm(B, M, 1, layout), dv(B, M, C, layout);
  std::vector<A> pooled(B * C), lse(B), grad(B * C);
  for (A& g : grad) g = A(std::normal_distribution<double>()(generator));
  UnaryArgs args{};
  args.mask = m.view, args.value = v.view, args.pooled = pooled.data(), args.lse = lse.data();
  args.dtype = kType<T>, args.batches = B, args.keys = M, args.channels = C;
  HostDevice device;
  device.most_blocks = draw.of({1, 2, 3});
  unary_forward_cuda<T>(args, device);
  args.grad_pooled = grad.data();
  if (const bool mask_only = draw.chance(0.1); !mask_only) args.grad_value = dv.view;
  args.grad_mask = dm.view;
  unary_backward_cuda<T>(args, device);
  dm.read(), dv.read();

  struct Result {
    Values pooled, dm, dv, lse;
  };
  Result size{Values(B * C), Values(B * M), Values(B * M * C), Values(B)};
  const auto definition = [&](auto round) {
    Result x{Values(B * C), Values(B * M), Values(B * M * C), Values(B)};
    for (int64_t b = 0; b < B; ++b) {
      const double* logits = m.value.data() + b * M;
      Values u = softmax(logits, M);
      const double most = *std::max_element(logits, logits + M);
      double sum = 0, mean = 0, means = 0;
      for (int64_t j = 0; j < M; ++j) sum += std::exp(logits[j] - most);
      x.lse[b] = most + std::log(sum), size.lse[b] = 8 * (std::abs(most) + 1);
      for (double& value : u) value = round(value);
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t j = 0; j < M; ++j) {
          const double term = u[j] * v.value[(b * M + j) * C + c];
          x.pooled[b * C + c] += term, size.pooled[b * C + c] += 16 * std::abs(term);
        }
        x.pooled[b * C + c] = round(x.pooled[b * C + c]);
      }
      Values du(M), dus(M);
      for (int64_t j = 0; j < M; ++j) {
        for (int64_t c = 0; c < C; ++c) {
          const double g = grad[b * C + c], term = g * v.value[(b * M + j) * C + c];
          x.dv[(b * M + j) * C + c] = round(u[j] * g), size.dv[(b * M + j) * C + c] = 2 * std::abs(u[j] * g);
          du[j] += term, dus[j] += std::abs(term);
        }
        du[j] = round(du[j]);
        mean += u[j] * du[j], means += u[j] * dus[j];
      }
      for (int64_t j = 0; j < M; ++j) {
        x.dm[b * M + j] = round(u[j] * (du[j] - mean));
        // In the accumulate type, but for the last rounding.
        size.dm[b * M + j] =
            2 * std::abs(x.dm[b * M + j]) + 16 * u[j] * (dus[j] + means) * gates::kSumRoundoff<T> / gates::kRoundoff<T>;
      }
    }
    return x;
  };
  const Result eager = definition(gates::Eager<T>{}), want = definition(gates::Exact{});
  const std::string what = describe<T>(B, M, C, layout);
  const double u = gates::kRoundoff<T>, acc = gates::kSumRoundoff<T>;
  const double tiny = std::is_same_v<T, __half> ? 0x1p-14 : 0;
  for (Values* x : {&size.dm, &size.dv})
    for (double& value : *x) value += tiny;
  gates::close("pooled", Values(pooled.begin(), pooled.end()), want.pooled, want.pooled, size.pooled, 2, acc, what);
  gates::close("lse", Values(lse.begin(), lse.end()), want.lse, want.lse, size.lse, 2, acc, what);
  gates::close("dm", dm.value, want.dm, eager.dm, size.dm, 3, u, what);
  if (args.grad_value.data) gates::close("dv", dv.value, want.dv, eager.dv, size.dv, 3, u, what);
}

}  // namespace

int main(int argc, char** argv) {
  return gates::run(argc, argv, [](gates::Draw& draw) {
    gates::any_type(draw, [&](auto type) {
      if (draw.chance(0.4))
        test_softmax<decltype(type)>(draw);
      else
        test_pooling<decltype(type)>(draw);
    });
  });
}
