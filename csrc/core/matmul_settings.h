// What torch allows library products on CUDA to do (torch.backends.cuda.matmul). The stable ABI does not tell, so the
// Python module registers a function that does when it is imported (bindings.cpp). Without that function nothing is
// allowed.
#pragma once

#include "core/errors.h"

namespace dnl {

enum class MatmulSetting {
  tf32,               // products of float32 round their operands to TF32
  fp16_accumulation,  // products of float16 add up in float16
};

using MatmulQuery = bool (*)(MatmulSetting);  // called from any thread

DNL_EXPORT void set_matmul_query(MatmulQuery query);
DNL_EXPORT bool allowed(MatmulSetting setting);

inline bool tf32_allowed() { return allowed(MatmulSetting::tf32); }

}  // namespace dnl
