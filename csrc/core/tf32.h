// Whether torch allows products of float32 on CUDA to round their operands to TF32 (torch.backends.cuda.matmul). The
// stable ABI does not tell, so whoever knows registers a function that does: the Python module at import
// (bindings.cpp). Without it the answer is no.
#pragma once

#include <atomic>

namespace dnl {

using Tf32Query = bool (*)();  // called from any thread

inline std::atomic<Tf32Query>& tf32_query() {
  static std::atomic<Tf32Query> query{nullptr};
  return query;
}
inline void set_tf32_query(Tf32Query query) { tf32_query() = query; }

inline bool tf32_allowed() {
  const Tf32Query query = tf32_query();
  return query && query();
}

}  // namespace dnl
