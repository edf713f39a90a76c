// Random cases of whitening by any mean and deviation, forward and backward (ops/whiten/standardise_cuda.cuh).
#include "gate.h"
#include "ops/whiten/standardise_cuda.cuh"

namespace {

template <class T>
void test(gates::Draw& draw) {
  using A = AccOf<T>;
  const int64_t B = draw.upto(1, 4), N = draw.size(1300), C = draw.size(140);
  const int64_t group = draw.of({int64_t(1), C, C * B});
  const bool deviation = draw.chance(0.7) && N * group > 1;
  const Layout layout = gates::any_layout(draw);
  const double eps = 1e-5;
  Tensor<T> x(B, N, C, layout, draw.of({0.0, 1.0, 10.0})), y(B, N, C, layout), dy(B, N, C, layout),
      dx(B, N, C, gates::any_layout(draw));
  std::vector<A> rstd(B * C / group);
  HostDevice device;
  device.most_blocks = draw.of({1, 2, 3, 1000});
  StandardiseArgs args{x.view, {}, y.view, deviation ? rstd.data() : nullptr, kType<T>, B, N, C, group, eps};
  standardise_cuda<T>(args, device);
  y.read();
  args.input = dy.view, args.result = y.view, args.output = dx.view;
  standardise_cuda<T>(args, device);
  dx.read();

  // Of the elements that share statistics: their mean, and the sum of products of two deviations.
  const auto owner = [&](int64_t b, int64_t c) { return (b * C + c) / group; };
  const auto each = [&](const auto& f) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < N; ++i)
        for (int64_t c = 0; c < C; ++c) f(owner(b, c), (b * N + i) * C + c);
  };
  const double count = double(N * group);
  const auto mean_of = [&](const Values& values) {
    Values mean(rstd.size());
    each([&](int64_t g, int64_t at) { mean[g] += values[at] / count; });
    return mean;
  };
  const Values mean = mean_of(x.value), mean_dy = mean_of(dy.value);
  Values scale(rstd.size(), 1), dot(rstd.size());
  if (deviation) {
    Values square(rstd.size());
    each([&](int64_t g, int64_t at) { square[g] += (x.value[at] - mean[g]) * (x.value[at] - mean[g]); });
    for (size_t g = 0; g < scale.size(); ++g) scale[g] = 1 / std::sqrt(square[g] / (count - 1) + eps);
    each([&](int64_t g, int64_t at) { dot[g] += (dy.value[at] - mean_dy[g]) * y.value[at] / (count - 1); });
  }
  const Values& used = scale;
  Values want(x.value.size()), size(want), want_dx(want), size_dx(want), eager(want), eager_dx(want);
  const gates::Eager<T> round;
  const double sums = gates::kSumRoundoff<T> / gates::kRoundoff<T>;
  each([&](int64_t g, int64_t at) {
    want[at] = (x.value[at] - mean[g]) * used[g];
    eager[at] = round(round(x.value[at] - round(mean[g])) * round(used[g]));
    size[at] = std::abs(want[at]) + sums * 4 * (std::abs(x.value[at]) + std::abs(mean[g])) * used[g];
    // As the kernel has it, from its own y.
    want_dx[at] = (dy.value[at] - mean_dy[g] - y.value[at] * dot[g]) * used[g];
    eager_dx[at] = round(round(round(dy.value[at] - round(mean_dy[g])) - round(y.value[at] * round(dot[g]))) * used[g]);
    size_dx[at] =
        std::abs(want_dx[at]) + sums * 8 * used[g] * (std::abs(dy.value[at]) + 1 + std::abs(y.value[at] * dot[g]));
  });
  const std::string what = message("B ", B, " N ", N, " C ", C, " group ", group, " deviation ", deviation, " layout ",
                                   int(layout), " dtype ", int(kType<T>));
  gates::close("y", y.value, want, eager, size, 2, gates::kRoundoff<T>, what);
  gates::close("dx", dx.value, want_dx, eager_dx, size_dx, 3, gates::kRoundoff<T>, what);
}

}  // namespace

int main(int argc, char** argv) {
  return gates::run(argc, argv,
                    [](gates::Draw& draw) { gates::any_type(draw, [&](auto type) { test<decltype(type)>(draw); }); });
}
