// Instructions that C++ has no name for, up to compute capability 8.0: tensor-core products, matrix loads, asynchronous
// copies, named barriers. The only file with inline PTX of those (ptx_sm90.cuh has Hopper's). Every wrapper has two
// bodies: PTX under nvcc, and a call of the emulator (tests/emulator) on a host compiler, which must have seen
// emulator.h before.
//
// Fragments are those of the PTX ISA, "Warp-level matrix instructions". With group = lane / 4 and member = lane % 4:
//   m16n8k16  a[r], half h:  row group + 8 (r % 2),  k = 2 member + h + 8 (r / 2)
//             b[r], half h:  k = 2 member + h + 8 r,  column group
//             d[r]:          row group + 8 (r / 2),  column 2 member + r % 2
//   m16n8k8   a[r]: row group + 8 (r % 2), k = member + 4 (r / 2);  b[r]: k = member + 4 r, column group;  d as above
#pragma once

#include <cstdint>

#include "core/cuda/device.cuh"

// The line of a call, for the emulator's reports: a last (or only) parameter that nvcc never sees.
#ifdef __CUDACC__
#define DNL_SITE
#define DNL_ONLY_SITE
#else
#define DNL_ONLY_SITE emulator::Site site = emulator::Site::here()
#define DNL_SITE , DNL_ONLY_SITE
#endif

// Dynamic shared memory of the block as T* name, aligned to kSharedAlignment.
#ifdef __CUDACC__
#define DNL_DYNAMIC_SHARED(T, name)                                                      \
  extern __shared__ __align__(::dnl::kSharedAlignment) unsigned char dnl_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(dnl_shared_bytes)
#else
#define DNL_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(::emulator::machine().dynamic_shared(::dnl::kSharedAlignment))
#endif

namespace dnl {

constexpr int kSharedAlignment = 128;  // bytes

#ifdef __CUDACC__
// The address of something in shared memory, in the form that PTX takes.
DNL_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Pairs of 16-bit elements in a register
// ---------------------------------------------------------------------------------------------------------------------

struct Pair {
  float lo, hi;
};

// T is __nv_bfloat16 or __half. Rounds to nearest; `lo` goes to the low half.
template <class T>
DNL_DEVICE uint32_t pack2(float lo, float hi) {
  static_assert(kHalf<T>, "two elements to a register");
#ifdef __CUDACC__
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(lo, hi);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
#else
  return uint32_t(rounded<T>(lo).bits) | uint32_t(rounded<T>(hi).bits) << 16;
#endif
}

template <class T>
DNL_DEVICE Pair unpack2(uint32_t bits) {
  static_assert(kHalf<T>, "two elements to a register");
  T pair[2];
  memcpy(pair, &bits, sizeof(bits));
  return {wide(pair[0]), wide(pair[1])};
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor cores: d += a b, with a (16, K) by rows, b (K, 8) by columns, d (16, 8)
// ---------------------------------------------------------------------------------------------------------------------

// T is __nv_bfloat16 or __half; K = 16.
template <class T>
DNL_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] DNL_SITE) {
  static_assert(kHalf<T>, "16-bit operands");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma<T>("mma_m16n8k16", d, a, b, site);
#endif
}

// Operands in TF32: floats through to_tf32(); K = 8.
DNL_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] DNL_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma<float>("mma_m16n8k8_tf32", d, a, b, site);
#endif
}

// The nearest TF32 value (10 bits of fraction), ties away from zero. Host code can name it, as rounded<T>() is for
// both.
DNL_HOST_DEVICE uint32_t to_tf32(float x) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#elif defined(__CUDACC__)
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return x != x ? 0x7fffffffu : (bits + 0x1000u) & ~0x1fffu;
#else
  return emulator::to_tf32(x);
#endif
}

DNL_DEVICE uint32_t bits_of(Tf32 x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <>
DNL_HOST_DEVICE Tf32 rounded<Tf32>(float x) {
  const uint32_t bits = to_tf32(x);
  Tf32 result;
  memcpy(&result, &bits, sizeof(bits));
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix loads: 8 x 8 matrices of 16-bit elements. Lane 8 m + r passes the address of row r of matrix m (16 bytes,
// aligned to 16); in result[m] lane 4 i + j receives elements (i, 2 j) and (i, 2 j + 1), transposed (2 j, i) and
// (2 j + 1, i).
// ---------------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
#define DNL_LDMATRIX_X4(modifier)                                                          \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0,%1,%2,%3}, [%4];" \
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])        \
               : "r"(shared_address(shared))                                               \
               : "memory")
#define DNL_LDMATRIX_X2(modifier)                                                    \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0,%1}, [%2];" \
               : "=r"(result[0]), "=r"(result[1])                                    \
               : "r"(shared_address(shared))                                         \
               : "memory")
#endif

DNL_DEVICE void ldmatrix_x4(uint32_t (&result)[4], const void* shared DNL_SITE) {
#ifdef __CUDACC__
  DNL_LDMATRIX_X4("");
#else
  emulator::ldmatrix<4, false>(result, shared, site);
#endif
}

DNL_DEVICE void ldmatrix_x4_trans(uint32_t (&result)[4], const void* shared DNL_SITE) {
#ifdef __CUDACC__
  DNL_LDMATRIX_X4(".trans");
#else
  emulator::ldmatrix<4, true>(result, shared, site);
#endif
}

DNL_DEVICE void ldmatrix_x2(uint32_t (&result)[2], const void* shared DNL_SITE) {
#ifdef __CUDACC__
  DNL_LDMATRIX_X2("");
#else
  emulator::ldmatrix<2, false>(result, shared, site);
#endif
}

DNL_DEVICE void ldmatrix_x2_trans(uint32_t (&result)[2], const void* shared DNL_SITE) {
#ifdef __CUDACC__
  DNL_LDMATRIX_X2(".trans");
#else
  emulator::ldmatrix<2, true>(result, shared, site);
#endif
}

#ifdef __CUDACC__
#undef DNL_LDMATRIX_X4
#undef DNL_LDMATRIX_X2
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies of 16 bytes from global to shared memory, past the first-level cache. Both addresses are aligned
// to 16. Landed copies are visible to the thread that waited; others need a barrier after it.
// ---------------------------------------------------------------------------------------------------------------------

// Where `valid` is false, `global` is not read and 16 zero bytes are written.
DNL_DEVICE void cp_async_16(void* shared, const void* global, bool valid DNL_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  emulator::cp_async(shared, global, valid, site);
#endif
}

// Ends a group of copies.
DNL_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits until at most N of this thread's latest groups are under way.
template <int N>
DNL_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  emulator::cp_async_wait(N);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// The rest
// ---------------------------------------------------------------------------------------------------------------------

// A barrier among `threads` threads (whole warps) of the block; id 1 to 15 (0 is __syncthreads's).
DNL_DEVICE void named_barrier(int id, int threads DNL_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier(id, threads, site);
#endif
}

// 2^x to about 2 units in the last place of a float; results below the smallest normal number are 0.
DNL_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::exp2_flushed(x);
#endif
}

}  // namespace dnl
