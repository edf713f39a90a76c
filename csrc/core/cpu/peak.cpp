// Times the multiply-adds of core/cpu/peak.h on several threads at once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "core/cpu/kernels.h"

namespace dnl {

// Operations per second of this thread: the best of many short rounds, so that one which was interrupted does not
// count.
static double best_rate(const CpuKernels& kernels, DType dtype) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  constexpr double kRound = 2e-4, kAll = 0.1;
  int64_t steps = 64;
  double best = 0;
  for (const auto start = Clock::now(); Seconds(Clock::now() - start).count() < kAll;) {
    const auto begin = Clock::now();
    const int64_t count = kernels.multiply_adds(dtype, steps);
    const double seconds = Seconds(Clock::now() - begin).count();
    if (seconds < kRound / 2) {
      steps *= 2;
    } else {
      best = std::max(best, 2.0 * static_cast<double>(count) / seconds);
    }
  }
  return best;
}

double cpu_peak(const CpuKernels& kernels, DType dtype, int threads) {
  // All begin together: threads that share a core's units must be seen to share them.
  std::atomic<int> waiting{threads};
  std::vector<double> rates(threads);
  const auto run = [&](int thread) {
    --waiting;
    while (waiting.load() > 0) std::this_thread::yield();
    rates[thread] = best_rate(kernels, dtype);
  };
  std::vector<std::thread> pool;
  for (int thread = 1; thread < threads; ++thread) pool.emplace_back(run, thread);
  run(0);
  for (std::thread& thread : pool) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

}  // namespace dnl
