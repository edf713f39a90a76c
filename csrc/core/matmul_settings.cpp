// The registered query of matmul_settings.h: one for all libraries that ask.
#include "core/matmul_settings.h"

#include <atomic>

namespace dnl {

static std::atomic<MatmulQuery> matmul_query{nullptr};

void set_matmul_query(MatmulQuery query) { matmul_query = query; }

bool allowed(MatmulSetting setting) {
  const MatmulQuery query = matmul_query;
  return query && query(setting);
}

}  // namespace dnl
