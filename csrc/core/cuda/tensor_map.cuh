// Tensor maps, which tell TMA where a batch of matrices lies in global memory and in which boxes it is loaded. Host
// code.
#pragma once

#ifdef __CUDACC__
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#endif

#include <stdexcept>

#include "core/cuda/ptx_sm90.cuh"
#include "core/errors.h"

namespace dnl {

constexpr int kSwizzleBytes = 128;  // of a row of a box
template <class T>
constexpr int kSwizzleElements = kSwizzleBytes / sizeof(T);

#ifdef __CUDACC__
// The driver's function, asked for by name: nothing links to libcuda, so the library loads where there is no driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    constexpr const char* kName = "cuTensorMapEncodeTiled";
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050             // the other one ends with CUDA 12
    constexpr unsigned kSince = 12000;  // CUDA 12.0
    const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &function, kSince, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error(message("the CUDA driver has no cuTensorMapEncodeTiled, which CUDA 12.0 brought: ",
                                       cudaGetErrorString(error)));
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}
#endif

// Boxes of box_rows x box_columns of T data[batches][rows][columns] with strides in elements; in shared memory swizzled
// where a row of a box has 128 bytes and elements have 16 bits, which is how wgmma wants them. Rows and matrices start
// at multiples of 16 bytes.
template <class T>
TensorMap tensor_map(const T* data, int64_t batches, int64_t rows, int64_t columns, int64_t batch, int64_t pitch,
                     int box_rows, int box_columns) {
  constexpr int64_t kBytes = sizeof(T);
  if (batches == 1) batch = rows * pitch;  // never multiplied by anything but 0
  const bool swizzle = kHalf<T> && box_columns == kSwizzleElements<T>;
#ifdef __CUDACC__
  constexpr auto kType = std::is_same_v<T, __half>          ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                         : std::is_same_v<T, __nv_bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  static_assert(kHalf<T> || std::is_same_v<T, float>, "types that are written out here");
  TensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(batches)};
  const cuuint64_t strides[] = {cuuint64_t(pitch * kBytes), cuuint64_t(batch * kBytes)};
  const cuuint32_t box[] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1}, steps[] = {1, 1, 1};
  const CUresult result = tensor_map_encoder()(&map, kType, 3, const_cast<T*>(data), sizes, strides, box, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE,
                                               swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(message("cuTensorMapEncodeTiled: error ", int(result), " for ", batches, " x ", rows,
                                     " x ", columns, " elements, strides ", batch, ", ", pitch));
  return map;
#else
  return TensorMap::make(data, kBytes, batches, rows, columns, batch * kBytes, pitch * kBytes, box_rows, box_columns,
                         swizzle);
#endif
}

}  // namespace dnl
