// Random cases of pairwise attention by the chain, forward and backward (ops/pairwise/chain).
#include "pairwise.h"

int main(int argc, char** argv) {
  return gates::run(argc, argv, [](gates::Draw& draw) {
    gates::any_type(draw, [&](auto type) {
      using T = decltype(type);
      const int64_t most = gates::kSanitized ? 50 : 400, widest = gates::kSanitized ? 12 : 40;
      gates::PairwiseProblem<T> problem(gates::any_pairwise<T>(draw, most, widest, widest));
      pairwise_forward_cuda<T>(problem.args, problem.device, problem.t.limits);
      problem.want_gradients();
      pairwise_backward_cuda<T>(problem.args, problem.device, problem.t.limits);
      problem.compare(true, true);
    });
  });
}
