// The CPU kernels for NEON, which every Arm of 64 bits has, with its conversions of float16.
#if defined(__aarch64__)
#define DNL_NEON
#define DNL_ISA neon
#define DNL_VECTOR_BYTES 16
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/table.h"
#include "core/cpu/target_end.h"
// clang-format on

static bool supported() { return true; }

DNL_TABLE(neon, supported)
#endif
