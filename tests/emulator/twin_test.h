// Runs pairs of kernels, one right and one with a fault: the right one must pass in every order of turns, the wrong one
// must be found.
//
// A fault is found by an error with a message, by values (wrong or NaN in at least one order of turns), by
// AddressSanitizer and UndefinedBehaviorSanitizer, or by ThreadSanitizer. The last two end the process, so the program
// runs itself again for each: <program> <name of a twin>. Which of them can be shown depends on how it was built.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "machine.h"

namespace twins {

enum class Build { plain, address, thread };
#if defined(EMULATOR_TSAN)
constexpr Build kBuild = Build::thread;
#elif defined(EMULATOR_ASAN)
constexpr Build kBuild = Build::address;
#else
constexpr Build kBuild = Build::plain;
#endif

constexpr emulator::Turns kTurns[] = {emulator::Turns::ascending, emulator::Turns::descending, emulator::Turns::random};

// How a wrong twin is found. `sometimes`: by its message in at least one order of turns.
enum class By { message, sometimes, values, values_or_race, race, bounds };

// Both run a kernel and say whether its values are right.
struct Twin {
  std::string name;
  std::function<bool()> right, wrong;
  By by;
  std::string text = "";  // of the message
};

inline std::string error_of(const std::function<bool()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "no error";
}

// What the program prints when it is run for one twin alone, and whether it failed.
inline std::string alone(const Twin& twin, const char* program, bool& failed) {
  const std::string command = std::string(program) + " '" + twin.name + "' 2>&1";
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return output;
  char buffer[4096];
  while (const size_t count = fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, count);
  failed = pclose(pipe) != 0;
  return output;
}

inline bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

inline void check_message(const Twin& twin) {
  int found = 0;
  std::string texts;
  for (auto turns : kTurns) {
    emulator::machine().options.turns = turns;
    const std::string text = error_of(twin.wrong);
    found += has(text, twin.text);
    texts += "\n  " + text;
  }
  CHECK(found >= (twin.by == By::sometimes ? 1 : 3), "%s:%s", twin.name.c_str(), texts.c_str());
}

inline void check_wrong(const Twin& twin, const char* program) {
  const bool message = twin.by == By::message || twin.by == By::sometimes;
  const bool race = twin.by == By::race || twin.by == By::values_or_race;
  // Under ThreadSanitizer always alone: some of them race before they are found by other means.
  if (kBuild == Build::thread ? message || race : kBuild == Build::address && twin.by == By::bounds) {
    const char* const reports[] = {"ERROR: AddressSanitizer", "runtime error: ", "WARNING: ThreadSanitizer: data race"};
    bool failed = false, found = false;
    const std::string output = alone(twin, program, failed);
    if (message) found = has(output, twin.text);
    if (twin.by != By::message)
      for (const char* report : reports) found |= has(output, report);
    CHECK(failed && found, "%s: %s", twin.name.c_str(), output.c_str());
  } else if (message) {
    check_message(twin);
  } else if (twin.by == By::values || twin.by == By::values_or_race) {
    bool always_right = true;  // an error is found too
    for (auto turns : kTurns) {
      emulator::machine().options.turns = turns;
      always_right &= error_of([&] { return always_right &= twin.wrong(); }) == "no error";
    }
    CHECK(!always_right, "%s: the wrong twin passes", twin.name.c_str());
  }
}

// All of them; or, with the name of one as argument, its wrong twin alone. `rest` runs after all of them.
inline int test_twins(const std::vector<Twin>& twins, int argc, char** argv, void (*rest)()) {
  if (argc > 1) {
    for (const Twin& twin : twins) {
      if (twin.name != argv[1]) continue;
      const std::string error = error_of(twin.wrong);
      std::printf("%s\n", error.c_str());
      return error != "no error";
    }
    std::printf("no twin is named %s\n", argv[1]);
    return 2;
  }
  for (const Twin& twin : twins) {
    for (auto turns : kTurns) {
      emulator::machine().options.turns = turns;
      CHECK(twin.right(), "%s: the right twin", twin.name.c_str());
    }
    check_wrong(twin, argv[0]);
  }
  rest();
  return report();
}

}  // namespace twins
