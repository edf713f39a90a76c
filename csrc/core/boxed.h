// Operators as torch calls them: those of torch/csrc/stable/library.h, with errors that Python gets as its own by every
// route of core/python_errors.h. Not to be included beside pybind11 or torch's own C++.
#pragma once

#include <torch/csrc/stable/library.h>

#include "core/python_errors.h"

namespace pybind11 {

class DNL_EXPORT builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;  // called with the interpreter's lock held
};

}  // namespace pybind11

namespace torch {

struct DNL_EXPORT PyTorchError : std::exception {
  virtual _object* python_type() = 0;
  const char* what() const noexcept override { return msg.c_str(); }
  std::string msg;
};

}  // namespace torch

namespace dnl {

struct PybindError : pybind11::builtin_exception {
  PybindError(_object* type, const char* text) : builtin_exception(text), type(type) {}
  void set_error() const override { python_errors().set(type, what()); }
  _object* type;
};

struct TorchError : torch::PyTorchError {
  TorchError(_object* type, const char* text) : type(type) { msg = text; }
  _object* python_type() override { return type; }
  _object* type;
};

[[noreturn]] inline void throw_python_error(_object* type, const char* text) {
  if (python_errors().route == ErrorRoute::pybind) throw PybindError(type, text);
  throw TorchError(type, text);
}

// What torch calls in place of `operation`, a function of its own that takes what it reads from `arguments`.
template <auto operation, class... Arguments>
void with_python_errors(Arguments... arguments) {
  const PythonErrors& python = python_errors();
  if (python.route == ErrorRoute::registered) return operation(arguments...);
  try {
    operation(arguments...);
  } catch (const ValueError& error) {
    throw_python_error(python.value_error, error.what());
  } catch (const TypeError& error) {
    throw_python_error(python.type_error, error.what());
  } catch (const NotImplementedError& error) {
    throw_python_error(python.not_implemented_error, error.what());
  } catch (const OutOfMemoryError& error) {
    throw_python_error(python.out_of_memory_error, error.what());
  }
}

}  // namespace dnl

// TORCH_BOX of an operator that may throw the errors of errors.h.
#define DNL_BOX(operation) (&dnl::with_python_errors<&TORCH_BOX(operation), StableIValue*, uint64_t, uint64_t>)
