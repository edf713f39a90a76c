// What every CUDA kernel here is written with: element types, strided matrices by value, warp and block reductions.
//
// No torch header and no launch: a kernel file compiles alone, with nvcc or, after tests/emulator/emulator.h has
// defined CUDA's names, with a host compiler. What C++ has no name for is in ptx.cuh.
//
// How kernels share out work, unless they ask for a LaunchShape: a launch names a number of Tasks, blocks take tasks
// blockIdx.x, blockIdx.x + gridDim.x, ... So no count of rows or batch elements can exceed a limit of the grid.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <type_traits>

#include "core/online_softmax.h"
#include "core/types.h"

#ifdef __CUDACC__
#define DNL_DEVICE __device__ __forceinline__
#else
#define DNL_DEVICE inline
#endif

namespace dnl {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, unless it has a LaunchShape
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "reductions combine whole warps, at most one warp of them");

// A launch of blocks of kThreads threads.
struct Tasks {
  int64_t count;
  int64_t shared_bytes;  // dynamic shared memory of a block

  Tasks(int64_t number, int64_t bytes = 0) : count(number), shared_bytes(bytes) {}
};

// A launch that is not of tasks: a one-dimensional grid, whose kernel takes blockIdx.x apart itself.
struct LaunchShape {
  int64_t blocks;
  int threads;               // of a block
  int64_t shared_bytes = 0;  // dynamic shared memory of a block
};

constexpr int64_t ceil_div_of(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up_to(int64_t a, int64_t b) { return ceil_div_of(a, b) * b; }

// Our own buffers have rows of whole 16-byte lines in every type, so that quads (below) and cuBLAS find them aligned.
constexpr int64_t kPitch = 8;
constexpr int64_t pitch_of(int64_t columns) { return round_up_to(columns > 0 ? columns : 1, kPitch); }

// ---------------------------------------------------------------------------------------------------------------------
// Element types
// ---------------------------------------------------------------------------------------------------------------------

// Type of sums and softmax statistics.
template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// bfloat16 and float16: products take the operands as they are (exact in float accumulators) and never round again.
template <class T>
constexpr bool kHalf = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;

// A float in TF32 as tensor cores read it: 10 bits of fraction, the last 13 bits zero. rounded<Tf32>() is in ptx.cuh.
struct Tf32 {
  float value;
};

// What the fused kernels multiply in a call of type T, and the type of the call from that.
template <class T>
using FusedOf = std::conditional_t<std::is_same_v<T, float>, Tf32, T>;
template <class T>
using ResultOf = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;

DNL_HOST_DEVICE double wide(double x) { return x; }
DNL_HOST_DEVICE float wide(float x) { return x; }
DNL_HOST_DEVICE float wide(Tf32 x) { return x.value; }
DNL_HOST_DEVICE float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
DNL_HOST_DEVICE float wide(__half x) { return __half2float(x); }

template <class T>
DNL_HOST_DEVICE T rounded(AccOf<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// Four neighbours, read and written at once.
constexpr int kQuad = 4;
static_assert(kPitch % kQuad == 0, "rows of our own buffers are whole quads");
template <class T>
struct alignas(sizeof(T) * kQuad > 16 ? 16 : sizeof(T) * kQuad) Quad {
  T value[kQuad];
};

template <class T>
DNL_HOST_DEVICE Quad<T> load_quad(const T* row, int64_t quad) {
  return reinterpret_cast<const Quad<T>*>(row)[quad];
}
template <class T>
DNL_HOST_DEVICE void store_quad(T* row, int64_t quad, const Quad<T>& x) {
  reinterpret_cast<Quad<T>*>(row)[quad] = x;
}

// Calls f(T{}) with the element type of `dtype`.
template <class F>
void dispatch_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(double{});
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Strided operands, passed to kernels by value
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kMaxBatchDims = 8;

// Element offset of a flattened batch index over up to kMaxBatchDims dimensions, innermost first.
struct Batch {
  int dims = 0;
  int64_t first = 0;  // added to every index: a run of batch elements that starts later
  int64_t size[kMaxBatchDims] = {};
  int64_t stride[kMaxBatchDims] = {};

  DNL_HOST_DEVICE int64_t offset(int64_t index) const {
    int64_t result = 0;
    index += first;
    for (int d = 0; d + 1 < dims; ++d) {
      result += index % size[d] * stride[d];
      index /= size[d];
    }
    return dims ? result + index * stride[dims - 1] : 0;
  }
};

// The sizes and strides behind a list of `count` offsets, which the operators make by walking leading dimensions.
// Neighbouring dimensions that merge are merged. Returns false if more than kMaxBatchDims are left.
inline bool batch_of_offsets(const int64_t* offsets, int64_t count, Batch& batch) {
  batch = Batch{};
  for (int64_t unit = 1; unit < count;) {
    if (batch.dims == kMaxBatchDims) return false;
    const int64_t stride = offsets[unit] - offsets[0];
    int64_t size = 2;
    while (size * unit < count && offsets[size * unit] - offsets[(size - 1) * unit] == stride) ++size;
    batch.size[batch.dims] = size;
    batch.stride[batch.dims++] = stride;
    unit *= size;
  }
  return true;
}

inline Batch single_batch(int64_t batches, int64_t stride) {
  Batch batch;
  batch.dims = 1;
  batch.size[0] = batches;
  batch.stride[0] = stride;
  return batch;
}

// A (batches, positions, channels) matrix anywhere in memory.
template <class T>
struct Matrix {
  T* data = nullptr;
  Batch batch;
  int64_t position = 0, channel = 0;  // strides, in elements

  DNL_HOST_DEVICE T* element(int64_t b) const { return data + batch.offset(b); }
  DNL_HOST_DEVICE T* element(int64_t b, int64_t i, int64_t c) const { return element(b) + i * position + c * channel; }
  Matrix<const T> read() const { return {data, batch, position, channel}; }

  // The same matrix from batch element b and position i on.
  Matrix from(int64_t b, int64_t i) const {
    Matrix result = *this;
    result.batch.first += b;
    result.data += i * position;
    return result;
  }
  Matrix transposed() const { return {data, batch, channel, position}; }
};

// A (batches, rows, columns) buffer of our own with rows `pitch` apart.
template <class T>
Matrix<T> dense(T* data, int64_t batches, int64_t rows, int64_t pitch) {
  return {data, single_batch(batches, rows * pitch), pitch, 1};
}

// A vector per batch element, dense; data = nullptr where there is none.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0;  // stride between batch elements

  DNL_HOST_DEVICE T* element(int64_t b) const { return data + b * batch; }
  Rows<const T> read() const { return {data, batch}; }
  Rows from(int64_t b, int64_t i) const { return {data ? data + b * batch + i : nullptr, batch}; }
};

// Whether neighbouring lanes should take neighbouring positions rather than neighbouring channels.
template <class T>
bool position_is_fast(const Matrix<T>& x, int64_t positions, int64_t channels) {
  if (channels <= 1) return true;
  if (positions <= 1) return false;
  return x.position < x.channel;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions. The order is fixed, so equal inputs give equal bits.
// ---------------------------------------------------------------------------------------------------------------------

// Sum over the warp, in every lane.
template <class A>
DNL_DEVICE A warp_sum(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sum over the block, in every thread. `scratch`: kWarps values in shared memory, free again at the next barrier.
template <class A>
DNL_DEVICE A block_sum(A x, A* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  A total = 0;
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  return total;
}

// Largest value of the block that is a number, in every thread; -inf if there is none.
template <class A>
DNL_DEVICE A block_max(A x, A* scratch) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = scratch[w] > x ? scratch[w] : x;
  return x;
}

// The merged state of the block, in every thread. `most` and `sum`: kWarps values each in shared memory, as above.
template <class A>
DNL_DEVICE OnlineSoftmax<A> block_merge(OnlineSoftmax<A> state, A* most, double* sum) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    OnlineSoftmax<A> other;
    other.most = __shfl_xor_sync(kAllLanes, state.most, step);
    other.sum = __shfl_xor_sync(kAllLanes, state.sum, step);
    state.merge(other);
  }
  if (threadIdx.x % kWarp == 0) {
    most[threadIdx.x / kWarp] = state.most;
    sum[threadIdx.x / kWarp] = state.sum;
  }
  __syncthreads();
  OnlineSoftmax<A> total;
  for (int w = 0; w < kWarps; ++w) {
    OnlineSoftmax<A> other;
    other.most = most[w];
    other.sum = sum[w];
    total.merge(other);
  }
  return total;
}

}  // namespace dnl
