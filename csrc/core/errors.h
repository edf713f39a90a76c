// Errors an operator may raise; csrc/bindings.cpp maps each to the Python exception of its name.
// ValueError is std::invalid_argument, which pybind11 maps without our help.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dnl {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct NotImplementedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using ValueError = std::invalid_argument;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace dnl
