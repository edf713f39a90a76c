// The CPU kernels for AVX-512 with BF16 products.
#if defined(__x86_64__)
#define DNL_BF16_PRODUCTS
#define DNL_ISA avx512_bf16
#define DNL_VECTOR_BYTES 64
#define DNL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/table.h"
#include "core/cpu/target_end.h"
#include "core/cpu/x86_features.h"
// clang-format on

DNL_TABLE(avx512_bf16, has_avx512_bf16)
#endif
