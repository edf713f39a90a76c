// Random cases of pairwise attention by the chain, forward and backward (ops/pairwise/chain), and of its plan.
#include "pairwise.h"
#include "plan_checks.h"

namespace {

void any_plan(gates::Draw& draw) {
  check_waves(draw.upto(1, 2000), static_cast<int>(draw.upto(1, 150)));
  check_kept_rows(static_cast<int>(draw.upto(4, 227)) << 10);
  const int64_t step = 8 * draw.upto(1, 16), rows = draw.upto(1, 20000), columns = draw.upto(1, 20000);
  const ChunkLimits limits{draw.of({int64_t(0), draw.upto(1, 5000)}), draw.upto(1, int64_t(1) << 26), step};
  check_chunks(draw.upto(1, 20), rows, columns, draw.upto(1, 20000), limits);
}

}  // namespace

int main(int argc, char** argv) {
  return gates::run(argc, argv, [](gates::Draw& draw) {
    any_plan(draw);
    gates::any_type(draw, [&](auto type) {
      using T = decltype(type);
      const int64_t most = gates::kSanitized ? 50 : 400, widest = gates::kSanitized ? 12 : 40;
      gates::PairwiseProblem<T> problem(gates::any_pairwise<T>(draw, most, widest, widest));
      // Shared memory for both rows of a map, for one of them or shorter ones alone, for none.
      problem.device.on.shared_bytes = draw.of({227 << 10, 5 << 10, 3 << 10, 0});
      emulator::machine().options.max_shared_bytes = problem.device.on.shared_bytes;
      pairwise_forward_cuda<T>(problem.args, problem.device, problem.t.limits);
      problem.want_gradients();
      pairwise_backward_cuda<T>(problem.args, problem.device, problem.t.limits);
      problem.compare(true, true);
    });
  });
}
