// Errors an operator may raise; core/python_errors.h maps each to the Python exception of its name.
// ValueError is std::invalid_argument, which pybind11 maps without our help. OutOfMemoryError is torch's: of a GPU.
#pragma once

// Visible outside libdnl_ext.so, where all else is hidden: what dnl_ext._C, another library, catches or calls.
#define DNL_EXPORT __attribute__((visibility("default")))

#include <sstream>
#include <stdexcept>
#include <string>

namespace dnl {

struct DNL_EXPORT TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DNL_EXPORT NotImplementedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DNL_EXPORT OutOfMemoryError : std::runtime_error {
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
