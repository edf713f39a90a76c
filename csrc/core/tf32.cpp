// The registered query of tf32.h: one for all libraries that ask.
#include "core/tf32.h"

#include <atomic>

namespace dnl {

static std::atomic<Tf32Query> tf32_query{nullptr};

void set_tf32_query(Tf32Query query) { tf32_query = query; }

bool tf32_allowed() {
  const Tf32Query query = tf32_query;
  return query && query();
}

}  // namespace dnl
