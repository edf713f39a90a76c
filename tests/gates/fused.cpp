// Random cases of pairwise attention by the fused kernels: forward with every tile, slice and split that a plan can
// have, backward by the fused map, or both by one after the other.
#include "pairwise.h"

#ifndef GATE_FUSED
#define GATE_FUSED 3
#endif

#include "ops/pairwise/fused/forward.cuh"

namespace {

// The plan of one of several GPUs, or one that cuts channels and keys where no GPU would.
template <class T>
ForwardPlan any_plan(gates::Draw& draw, const PairwiseArgs& args) {
  const PairwiseShape shape = shape_of<ResultOf<T>>(args);
  const int capability = draw.of({80, 86, 90});
  const int bytes = draw.of({shared_bytes_of(capability), sizeof(T) == 2 ? 48 << 10 : 99 << 10});
  ForwardPlan plan = plan_fused_forward(shape, Gpu{capability, static_cast<int>(draw.of({1, 4, 108})), bytes});
  if (plan.slices == 0) plan = plan_fused_forward(shape, Gpu{90, 132, shared_bytes_of(90)});
  if (draw.chance(0.3)) {
    const int64_t tiles = ceil_div_of(args.keys, kForwardTiles[plan.tile].keys);
    plan.splits = static_cast<int>(draw.upto(1, std::min<int64_t>(tiles, kMaxSplits)));
  }
  return plan;
}

// Operands of TF32 are the nearest to what is left of the inputs without their means.
void check_operands(const gates::PairwiseProblem<float, Tf32>& problem) {
  HostDevice device;
  const PairwiseOperands<float, HostDevice, Tf32> in(problem.args, device);
  const auto check = [&](const char* name, const Matrix<const Tf32>& got, const Tensor<float>& x) {
    const Values want = centred(x.value, x.batches, x.positions, x.channels);
    for (int64_t b = 0; b < x.batches; ++b)
      for (int64_t i = 0; i < x.positions; ++i)
        for (int64_t c = 0; c < x.channels; ++c) {
          const int64_t at = (b * x.positions + i) * x.channels + c;
          // Half a unit in the last place, and what the mean and the difference are off by.
          const double bound = 0x1p-11 * std::abs(want[at]) + 0x1p-22 * (std::abs(x.value[at]) + std::abs(want[at]));
          const double value = wide(*got.element(b, i, c));
          CHECK(std::abs(value - want[at]) <= bound, "%s: operand %.9g, centred input %.9g", name, value, want[at]);
          if (std::abs(value - want[at]) > bound) return;
        }
  };
  check("query", in.query, problem.q);
  check("key", in.key, problem.k);
  check("value", in.value, problem.v);
}

template <class T>
void test(gates::Draw& draw) {
  if constexpr (kHalf<T> || std::is_same_v<T, Tf32>) {
    gates::PairwiseCase t =
        gates::kSanitized ? gates::any_pairwise<T>(draw, 150, 40, 150) : gates::any_pairwise<T>(draw, 300, 150, 700);
    if (draw.chance(0.3)) t.keys = draw.upto(65, gates::kSanitized ? 150 : 300);  // tiles enough for splits
    if (t.channels > 150) t.queries = std::min<int64_t>(t.queries, 70), t.keys = std::min<int64_t>(t.keys, 150);
    gates::PairwiseProblem<ResultOf<T>, T> problem(t);
    if constexpr (std::is_same_v<T, Tf32>)
      if (!t.part) check_operands(problem);
    const int what = GATE_FUSED;
    if (what & 1)
      pairwise_fused_forward_cuda<T>(problem.args, problem.device, any_plan<T>(draw, problem.args));
    else
      pairwise_forward_cuda<ResultOf<T>>(problem.args, problem.device, t.limits);
    problem.want_gradients();
    problem.device.whole_lines = !kHalf<T>;                               // the backward of float is the chain's
    problem.device.on.shared_bytes = shared_bytes_of(draw.of({86, 90}));  // for two buffers, or four
    if (what & 2) pairwise_backward_cuda<ResultOf<T>>(problem.args, problem.device, t.limits, {BackwardMap::fused});
    problem.compare(true, what & 2);
  }
}

}  // namespace

// -DGATE_FUSED=1: forward, 2: backward, 3 (the default): both.
int main(int argc, char** argv) {
  return gates::run(argc, argv, [](gates::Draw& draw) {
#ifdef GATE_TYPE
    test<GATE_TYPE>(draw);
#else
    const double type = std::uniform_real_distribution<double>()(draw.engine);
    if (type < 1.0 / 3)
      test<__nv_bfloat16>(draw);
    else if (type < 2.0 / 3)
      test<__half>(draw);
    else
      test<Tf32>(draw);
#endif
  });
}
