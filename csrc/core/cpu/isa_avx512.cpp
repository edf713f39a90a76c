// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#define DNL_ISA avx512
#define DNL_VECTOR_BYTES 64
#define DNL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/table.h"
#include "core/cpu/target_end.h"
#include "core/cpu/x86_features.h"
// clang-format on

DNL_TABLE(avx512, has_avx512)
#endif
