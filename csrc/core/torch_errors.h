// Errors of torch's C API, with the type and text that torch gave them.
//
// A call of the C API returns a status and nothing else. From 2.13 on, torch keeps the text of what was thrown in the
// calling thread; an earlier torch writes it to stderr, and what we tried has to serve. The type is read off the text:
// each phrase below is in the text of that type alone (c10/cuda/CUDACachingAllocator.cpp,
// aten/src/ATen/core/dispatch/OperatorEntry.cpp, aten/src/ATen/Dispatch.h).
#pragma once

#include "core/errors.h"

// Absent before 2.13, where its address is null: one binary serves all.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace dnl {

// Throws `text`, the text of an error of torch, as the error of its type.
[[noreturn]] inline void throw_torch_text(const std::string& text) {
  const auto has = [&](const char* phrase) { return text.find(phrase) != std::string::npos; };
  if (has("out of memory. Tried to allocate")) throw OutOfMemoryError(text);
  if (text.rfind("Could not run '", 0) == 0 || has("\" not implemented for '")) throw NotImplementedError(text);
  throw std::runtime_error(text);
}

// What has to be thrown after a call of the C API has failed. `Untold`: the type where torch does not tell why.
template <class Untold = std::runtime_error>
[[noreturn]] void throw_torch_error(const std::string& tried) {
  if (torch_exception_get_what_without_backtrace) throw_torch_text(torch_exception_get_what_without_backtrace());
  throw Untold(message(tried, " failed; this version of torch tells why on stderr only"));
}

}  // namespace dnl
