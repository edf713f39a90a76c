// Random cases of the CUDA kernels in the emulator: what the programs beside this file share. Each program covers a
// family of kernels, small enough to compile in seconds, so that a mutant of a kernel (tests/mutants) costs little.
//
//   PROGRAM COUNT [FIRST] [ORDER]     cases FIRST .. FIRST + COUNT - 1, in an order of turns: ascending, descending,
//                                     random, or all (the default), which takes them in rotation
//
// A case is drawn from its number alone, so `PROGRAM 1 NUMBER` repeats a failure. -DGATE_TYPE=float compiles one
// element type instead of all.
//
// The bar. Error against the definition in double at most 2x (outputs) or 3x (gradients) the error of the same steps
// with each result rounded to the type, as a library that computes them one by one does, plus a floor for cases so
// small that those roundings can vanish by luck: the unit roundoff times the sum of the magnitudes that were added.
#pragma once

#include <cstdlib>
#include <functional>

#include "cuda_host.h"

namespace gates {

// Sanitizers make a case some 20 times as long: smaller sizes there, of which there can be more.
#if defined(EMULATOR_TSAN) || defined(EMULATOR_ASAN)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

struct Draw {
  std::mt19937_64 engine;

  int64_t upto(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine); }
  bool chance(double p) { return std::uniform_real_distribution<double>()(engine) < p; }
  template <class T, size_t N>
  T of(const T (&options)[N]) {
    return options[upto(0, N - 1)];
  }
  // Below one tile of anything, up to a few tiles, or (seldom) up to `most`.
  int64_t size(int64_t most) {
    const double kind = std::uniform_real_distribution<double>()(engine);
    return kind < 0.5 ? upto(1, std::min<int64_t>(most, 12))
                      : upto(1, kind < 0.95 ? std::min<int64_t>(most, 90) : most);
  }
};

// Unit roundoff of a type and of the accumulators of its kernels. The definition of double is itself computed in
// double, by plain sums: 64 times its roundoff covers what that costs.
template <class T>
constexpr double kRoundoff = std::is_same_v<T, double>          ? 0x1p-47
                             : std::is_same_v<T, float>         ? 0x1p-24
                             : std::is_same_v<T, __nv_bfloat16> ? 0x1p-8
                                                                : 0x1p-11;  // float16 and TF32
template <class T>
constexpr double kSumRoundoff = std::is_same_v<T, double> ? 0x1p-47 : 0x1p-24;

// Rounds a result of one step, and what products multiply: not at all (the definition), or to T (eager). With Tf32,
// results are float and only the operands of products are rounded to it.
struct Exact {
  double operator()(double x) const { return x; }
  double operand(double x) const { return x; }
};
template <class T>
struct Eager {
  double operator()(double x) const { return wide(rounded<ResultOf<T>>(static_cast<AccOf<T>>(x))); }
  double operand(double x) const { return wide(rounded<T>(static_cast<AccOf<T>>(x))); }
};

inline double norm(const Values& x) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return std::sqrt(sum);
}
inline double distance(const Values& x, const Values& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
  return std::sqrt(sum);
}

// `magnitude`: of what was added to make each entry of `want`; `what` names the case.
inline void close(const std::string& name, const Values& got, const Values& want, const Values& eager,
                  const Values& magnitude, double factor, double roundoff, const std::string& what) {
  const double eager_error = distance(eager, want);  // not finite where an intermediate exceeds the type: no allowance
  const double error = distance(got, want);
  const double bar = (std::isfinite(eager_error) ? factor * eager_error : 0) + roundoff * norm(magnitude);
  CHECK(error <= bar, "%s: error %.3g, allowed %.3g, size %.3g; %s", name.c_str(), error, bar, norm(want),
        what.c_str());
}

inline int run(int argc, char** argv, const std::function<void(Draw&)>& one) {
  const int64_t count = argc > 1 ? std::atoll(argv[1]) : 30, first = argc > 2 ? std::atoll(argv[2]) : 0;
  const std::string order = argc > 3 ? argv[3] : "all";
  int64_t done = 0, failed = 0;
  for (int64_t number = first; number < first + count && failed < 5; ++number, ++done) {
    const auto* turns = &kTurns[number % 3];
    for (const auto& option : kTurns)
      if (order == option.first) turns = &option;
    emulator::machine().options.turns = turns->second;
    emulator::machine().options.seed = number;
    emulator::machine().options.max_shared_bytes = emulator::shared_limit(90);
    Draw draw{std::mt19937_64(number * 7919 + 1)};
    generator.seed(static_cast<unsigned>(number + 1));
    const int before = failures;
    try {
      one(draw);
    } catch (const std::exception& error) {
      CHECK(false, "%s", error.what());
    }
    if (failures > before) ++failed, std::printf("case %ld, turns %s\n", long(number), turns->first);
  }
  std::printf("%ld cases, %ld failed\n", long(done), long(failed));
  return failed != 0;
}

// f(T{}) for one of the types that are compiled.
template <class F>
void any_type(Draw& draw, const F& f) {
#ifdef GATE_TYPE
  (void)draw;
  f(GATE_TYPE{});
#else
  dispatch_element(draw.of({DType::f64, DType::f32, DType::bf16, DType::f16}), f);
#endif
}

inline Layout any_layout(Draw& draw) {
  return draw.of({Layout::rows, Layout::channel_first, Layout::gaps, Layout::heads, Layout::padded});
}

}  // namespace gates
