// What the machine is told (options), what it counts, and what it knows of a block: threads, barriers, collectives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "report.h"
#include "sanitizers.h"

namespace emulator {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kEveryLane = 0xffffffffu;
constexpr unsigned char kPoison = 0xff;  // repeated, NaN in float16, bfloat16, float32 and float64

// The most dynamic shared memory a block can have on a GPU of a compute capability (80 for 8.0).
constexpr int64_t shared_limit(int capability) {
  switch (capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
      return 227 << 10;
    default:  // 8.6, 8.9, 12.0
      return 99 << 10;
  }
}

// In which order threads of a block, and blocks of a grid, get their turns.
enum class Turns { ascending, descending, random };

struct Options {
  Turns turns = Turns::ascending;
  uint64_t seed = 0;                            // of random turns
  int64_t max_threads = 1024;                   // of a block
  int64_t max_blocks = 0x7fffffff;              // of a grid
  int64_t max_shared_bytes = shared_limit(86);  // of a block, beside static shared memory
  bool allow_early_exit = false;                // whether __syncthreads may go without threads that have returned
  std::vector<int64_t> only_blocks;             // if not empty, the blocks that run; others of a huge grid do not
};

struct Statistics {
  int64_t launches = 0;
  int64_t matrix_rows = 0;       // groups of eight rows read by ldmatrix
  int64_t matrix_conflicts = 0;  // rows among them that waited for another one in the same banks
};

// A copy by cp.async that has not landed.
struct Copy {
  void* to;
  const void* from;
  bool valid;
};

enum class State { ready, deferred, waiting, done };

struct Thread {
  unsigned index = 0;
  State state = State::ready;
  bool started = false;
  Fiber* fiber = nullptr;
  std::string (*waits_for)(const Thread&) = nullptr;  // says what, from the two members below
  Site site;
  const void* place = nullptr;  // the Barrier or Gathering it waits at, or a place that is not the machine's
  std::vector<Copy> copies;     // by cp.async, oldest first
  std::vector<size_t> groups;   // how many of them are in each committed group, oldest first
};

// A barrier of a block: __syncthreads (number 0), or a named one.
struct Barrier {
  int id = 0;
  unsigned arrived = 0;
  unsigned threads = 0;  // it waits for; 0: every thread of the block that has not returned
  Site site;
  Order* order = nullptr;
};

// Lanes of a warp on their way to one collective.
struct Gathering {
  const char* name;
  unsigned mask, arrived = 0;
  Site site;
  void (*together)();  // identifies the function and the types
  void* arguments[kWarpLanes] = {};
  Order* order = nullptr;
};

// What other files keep for the block that runs.
struct BlockExtension {
  virtual ~BlockExtension() = default;
  virtual std::string unfinished() const = 0;  // what is wrong when all threads have returned; or ""
};

// What each thread waits for, when nobody can go on.
inline std::string who_waits(const std::vector<Thread>& threads) {
  std::vector<std::pair<std::string, std::vector<unsigned>>> groups;  // threads with the same answer
  for (const Thread& thread : threads) {
    const std::string what =
        thread.state == State::done ? "have returned" : text("wait ", thread.waits_for(thread), " at ", thread.site);
    const auto same =
        std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == what; });
    if (same == groups.end())
      groups.push_back({what, {thread.index}});
    else
      same->second.push_back(thread.index);
  }
  std::string result;
  for (const auto& [what, members] : groups) {
    size_t i = 0;
    const auto next = [&, &list = members] { return i < list.size() ? static_cast<long>(list[i++]) : -1l; };
    result += text(result.empty() ? "" : ";", " threads ", ranges(next), " ", what);
  }
  return result;
}

}  // namespace emulator
