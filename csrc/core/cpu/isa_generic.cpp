// The CPU kernels for any CPU: 128-bit vectors, which every compiler maps to what the target has.
#define DNL_ISA generic
#define DNL_VECTOR_BYTES 16
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/table.h"
#include "core/cpu/target_end.h"
// clang-format on

static bool supported() { return true; }

DNL_TABLE(generic, supported)
