// Hopper's instructions (compute capability 9.0): mbarriers, loads by the tensor memory accelerator (TMA), products of
// a warpgroup (wgmma), registers handed from one warpgroup to another. As in ptx.cuh, every wrapper has a body for nvcc
// and one that calls the emulator, which must have seen emulator.h and sm90.h before. Compile for sm_90a.
//
// Operands of wgmma lie in shared memory in the 128-byte swizzle: memory in rows of 128 bytes, where 16-byte chunk c of
// row r lies in place of chunk c ^ (r % 8). Tiles begin at multiples of 1024 bytes. TMA writes them that way.
#pragma once

#ifdef __CUDACC__
#include <cuda.h>
#endif

#include "core/cuda/ptx.cuh"

// As DNL_DYNAMIC_SHARED, aligned for swizzled tiles. A kernel uses one of the two.
#ifdef __CUDACC__
#define DNL_DYNAMIC_SHARED_TILES(T, name)                                                 \
  extern __shared__ __align__(::dnl::kSwizzleAlignment) unsigned char dnl_shared_tiles[]; \
  T* name = reinterpret_cast<T*>(dnl_shared_tiles)
#else
#define DNL_DYNAMIC_SHARED_TILES(T, name) \
  T* name = reinterpret_cast<T*>(::emulator::machine().dynamic_shared(::dnl::kSwizzleAlignment))
#endif

namespace dnl {

constexpr int kSwizzleAlignment = 1024;  // bytes
constexpr int kWarpgroup = 128;          // threads

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier: eight bytes of shared memory that complete a phase when all arrivals and all announced bytes have come
// ---------------------------------------------------------------------------------------------------------------------

// By one thread; others may use it after fence_mbarrier_init() by that thread and a __syncthreads.
DNL_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals DNL_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  emulator::mbarrier_init(barrier, arrivals, site);
#endif
}

DNL_DEVICE void fence_mbarrier_init() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DNL_DEVICE void mbarrier_arrive(uint64_t* barrier DNL_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  emulator::mbarrier_arrive(barrier, 0, site);
#endif
}

// An arrival that announces bytes which loads will bring.
DNL_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes DNL_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  emulator::mbarrier_arrive(barrier, bytes, site);
#endif
}

// Until the phase of that parity has completed. The first phase has parity 0; before it, parity 1 counts as complete.
DNL_DEVICE void mbarrier_wait(uint64_t* barrier, int parity DNL_SITE) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(barrier);
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#else
  emulator::mbarrier_wait(barrier, parity, site);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA
// ---------------------------------------------------------------------------------------------------------------------

// Describes a batch of matrices in global memory (tensor_map.cuh makes one); a kernel takes it in a parameter that is
// `const __grid_constant__`, since TMA reads it where it lies.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// By one thread: the box whose first element is (row, column) of matrix `batch`, to `shared`. Elements outside of the
// matrix become 0. Its bytes, those outside included, count towards the barrier's phase.
DNL_DEVICE void tma_load_3d(void* shared, const TensorMap& map, int column, int row, int batch,
                            uint64_t* barrier DNL_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(batch), "r"(shared_address(barrier))
      : "memory");
#else
  emulator::tma_load_3d(shared, map, column, row, batch, barrier, site);
#endif
}

// Makes what this thread wrote to shared memory visible to TMA and wgmma. A barrier must follow.
DNL_DEVICE void fence_async_proxy() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::fence_async_proxy();
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Registers. A block starts with as many for every thread; a warpgroup that needs few gives them up to one that needs
// many. All threads of the warpgroup take part. N is a multiple of 8.
// ---------------------------------------------------------------------------------------------------------------------

template <int N>
DNL_DEVICE void fewer_registers(DNL_ONLY_SITE) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "what setmaxnreg takes");
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#else
  emulator::set_registers(N, false, site);
#endif
}

// Waits until others have given up enough.
template <int N>
DNL_DEVICE void more_registers(DNL_ONLY_SITE) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "what setmaxnreg takes");
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#else
  emulator::set_registers(N, true, site);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: d (64, N) = a (64, 16) b (16, N), plus d where `accumulate`. Of the warpgroup's 128 threads, thread t holds
//   d[i]: row t / 32 * 16 + t % 32 / 4 + 8 (i / 2 % 2), column i / 4 * 8 + t % 4 * 2 + i % 2
//   a[r], where a comes in registers, half h: row t / 32 * 16 + t % 32 / 4 + 8 (r % 2), k = t % 4 * 2 + h + 8 (r / 2)
// ---------------------------------------------------------------------------------------------------------------------

// Which index of an operand in shared memory runs along the 128-byte rows: k, or its other one (m of a, n of b).
enum class Along { k, mn };

// An operand that begins at `shared`. Along::k: rows of 64 k, eight to a pattern, `stride_bytes` from one pattern to
// the next eight rows; 16 further k begin 32 bytes on, and `leading_bytes` is not looked at. Along::mn: rows of 64 m or
// n for one k each; `stride_bytes` to the next eight k, `leading_bytes` to the next 64 m or n.
//
// Fields, PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout", matrix descriptor format, byte counts
// without their last four bits: 0-13 address, 16-29 leading dimension offset, 32-45 stride dimension offset, 49-51 base
// offset (0: patterns begin at multiples of 1024 bytes), 62-63 swizzle (1: 128 bytes). What the two offsets mean for
// either order of a swizzled operand: there under "Strides", and CUTLASS, cute/atom/mma_traits_sm90_gmma.hpp, the
// canonical layouts B128 of make_gmma_desc.
DNL_DEVICE uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(shared);
#else
  const uint32_t address = emulator::shared_address(shared);
#endif
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  const auto field = [](uint64_t bytes) { return bytes >> 4 & 0x3fff; };
  return field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | kSwizzle128;
}

// The operand that begins `bytes` later: shared memory ends below 2^18 bytes, so the address stays in its field.
DNL_DEVICE uint64_t later(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Before the first wgmma of a warpgroup, and after registers that one will use have been written.
DNL_DEVICE void wgmma_fence(DNL_ONLY_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_fence(site);
#endif
}

// The registers hold these values from here on: the compiler does not move what makes them to behind a wgmma or a wait
// for one that comes later.
DNL_DEVICE void settle([[maybe_unused]] uint32_t (&a)[4]) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
#endif
}
template <int N>
DNL_DEVICE void settle([[maybe_unused]] float (&x)[N]) {
#ifdef __CUDACC__
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
#endif
}

// Ends a group of wgmmas.
DNL_DEVICE void wgmma_commit(DNL_ONLY_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulator::wgmma_commit(site);
#endif
}

// Waits until at most N of the latest groups are under way; the results of the others can be read.
template <int N>
DNL_DEVICE void wgmma_wait(DNL_ONLY_SITE) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  emulator::wgmma_wait(N, site);
#endif
}

#ifdef __CUDACC__
// Operand lists of the asm statements below: N / 2 floats of d, by their number.
#define DNL_OUT8(d, i)                                                                                                \
  "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), \
      "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define DNL_OUT16(d, i) DNL_OUT8(d, i), DNL_OUT8(d, i + 8)
#define DNL_OUT32(d, i) DNL_OUT16(d, i), DNL_OUT16(d, i + 16)
#define DNL_OUT64(d, i) DNL_OUT32(d, i), DNL_OUT32(d, i + 32)
#define DNL_OUT128(d, i) DNL_OUT64(d, i), DNL_OUT64(d, i + 64)
#define DNL_REGISTERS16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define DNL_REGISTERS32 \
  DNL_REGISTERS16       \
  ","                   \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define DNL_REGISTERS64                                              \
  DNL_REGISTERS32                                                    \
  ","                                                                \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define DNL_REGISTERS128                                                         \
  DNL_REGISTERS64                                                                \
  ","                                                                            \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"             \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"             \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// With a in shared memory (a, b, accumulate, and whether each lies along its other index), and in registers.
#define DNL_WGMMA_SHARED(N, R, TYPE, A, B, P, TA, TB)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" DNL_REGISTERS##R "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}"                \
               : DNL_OUT##R(d, 0)                                                                                   \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA == Along::mn)), "n"(int(kB == Along::mn))         \
               : "memory")
#define DNL_WGMMA_REGISTERS(N, R, TYPE, A0, A1, A2, A3, B, P, TB)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE  \
               "." TYPE " {" DNL_REGISTERS##R "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #TB    \
                                              ";\n}"                                                                 \
               : DNL_OUT##R(d, 0)                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB == Along::mn)) \
               : "memory")
#endif

// T is __nv_bfloat16 or __half; N is 32, 64, 128 or 256. Both operands in shared memory, by their descriptors.
template <class T, int N, Along kA = Along::k, Along kB = Along::k>
DNL_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate DNL_SITE) {
  static_assert(kHalf<T> && (N == 32 || N == 64 || N == 128 || N == 256), "shapes and types that are written out here");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (N == 32) DNL_WGMMA_SHARED(32, 16, "bf16", 16, 17, 18, 19, 20);
    if constexpr (N == 64) DNL_WGMMA_SHARED(64, 32, "bf16", 32, 33, 34, 35, 36);
    if constexpr (N == 128) DNL_WGMMA_SHARED(128, 64, "bf16", 64, 65, 66, 67, 68);
    if constexpr (N == 256) DNL_WGMMA_SHARED(256, 128, "bf16", 128, 129, 130, 131, 132);
  } else {
    if constexpr (N == 32) DNL_WGMMA_SHARED(32, 16, "f16", 16, 17, 18, 19, 20);
    if constexpr (N == 64) DNL_WGMMA_SHARED(64, 32, "f16", 32, 33, 34, 35, 36);
    if constexpr (N == 128) DNL_WGMMA_SHARED(128, 64, "f16", 64, 65, 66, 67, 68);
    if constexpr (N == 256) DNL_WGMMA_SHARED(256, 128, "f16", 128, 129, 130, 131, 132);
  }
#else
  emulator::wgmma<T, N, kA == Along::k, kB == Along::k>(d, nullptr, a, b, accumulate, site);
#endif
}

// With a in registers.
template <class T, int N, Along kB = Along::k>
DNL_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate DNL_SITE) {
  static_assert(kHalf<T> && (N == 32 || N == 64 || N == 128 || N == 256), "shapes and types that are written out here");
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (N == 32) DNL_WGMMA_REGISTERS(32, 16, "bf16", 16, 17, 18, 19, 20, 21, 22);
    if constexpr (N == 64) DNL_WGMMA_REGISTERS(64, 32, "bf16", 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 128) DNL_WGMMA_REGISTERS(128, 64, "bf16", 64, 65, 66, 67, 68, 69, 70);
    if constexpr (N == 256) DNL_WGMMA_REGISTERS(256, 128, "bf16", 128, 129, 130, 131, 132, 133, 134);
  } else {
    if constexpr (N == 32) DNL_WGMMA_REGISTERS(32, 16, "f16", 16, 17, 18, 19, 20, 21, 22);
    if constexpr (N == 64) DNL_WGMMA_REGISTERS(64, 32, "f16", 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 128) DNL_WGMMA_REGISTERS(128, 64, "f16", 64, 65, 66, 67, 68, 69, 70);
    if constexpr (N == 256) DNL_WGMMA_REGISTERS(256, 128, "f16", 128, 129, 130, 131, 132, 133, 134);
  }
#else
  emulator::wgmma<T, N, true, kB == Along::k>(d, a, 0, b, accumulate, site);
#endif
}

#ifdef __CUDACC__
#undef DNL_OUT8
#undef DNL_OUT16
#undef DNL_OUT32
#undef DNL_OUT64
#undef DNL_OUT128
#undef DNL_REGISTERS16
#undef DNL_REGISTERS32
#undef DNL_REGISTERS64
#undef DNL_REGISTERS128
#undef DNL_WGMMA_SHARED
#undef DNL_WGMMA_REGISTERS
#endif

}  // namespace dnl
