// The registered query of path_choice.h and its answers: one for all libraries that ask.
#include "ops/pairwise/path_choice.h"

#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

namespace dnl {

namespace {

using Key = std::tuple<int, bool, DType, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, bool>;

Key key_of(const PathQuestion& q) {
  const PairwiseShape& s = q.shape;
  return {q.device,
          q.backward,
          s.dtype,
          s.batches,
          s.queries,
          s.keys,
          s.width,
          s.channels,
          s.query_channel_first,
          s.key_channel_first,
          s.value_channel_first};
}

// A program whose shapes never repeat must not keep them all.
constexpr size_t kMostAnswers = 4096;

std::atomic<PathQuery> path_query{nullptr};
std::mutex mutex;
std::map<Key, CudaPath> answers;
thread_local CudaPath forced = CudaPath::by_default;

}  // namespace

void set_path_query(PathQuery query) {
  path_query = query;
  forget_paths();
}

void forget_paths() {
  const std::lock_guard<std::mutex> lock(mutex);
  answers.clear();
}

CudaPath advised_path(const PathQuestion& question) {
  const PathQuery query = path_query;
  if (!query) return CudaPath::chain;
  const Key key = key_of(question);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = answers.find(key);
    if (known != answers.end()) return known->second;
  }
  const PathAnswer answer = query(question);  // unlocked: it may measure, which calls the operators
  if (answer.keep) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (answers.size() >= kMostAnswers) answers.clear();
    answers[key] = answer.path;
  }
  return answer.path;
}

void force_path(CudaPath path) { forced = path; }

CudaPath requested_path() { return forced == CudaPath::by_default ? path_of_environment() : forced; }

}  // namespace dnl
