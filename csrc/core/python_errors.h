// Errors of operators as Python's of the same name, in every torch, although the operators are compiled for no Python.
//
// How an error gets from a kernel to Python depends on torch. Up to 2.14 it calls operators through its copy of
// pybind11. There the translator that dnl_ext._C registers serves (bindings.cpp), if both have the same pybind11
// internals; else a pybind11::builtin_exception does, which any pybind11 asks to set the error itself. From 2.15 on
// torch calls operators without pybind11, and of what is not its own knows torch::PyTorchError, which it asks for a
// class. Both are found by the names of their types and called through their tables of virtual functions, which are
// declared in core/boxed.h as pybind11/detail/common.h and torch/csrc/Exceptions.h declare them, without headers of
// Python. Which one serves is tried when dnl_ext is imported (dnl_ext/_load.py). Where none does, all are RuntimeError.
#pragma once

#include "core/errors.h"

struct _object;  // Python's

namespace dnl {

enum class ErrorRoute { registered, pybind, torch };

// The route, and of the interpreter PyErr_SetString and the classes of errors, which `registered` does without.
struct PythonErrors {
  ErrorRoute route = ErrorRoute::registered;
  void (*set)(_object* type, const char* text) = nullptr;
  _object *value_error, *type_error, *not_implemented_error, *out_of_memory_error;
};

// One for all libraries that ask. Written while dnl_ext is imported, before any other use.
DNL_EXPORT PythonErrors& python_errors();

}  // namespace dnl
