// Random cases of mean subtraction: column sums in two stages, affine (core/cuda/reduce.cuh, affine.cuh).
#include "gate.h"
#include "ops/whiten/whiten_cuda.cuh"

namespace {

template <class T>
void test(gates::Draw& draw) {
  const int64_t B = draw.upto(1, 4), N = draw.size(1300), C = draw.size(140);
  const Layout layout = gates::any_layout(draw);
  const double mean = draw.of({0.0, 1.0, 30.0});
  Tensor<T> x(B, N, C, layout, mean), y(B, N, C, layout);
  const WhitenArgs args{x.view, y.view, kType<T>, B, N, C};
  HostDevice device;
  device.most_blocks = draw.of({1, 2, 3, 1000});
  whiten_cuda<T>(args, device);
  y.read();

  const auto definition = [&](auto round) {
    Values out = x.value;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < C; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < N; ++i) sum += x.value[(b * N + i) * C + c];
        for (int64_t i = 0; i < N; ++i) out[(b * N + i) * C + c] = round(out[(b * N + i) * C + c] - round(sum / N));
      }
    return out;
  };
  // The mean is one rounding of the accumulate type off.
  const Values want = definition(gates::Exact{}), eager = definition(gates::Eager<T>{});
  Values magnitude = want;
  for (size_t i = 0; i < want.size(); ++i)
    magnitude[i] = std::abs(want[i]) + std::abs(x.value[i]) * gates::kSumRoundoff<T> / gates::kRoundoff<T> * 2;
  gates::close("x - mean", y.value, want, eager, magnitude, 2, gates::kRoundoff<T>,
               "B " + std::to_string(B) + " N " + std::to_string(N) + " C " + std::to_string(C) + " layout " +
                   std::to_string(int(layout)) + " dtype " + std::to_string(int(kType<T>)));
}

}  // namespace

int main(int argc, char** argv) {
  return gates::run(argc, argv,
                    [](gates::Draw& draw) { gates::any_type(draw, [&](auto type) { test<decltype(type)>(draw); }); });
}
