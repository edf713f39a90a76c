// The route that errors take: one for all libraries that ask.
#include "core/python_errors.h"

namespace dnl {

PythonErrors& python_errors() {
  static PythonErrors errors;
  return errors;
}

}  // namespace dnl
