// Random cases of pairwise attention by Hopper's kernels.
// clang-format off
#define DNL_EXT_HOPPER
#include "emulator.h"
#include "sm90.h"
#include "pairwise.h"
// clang-format on
#include "ops/pairwise/fused/forward.cuh"
#include "ops/pairwise/hopper/backward_map.cuh"
#include "ops/pairwise/hopper/forward.cuh"

#ifndef GATE_HOPPER
#define GATE_HOPPER 3
#endif

namespace {

// The plan of a GPU with few or many multiprocessors, or any number of splits.
template <class T>
ForwardPlan any_plan(gates::Draw& draw, const PairwiseArgs& args) {
  const Gpu gpu{90, static_cast<int>(draw.of({1, 4, 132})), shared_bytes_of(90)};
  ForwardPlan plan = plan_hopper_forward(shape_of<T>(args), gpu);
  if (draw.chance(0.3))
    plan.splits = static_cast<int>(draw.upto(1, std::min<int64_t>(ceil_div_of(args.keys, kHopperKeys), kMaxSplits)));
  return plan;
}

template <class T>
void test(gates::Draw& draw) {
  gates::PairwiseCase t =
      gates::kSanitized ? gates::any_pairwise<T>(draw, 150, 70, 150) : gates::any_pairwise<T>(draw, 300, 256, 700);
  if (t.channels > 150) t.queries = std::min<int64_t>(t.queries, 70), t.keys = std::min<int64_t>(t.keys, 100);
  // Often enough, stages come round: many tiles of keys, or many channels.
  if (draw.chance(0.1)) t.keys = draw.upto(257, 600), t.queries = std::min<int64_t>(t.queries, 40);
  // And blocks that keep their keys, beside one that does not: three blocks, two tiles of keys, five of queries.
  const bool walk = !gates::kSanitized && draw.chance(0.15);
  if (walk) {
    t.queries = draw.upto(513, 640), t.keys = draw.upto(129, 256);
    t.batches = 1, t.width = draw.upto(1, 70), t.channels = 16;
    t.limits = {};  // one launch
  }
  if (draw.chance(gates::kSanitized ? 0.3 : 0.15)) {
    t.width = draw.upto(129, 256), t.channels = draw.upto(129, 320);
    t.queries = draw.upto(1, 24), t.keys = draw.upto(1, 24);
    if (!gates::kSanitized && draw.chance(0.5)) t.keys = draw.upto(129, 260);  // and both
  }
  gates::PairwiseProblem<T> problem(t);
  const int what = GATE_HOPPER;
  if (what & 1)
    pairwise_hopper_forward_cuda<T>(problem.args, problem.device, any_plan<T>(draw, problem.args));
  else
    pairwise_forward_cuda<T>(problem.args, problem.device, t.limits);
  problem.want_gradients();
  problem.device.whole_lines = false;  // one kernel makes the map, without zeros beyond the last key
  if (what & 2)
    pairwise_backward_cuda<T>(problem.args, problem.device, t.limits,
                              {BackwardMap::hopper, walk ? 3 : static_cast<int>(draw.upto(1, 3))});
  problem.compare(what & 1, what & 2);
}

}  // namespace

// -DGATE_HOPPER=1: forward, 2: backward, 3 (the default): both.
int main(int argc, char** argv) {
  return gates::run(argc, argv, [](gates::Draw& draw) {
#ifdef GATE_TYPE
    test<GATE_TYPE>(draw);
#else
    if (draw.chance(0.5))
      test<__nv_bfloat16>(draw);
    else
      test<__half>(draw);
#endif
  });
}
