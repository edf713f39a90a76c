// Whether torch allows products of float32 on CUDA to round their operands to TF32 (torch.backends.cuda.matmul). The
// stable ABI does not tell, so whoever knows registers a function that does: the Python module at import
// (bindings.cpp). Without it the answer is no.
#pragma once

#include "core/errors.h"

namespace dnl {

using Tf32Query = bool (*)();  // called from any thread

DNL_EXPORT void set_tf32_query(Tf32Query query);
DNL_EXPORT bool tf32_allowed();

}  // namespace dnl
