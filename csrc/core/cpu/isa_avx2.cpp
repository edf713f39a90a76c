// The CPU kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define DNL_ISA avx2
#define DNL_VECTOR_BYTES 32
#define DNL_TARGET "avx2,fma,f16c"
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/table.h"
#include "core/cpu/target_end.h"
#include "core/cpu/x86_features.h"
// clang-format on

DNL_TABLE(avx2, has_avx2_fma_f16c)
#endif
