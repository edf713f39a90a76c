// What Hopper's kernels are made of: operands as TMA loads them, the ring of stages between the thread that loads and
// the warpgroups that multiply, and the tiles of a stage as wgmma reads them. Both orders of memory are served as they
// lie.
//
//   global memory             shared memory: boxes of 128-byte rows, swizzled      wgmma
//   rows (channel stride 1)   a row per position, 64 channels of it                k along the rows
//   channel-first             a row per channel, 64 positions of it                k across the rows
//
// A block is two warpgroups that multiply and one of which a single thread loads; that one hands its registers to the
// others. A stage is full when TMA has brought its bytes, and empty when every warp that multiplies has arrived.
#pragma once

#include "core/cuda/tensor_map.cuh"

namespace dnl {

constexpr int kConsumers = 2 * kWarpgroup, kConsumerWarps = kConsumers / kWarp;  // threads and warps that multiply
constexpr int kHopperThreads = kConsumers + kWarpgroup;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
static_assert(kConsumers * kConsumerRegisters + kWarpgroup * kProducerRegisters <= 64 << 10,
              "registers of a multiprocessor");
constexpr int kConsumerBarrier = 1;  // named barrier of the consumers

constexpr int kBox = 64;                          // 16-bit elements of a box's row
constexpr int kBoxBytes = kBox * kSwizzleBytes;   // of 64 rows
constexpr int kPatternBytes = 8 * kSwizzleBytes;  // after which the swizzle repeats
constexpr int kProductDepth = 16;                 // k of one wgmma
static_assert(kPatternBytes == kSwizzleAlignment, "tiles begin with the pattern");

// ---------------------------------------------------------------------------------------------------------------------
// Operands
// ---------------------------------------------------------------------------------------------------------------------

// Whether a product operand is dense along its positions.
template <class T>
bool is_channel_first(const Matrix<const T>& x, int64_t channels) {
  return !(x.channel == 1 && x.position % (16 / int64_t(sizeof(T))) == 0 && x.position >= channels);
}

// A (batches, positions, channels) matrix, loaded in tiles of 64 channels.
struct TmaOperand {
  TensorMap map;
  bool channel_first;
  bool shared_batch;  // every batch element is the same matrix

  TmaOperand() = default;
  // x as product_operand() (chain/operands.cuh) leaves it. `positions` and `channels` are not 0.
  template <class T>
  TmaOperand(const Matrix<const T>& x, int64_t batches, int64_t positions, int64_t channels, int tile_positions) {
    static_assert(kSwizzleElements<T> == kBox, "16-bit elements");
    const int64_t batch = x.batch.dims ? x.batch.stride[0] : 0;
    channel_first = is_channel_first(x, channels);
    shared_batch = batch == 0;
    const int64_t matrices = shared_batch ? 1 : batches;
    map = channel_first
              ? tensor_map(x.element(0), matrices, channels, positions, batch, x.channel, kBox, kBox)
              : tensor_map(x.element(0), matrices, positions, channels, batch, x.position, tile_positions, kBox);
  }

  // By one thread: kPositions positions from `position`, 64 channels from `channel`, to a tile of kPositions rows of
  // the swizzle; zeros where there are none. tile_positions was kPositions.
  template <int kPositions>
  DNL_DEVICE void load(unsigned char* tile, int64_t b, int64_t position, int channel, uint64_t* barrier) const {
    static_assert(kPositions % kBox == 0, "whole boxes");
    const int batch = shared_batch ? 0 : static_cast<int>(b), first = static_cast<int>(position);
    if (!channel_first) return tma_load_3d(tile, map, channel, first, batch, barrier);
    for (int box = 0; box < kPositions / kBox; ++box)
      tma_load_3d(tile + box * kBoxBytes, map, first + box * kBox, channel, batch, barrier);
  }
};

// Descriptor of what begins at `tile`: a box, or the first of several that follow one another along m or n.
template <Along kAlong>
DNL_DEVICE uint64_t tile_descriptor(const unsigned char* tile) {
  return wgmma_descriptor(tile, kAlong == Along::k ? 16 : kBoxBytes, kPatternBytes);
}
// From one wgmma's k to the next: along the rows, or across sixteen of them.
template <Along kAlong>
constexpr int kNextDepth = kAlong == Along::k ? kProductDepth * 2 : kProductDepth * kSwizzleBytes;

// f(order of the left operand, order of the right one) with the orders as types.
template <Along kAlong>
using Order = std::integral_constant<Along, kAlong>;
template <class F>
DNL_DEVICE void by_order(bool left_across, bool right_across, const F& f) {
  if (left_across) {
    if (right_across)
      f(Order<Along::mn>{}, Order<Along::mn>{});
    else
      f(Order<Along::mn>{}, Order<Along::k>{});
  } else {
    if (right_across)
      f(Order<Along::k>{}, Order<Along::mn>{});
    else
      f(Order<Along::k>{}, Order<Along::k>{});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The ring
// ---------------------------------------------------------------------------------------------------------------------

// Where one side is in the ring. Both sides pass the stages in the same order and start at the first.
template <int kStages>
struct RingPlace {
  int stage = 0, parity = 0;

  DNL_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <int kStages_, int kStageBytes>
struct Ring {
  static constexpr int kStages = kStages_, kBytes = kStages * kStageBytes;
  static constexpr int kBarrierBytes = 2 * kStages * int(sizeof(uint64_t));
  unsigned char* stages;
  uint64_t *full, *empty;  // of each stage

  DNL_DEVICE Ring(unsigned char* memory, void* barriers)
      : stages(memory), full(static_cast<uint64_t*>(barriers)), empty(full + kStages) {}

  // By one thread, before a __syncthreads.
  DNL_DEVICE void init() const {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, kConsumerWarps);
    }
  }
  DNL_DEVICE unsigned char* stage(int index) const { return stages + index * kStageBytes; }
};

// The side that loads.
template <class Ring>
struct RingProducer {
  Ring ring;
  RingPlace<Ring::kStages> at;

  // f(stage, barrier) issues loads of `bytes` bytes into the next stage, once it is empty.
  template <class F>
  DNL_DEVICE void fill(int bytes, const F& f) {
    mbarrier_wait(ring.empty + at.stage, at.parity ^ 1);
    mbarrier_arrive_expect(ring.full + at.stage, bytes);
    f(ring.stage(at.stage), ring.full + at.stage);
    at.advance();
  }
};

// The side that multiplies: every thread of both warpgroups. Stages are given back in the order in which they came,
// once no product reads them any more.
template <class Ring>
struct RingConsumer {
  Ring ring;
  RingPlace<Ring::kStages> at, held;  // the next stage to come, and the first that is not given back

  DNL_DEVICE const unsigned char* next() {
    mbarrier_wait(ring.full + at.stage, at.parity);
    const unsigned char* stage = ring.stage(at.stage);
    at.advance();
    return stage;
  }
  // After a wgmma_wait for all products of the first stage that is held.
  DNL_DEVICE void release() {
    __syncwarp();  // lanes of a warp do not wait together
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.empty + held.stage);
    held.advance();
  }
};

}  // namespace dnl
