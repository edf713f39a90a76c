// Every wrapper of ptx.cuh, once, for nvcc: that its PTX assembles. (CMakeLists.txt, DNL_EXT_CUDA)
#include "core/cuda/ptx.cuh"

namespace dnl {

template <class T>
__global__ void every_wrapper(float* out, const T* in, int count) {  // one warp; (32, 8) elements
  DNL_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x;
  cp_async_16(shared + lane * 8, in + lane * 8, lane < count);
  cp_async_commit();
  cp_async_wait<1>();
  cp_async_wait<0>();
  named_barrier(1, kWarp);
  uint32_t a[4], b[2];
  float d[4] = {};
  ldmatrix_x4(a, shared + lane * 8);
  ldmatrix_x2(b, shared + lane * 8);
  mma_m16n8k16<T>(d, a, b);
  ldmatrix_x4_trans(a, shared + lane * 8);
  ldmatrix_x2_trans(b, shared + lane * 8);
  mma_m16n8k16<T>(d, a, b);
  const uint32_t left[4] = {to_tf32(d[0]), to_tf32(d[1]), to_tf32(d[2]), to_tf32(d[3])};
  mma_m16n8k8_tf32(d, left, b);
  const Pair pair = unpack2<T>(pack2<T>(d[0], d[1]));
  out[lane] = exp2_approx(pair.lo) + pair.hi;
}

template __global__ void every_wrapper(float*, const __nv_bfloat16*, int);
template __global__ void every_wrapper(float*, const __half*, int);

}  // namespace dnl
