// Every wrapper of ptx_sm90.cuh, once, for nvcc: that its PTX assembles for sm_90a. (CMakeLists.txt, DNL_EXT_CUDA)
#include "core/cuda/ptx_sm90.cuh"

namespace dnl {

template <class T, int N, Along kA, Along kB>
__global__ void __launch_bounds__(kWarpgroup, 1)
    every_wrapper(float* out, const __grid_constant__ TensorMap map) {  // one warpgroup
  DNL_DYNAMIC_SHARED_TILES(unsigned char, shared);                      // an operand each side, an mbarrier
  unsigned char* right = shared + 64 * 128;
  auto* barrier = reinterpret_cast<uint64_t*>(right + N * 128);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 2);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, 64 * 128);
    tma_load_3d(shared, map, 0, 64, 0, barrier);
    mbarrier_arrive(barrier);
  }
  mbarrier_wait(barrier, 0);
  fewer_registers<240>();
  more_registers<248>();
  fence_async_proxy();
  float d[N / 2];
  const uint64_t a = wgmma_descriptor(shared, 0, 1024), b = wgmma_descriptor(right, 64 * 128, 1024);
  wgmma_fence();
  wgmma<T, N, kA, kB>(d, later(a, 32), b, false);
  wgmma_commit();
  wgmma_wait<0>();
  const uint32_t registers[4] = {pack2<T>(d[0], d[1]), pack2<T>(d[2], d[3]), pack2<T>(d[4], d[5]),
                                 pack2<T>(d[6], d[7])};
  wgmma_fence();
  wgmma<T, N, kB>(d, registers, b, true);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[threadIdx.x * (N / 2) + i] = d[i];
}

template __global__ void every_wrapper<__nv_bfloat16, 32, Along::k, Along::k>(float*,
                                                                              const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__nv_bfloat16, 64, Along::k, Along::mn>(float*,
                                                                               const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__nv_bfloat16, 128, Along::mn, Along::k>(float*,
                                                                                const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__nv_bfloat16, 256, Along::mn, Along::mn>(float*,
                                                                                 const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__half, 32, Along::mn, Along::mn>(float*, const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__half, 64, Along::mn, Along::k>(float*, const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__half, 128, Along::k, Along::mn>(float*, const __grid_constant__ TensorMap);
template __global__ void every_wrapper<__half, 256, Along::k, Along::k>(float*, const __grid_constant__ TensorMap);

}  // namespace dnl
