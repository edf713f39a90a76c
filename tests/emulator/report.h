// Errors of the emulator: what they are, and how a message names places, lanes and threads.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace emulator {

// A kernel did something a GPU forbids or leaves undefined, or could not go on.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A line of a kernel. As a default argument, Site::here() is the line of the call.
struct Site {
  const char* file = "";
  int line = 0;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const {
    return line == other.line && std::string_view(file) == std::string_view(other.file);
  }
};

inline std::ostream& operator<<(std::ostream& out, const Site& site) {
  const std::string_view file(site.file);
  return out << file.substr(file.find_last_of('/') + 1) << ":" << site.line;
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// "0-3, 7" for a list in ascending order. `each` gives the next number, or a negative one at the end.
template <class Next>
std::string ranges(Next next) {
  std::string result;
  for (long first = next(); first >= 0;) {
    long last = first, after = next();
    while (after == last + 1) last = after, after = next();
    result += text(result.empty() ? "" : ", ", first);
    if (last > first) result += text("-", last);
    first = after;
  }
  return result;
}

inline std::string lanes_of(unsigned mask) {
  int lane = 0;
  return ranges([&]() -> long {
    while (lane < 32 && !(mask >> lane & 1)) ++lane;
    return lane < 32 ? lane++ : -1;
  });
}

}  // namespace emulator
