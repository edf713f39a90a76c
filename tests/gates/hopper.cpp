// Random cases of pairwise attention by Hopper's kernels.
// clang-format off
#define DNL_EXT_HOPPER
#include "emulator.h"
#include "sm90.h"
#include "pairwise.h"
// clang-format on
#include "ops/pairwise/hopper/backward_map.cuh"

namespace {

template <class T>
void test(gates::Draw& draw) {
  gates::PairwiseCase t =
      gates::kSanitized ? gates::any_pairwise<T>(draw, 150, 40, 150) : gates::any_pairwise<T>(draw, 300, 150, 700);
  if (t.channels > 150) t.queries = std::min<int64_t>(t.queries, 70), t.keys = std::min<int64_t>(t.keys, 100);
  gates::PairwiseProblem<T> problem(t);
  pairwise_forward_cuda<T>(problem.args, problem.device, t.limits);
  problem.want_gradients();
  pairwise_backward_cuda<T>(problem.args, problem.device, t.limits,
                            {BackwardMap::hopper, static_cast<int>(draw.upto(1, 3))});
  problem.compare(false, true);
}

}  // namespace

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
