// Whether torch allows products of float32 on CUDA to round their operands to TF32 (torch.backends.cuda.matmul). The
// stable ABI does not tell, so the Python module registers a function that does when it is imported (bindings.cpp).
// Without that function the answer is no.
#pragma once

#include "core/errors.h"

namespace dnl {

using Tf32Query = bool (*)();  // called from any thread

DNL_EXPORT void set_tf32_query(Tf32Query query);
DNL_EXPORT bool tf32_allowed();

}  // namespace dnl
