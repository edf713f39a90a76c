// The CPU kernels for NEON with BF16 products (Armv8.6, or FEAT_BF16 from Armv8.2 on).
#include "core/cpu/arm_features.h"
#ifdef DNL_HAS_NEON_BF16
#define DNL_NEON
#define DNL_BF16_PRODUCTS
#define DNL_ISA neon_bf16
#define DNL_VECTOR_BYTES 16
#define DNL_TARGET "arch=armv8.2-a+bf16"
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/table.h"
#include "core/cpu/target_end.h"
// clang-format on

DNL_TABLE(neon_bf16, cpu_has_bf16)
#endif
