// Forward of whitened pairwise attention for halves on Hopper (sm_90a) in one kernel: what fused/forward.cuh computes,
// by TMA and wgmma, and with its last steps: y with offset and residual, row statistics, merge of splits.
//
// A block owns 128 queries and 256 value channels. Q stays in shared memory; one thread loads tiles of 64 keys, and of
// 64 keys of V, into a ring of five units. Two warpgroups have 64 queries each, and all of a row:
//
//     a thread   O: 64 x 256 of its warpgroup, 128 floats    S: 64 x 64, 32 floats    P: 16 registers, 16 bits each
//
//     thread that loads   Q K(0) | K(1) V(0) | K(2) V(1) | ...
//     warpgroup           S(0) P(0) | S(1), O += P(0) V(0); P(1) while V(0) is multiplied | S(2), O += P(1) V(1) ...
//
// P never leaves the registers: the rows and columns that a thread holds of a product are those that wgmma wants of its
// left operand, where eight columns of the one are eight k of the other. O is rescaled only where a maximum of the
// warp's rows grew.
//
// Channels beyond 256 are slices of other blocks, beside these: each makes the map anew, the same one. All three
// operands have one order in memory; one that has the other is copied.
#pragma once

#include "ops/pairwise/fused/output.cuh"
#include "ops/pairwise/hopper/hopper.h"
#include "ops/pairwise/hopper/ring.cuh"

namespace dnl {

constexpr int kHopperQueries = kForwardTiles[kHopperForwardTile].queries;
constexpr int kHopperKeys = kForwardTiles[kHopperForwardTile].keys;
constexpr int kHopperChannels = kForwardTiles[kHopperForwardTile].channels;
static_assert(kHopperQueries == 2 * kBox && kHopperKeys == kBox, "a warpgroup has a box of queries; a box of keys");
static_assert(kFusedWidth == kHopperChannels, "a unit holds keys and values alike");

constexpr int kForwardUnit = kHopperChannels / kBox * kBoxBytes;  // 64 positions x 256 channels
using ForwardRing = Ring<5, kForwardUnit>;
// Where things lie in shared memory, in bytes.
constexpr int kForwardQuery = ForwardRing::kBytes;
constexpr int kForwardBias = kForwardQuery + 2 * kForwardUnit;  // of the keys of each unit
constexpr int kForwardBarriers = kForwardBias + ForwardRing::kStages * kHopperKeys * int(sizeof(float));
static_assert(kHopperForwardBytes == kForwardBarriers + ForwardRing::kBarrierBytes + int(sizeof(uint64_t)) &&
                  kHopperForwardBytes <= 227 << 10,
              "what a block can have on compute capability 9.0");
constexpr int kGroupBarrier = kConsumerBarrier + 1;  // named barriers of the two warpgroups

template <class T>
struct HopperForward {
  FusedForward<T> op;            // its operands are those below
  TmaOperand query, key, value;  // (batches, positions, channels), all in one order
  TensorMap bias;                // (batches, 1, keys), if has_bias
  bool has_bias;
  int width_chunks;  // of 64 channels
};

using HopperPlace = ForwardPlace<ForwardTiling<kHopperQueries, kHopperKeys>>;

// By one thread: Q, then keys a tile ahead of values.
template <class T>
DNL_DEVICE void load_forward_units(const HopperForward<T>& forward, const HopperPlace& at, const ForwardRing& ring,
                                   unsigned char* memory, uint64_t* query_full) {
  RingProducer<ForwardRing> producer{ring, {}};
  mbarrier_arrive_expect(query_full, forward.width_chunks * 2 * kBoxBytes);
  for (int chunk = 0; chunk < forward.width_chunks; ++chunk)
    forward.query.template load<kHopperQueries>(memory + kForwardQuery + chunk * 2 * kBoxBytes, at.b, at.first_query,
                                                chunk * kBox, query_full);
  const auto load_keys = [&](int64_t tile) {
    float* bias = reinterpret_cast<float*>(memory + kForwardBias) + producer.at.stage * kHopperKeys;
    const int bias_bytes = forward.has_bias ? kHopperKeys * int(sizeof(float)) : 0;
    producer.fill(forward.width_chunks * kBoxBytes + bias_bytes, [&](unsigned char* unit, uint64_t* barrier) {
      for (int chunk = 0; chunk < forward.width_chunks; ++chunk)
        forward.key.template load<kHopperKeys>(unit + chunk * kBoxBytes, at.b, tile * kHopperKeys, chunk * kBox,
                                               barrier);
      if (forward.has_bias)
        tma_load_3d(bias, forward.bias, static_cast<int>(tile) * kHopperKeys, 0, static_cast<int>(at.b), barrier);
    });
  };
  const int64_t left = forward.op.channels - at.first_channel;
  const int chunks = static_cast<int>(ceil_div_of(left < kHopperChannels ? left : kHopperChannels, kBox));
  load_keys(at.begin);
  for (int64_t tile = at.begin; tile < at.end; ++tile) {
    if (tile + 1 < at.end) load_keys(tile + 1);
    producer.fill(chunks * kBoxBytes, [&](unsigned char* unit, uint64_t* barrier) {
      for (int chunk = 0; chunk < chunks; ++chunk)
        forward.value.template load<kHopperKeys>(unit + chunk * kBoxBytes, at.b, tile * kHopperKeys,
                                                 static_cast<int>(at.first_channel) + chunk * kBox, barrier);
    });
  }
}

// What a thread of the two warpgroups that multiply does: rows row and row + 8 of the tile of queries. Element
// [4 n + 2 h + u] of a product is at row + 8 h and column 8 n + lane % 4 * 2 + u.
template <class T, bool kChannelFirst>
struct ForwardConsumer {
  static constexpr int kScores = kHopperKeys / 2, kOutputs = kHopperChannels / 2;  // of a thread
  static constexpr int kSlices = kHopperKeys / kProductDepth;                      // wgmmas of P V
  // Products sum over channels in S and over keys in P V.
  static constexpr Along kInScores = kChannelFirst ? Along::mn : Along::k;
  static constexpr Along kInValues = kChannelFirst ? Along::k : Along::mn;
  const HopperForward<T>& forward;
  const FusedForward<T>& op;
  const HopperPlace& at;
  unsigned char* memory;
  RingConsumer<ForwardRing> ring;
  int lane, group, row;
  float most[2], sum[2], stored[2];  // of the rows: what P is relative to; sums of P, before and after rounding

  DNL_DEVICE ForwardConsumer(const HopperForward<T>& parameters, const HopperPlace& place, unsigned char* shared,
                             const ForwardRing& units)
      : forward(parameters), op(parameters.op), at(place), memory(shared), ring{units, {}, {}} {
    lane = threadIdx.x % kWarp;
    group = threadIdx.x / kWarpgroup;
    row = threadIdx.x / kWarp * 16 + lane / 4;
    for (int h = 0; h < 2; ++h) {
      most[h] = lowest();
      sum[h] = stored[h] = 0;
    }
  }

  DNL_DEVICE static float lowest() { return -std::numeric_limits<float>::infinity(); }

  // S of the next keys, under way when this returns. The bias of these keys, or null.
  DNL_DEVICE const float* multiply_scores(float (&s)[kScores]) {
    const float* bias = reinterpret_cast<const float*>(memory + kForwardBias) + ring.at.stage * kHopperKeys;
    const uint64_t keys = tile_descriptor<kInScores>(ring.next());
    const uint64_t queries = tile_descriptor<kInScores>(memory + kForwardQuery + group * kBoxBytes);
    const auto multiply = [&](int chunk, bool accumulate) {
      for (int slice = 0; slice < kBox / kProductDepth; ++slice)
        wgmma<T, kHopperKeys, kInScores, kInScores>(
            s, later(queries, chunk * 2 * kBoxBytes + slice * kNextDepth<kInScores>),
            later(keys, chunk * kBoxBytes + slice * kNextDepth<kInScores>), accumulate || slice > 0);
    };
    wgmma_fence();
    multiply(0, false);
    for (int chunk = 1; chunk < forward.width_chunks; ++chunk) multiply(chunk, true);
    wgmma_commit();
    return forward.has_bias ? bias : nullptr;
  }

  // O += P V of the next values, under way when this returns.
  DNL_DEVICE void multiply_values(float (&out)[kOutputs], const uint32_t (&p)[kSlices][4]) {
    const uint64_t values = tile_descriptor<kInValues>(ring.next());
    wgmma_fence();
    for (int slice = 0; slice < kSlices; ++slice)
      wgmma<T, kHopperChannels, kInValues>(out, p[slice], later(values, slice * kNextDepth<kInValues>), true);
    wgmma_commit();
  }

  // t of a tile in place of S; -inf beyond the last key.
  DNL_DEVICE void make_scores(float (&s)[kScores], const float* bias, int64_t tile) const {
    for (int n = 0; n < kHopperKeys / 8; ++n)
      for (int u = 0; u < 2; ++u) {
        const float more = bias ? bias[n * 8 + lane % 4 * 2 + u] : 0.0f;
        for (int h = 0; h < 2; ++h) s[4 * n + 2 * h + u] = s[4 * n + 2 * h + u] * op.sign + more;
      }
    const int64_t left = op.keys - tile * kHopperKeys;
    if (left >= kHopperKeys) return;
    for (int n = 0; n < kHopperKeys / 8; ++n)
      for (int e = 0; e < 4; ++e)
        if (n * 8 + lane % 4 * 2 + e % 2 >= left) s[4 * n + e] = lowest();
  }

  // P of a tile in place of its scores, and what the sums and O before it are to be multiplied by.
  DNL_DEVICE void make_probability(float (&s)[kScores], float (&correction)[2]) {
    float off[2];
    for (int h = 0; h < 2; ++h) {
      const float before = most[h];
      float largest = lowest();
      for (int n = 0; n < kHopperKeys / 8; ++n)
        for (int u = 0; u < 2; ++u) largest = fmaxf(largest, s[4 * n + 2 * h + u]);  // the one that is no NaN
      for (int step = 1; step <= 2; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
      most[h] = fmaxf(largest, before);
      off[h] = most[h] == lowest() ? 0.0f : most[h];  // -inf less -inf would be NaN
      correction[h] = exp2_approx((before - off[h]) * op.magnitude);
      sum[h] *= correction[h];
      stored[h] *= correction[h];
    }
    for (int e = 0; e < kScores; ++e) s[e] = exp2_approx((s[e] - off[e / 2 % 2]) * op.magnitude);
    for (int n = 0; n < kHopperKeys / 8; ++n)
      for (int h = 0; h < 2; ++h) sum[h] += s[4 * n + 2 * h] + s[4 * n + 2 * h + 1];
    settle(s);
  }

  // P as rounded, for wgmma: eight columns of S are eight k, registers r = 2 (n % 2) + h of the slice n / 2. Only while
  // no product reads `p`.
  DNL_DEVICE void round_probability(const float (&s)[kScores], uint32_t (&p)[kSlices][4]) {
    for (int n = 0; n < kHopperKeys / 8; ++n)
      for (int h = 0; h < 2; ++h) {
        const uint32_t packed = pack2<T>(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]);
        const Pair pair = unpack2<T>(packed);
        stored[h] += pair.lo + pair.hi;
        p[n / 2][n % 2 * 2 + h] = packed;
      }
    for (int slice = 0; slice < kSlices; ++slice) settle(p[slice]);
  }

  // Waits for O and rescales it where a maximum of the warp's rows grew. The wait is behind a branch, which is always
  // taken: what makes P stays before it, while products run, where ptxas would move it behind a wait in the same
  // straight line. All warps of a warpgroup have to come to the same waits, so the branch is none of theirs.
  DNL_DEVICE void rescale(float (&out)[kOutputs], const float (&correction)[2]) const {
    if (op.splits > 0) wgmma_wait<0>();
    wgmma_wait<0>();
    if (__any_sync(kAllLanes, correction[0] != 1.0f || correction[1] != 1.0f))
      for (int e = 0; e < kOutputs; ++e) out[e] *= correction[e / 2 % 2];
  }

  // Statistics of the rows; returns in `inverse` what makes y of O.
  DNL_DEVICE void finish_rows(float (&inverse)[2]) {
    for (int h = 0; h < 2; ++h) {
      for (int step = 1; step <= 2; step *= 2) {
        sum[h] += __shfl_xor_sync(kAllLanes, sum[h], step);
        stored[h] += __shfl_xor_sync(kAllLanes, stored[h], step);
      }
      const bool merge = op.splits > 1;
      inverse[h] = merge ? 1.0f : 1.0f / stored[h];
      const int64_t i = at.first_query + row + 8 * h;
      if (lane % 4 || i >= op.queries || at.slice) continue;
      if (merge) {
        float* to = op.split_statistics + 3 * ((at.split * op.batches + at.b) * op.queries + i);
        to[0] = most[h];
        to[1] = sum[h];
        to[2] = stored[h];
      } else {
        store_stats(most[h], sum[h], op.stats + 2 * (at.b * op.queries + i));
      }
    }
  }

  // The warpgroup's piece of y, or of O where splits are merged, in steps of 64 channels through shared memory, so that
  // lanes write neighbours in the order of the output.
  DNL_DEVICE void write(const float (&out)[kOutputs], const float (&inverse)[2]) const {
    constexpr int kStep = 64, kPitch = kStep + 1, kRows = kHopperQueries / 2;
    static_assert(2 * kRows * kPitch * int(sizeof(float)) <= ForwardRing::kBytes, "it takes the place of the ring");
    float* staging = reinterpret_cast<float*>(memory) + group * kRows * kPitch;
    const int64_t first_query = at.first_query + group * kRows;
    const int left = at_most_of(op.channels - at.first_channel, kHopperChannels);
    named_barrier(kConsumerBarrier, kConsumers);  // no product reads the ring any more
#pragma unroll                                    // or `out` is indexed, and leaves the registers
    for (int first = 0; first < kHopperChannels; first += kStep) {
      if (first >= left) break;
      for (int n = 0; n < kStep / 8; ++n)
        for (int e = 0; e < 4; ++e)
          staging[(row % kRows + e / 2 * 8) * kPitch + n * 8 + lane % 4 * 2 + e % 2] =
              out[first / 2 + 4 * n + e] * inverse[e / 2];
      named_barrier(kGroupBarrier + group, kWarpgroup);
      write_staged<kRows, kStep, kPitch>(op, staging, at.b, at.split, first_query, at.first_channel + first,
                                         left - first, threadIdx.x % kWarpgroup / kWarp, kWarpgroup / kWarp);
      named_barrier(kGroupBarrier + group, kWarpgroup);
    }
  }

  DNL_DEVICE void run(uint64_t* query_full) {
    float s[kScores], out[kOutputs] = {}, correction[2], inverse[2];
    uint32_t p[kSlices][4];
    mbarrier_wait(query_full, 0);
    const float* bias = multiply_scores(s);
    wgmma_wait<0>();
    make_scores(s, bias, at.begin);
    ring.release();
    make_probability(s, correction);
    round_probability(s, p);
    for (int64_t tile = at.begin + 1; tile < at.end; ++tile) {
      bias = multiply_scores(s);
      multiply_values(out, p);
      wgmma_wait<1>();
      make_scores(s, bias, tile);
      ring.release();  // the keys and their bias
      make_probability(s, correction);
      rescale(out, correction);
      ring.release();  // the values
      round_probability(s, p);
    }
    multiply_values(out, p);
    wgmma_wait<0>();
    finish_rows(inverse);
    write(out, inverse);
  }
};

template <class T, bool kChannelFirst>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForward<T> forward) {
  DNL_DYNAMIC_SHARED_TILES(unsigned char, memory);
  const ForwardRing ring(memory, memory + kForwardBarriers);
  uint64_t* query_full = reinterpret_cast<uint64_t*>(memory + kForwardBarriers + ForwardRing::kBarrierBytes);
  if (threadIdx.x == 0) {
    ring.init();
    mbarrier_init(query_full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  const HopperPlace at(forward.op);
  if (threadIdx.x >= kConsumers) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) load_forward_units(forward, at, ring, memory, query_full);
  } else {
    more_registers<kConsumerRegisters>();
    ForwardConsumer<T, kChannelFirst>(forward, at, memory, ring).run(query_full);
  }
}

// x where TMA can load it in that order, else a copy.
template <class T, class Device>
Matrix<const T> ordered_operand(Device& device, const Matrix<const T>& x, int64_t batches, int64_t positions,
                                int64_t channels, bool channel_first) {
  if (has_aligned_rows(x, positions, channels) && is_channel_first(x, channels) == channel_first) return x;
  const int64_t slow = channel_first ? channels : positions, pitch = pitch_of(channel_first ? positions : channels);
  Matrix<T> copy = dense(device.template allocate<T>(batches * slow * pitch), batches, slow, pitch);
  if (channel_first) copy = copy.transposed();
  affine(device, Affine<T, T>{x, copy, batches, positions, channels});
  return copy.read();
}

template <class T, class Device>
void pairwise_hopper_forward_cuda(const PairwiseArgs& args, Device& device, const ForwardPlan& plan) {
  const PairwiseOperands<T, Device, T> in(args, device, Placement::as_they_lie);
  const bool channel_first = position_is_fast(in.value, args.keys, args.channels);
  const auto operand = [&](const Matrix<const T>& x, int64_t positions, int64_t channels, int tile) {
    const auto placed = ordered_operand(device, x, args.batches, positions, channels, channel_first);
    return kRuns<Device> ? TmaOperand(placed, args.batches, positions, channels, tile) : TmaOperand();
  };
  HopperForward<T> forward{};
  forward.query = operand(in.query, args.queries, args.width, kHopperQueries);
  forward.key = operand(in.key, args.keys, args.width, kHopperKeys);
  forward.value = operand(in.value, args.keys, args.channels, kHopperKeys);
  forward.has_bias = in.bias.data;
  if (forward.has_bias && kRuns<Device>)
    forward.bias = tensor_map(in.bias.data, args.batches, 1, args.keys, in.bias.batch, in.bias.batch, 1, kHopperKeys);
  forward.width_chunks = static_cast<int>(ceil_div_of(args.width, kBox));

  FusedForward<T>& op = forward.op;
  op.output = matrix_of<T>("query", args.output, args.batches);
  op.residual = matrix_of<T>("query", args.residual, args.batches);
  op.offset = in.offset;
  op.stats = static_cast<float*>(args.stats);
  op.batches = args.batches, op.queries = args.queries, op.keys = args.keys, op.channels = args.channels;
  op.slice_channels = plan.slice_channels;
  op.slices = plan.slices, op.splits = plan.splits;
  op.position_fast = position_is_fast(op.output, args.queries, args.channels);
  op.sign = in.sign;
  op.magnitude = args.magnitude<float>(kLog2OfE);
  if (plan.splits > 1) {
    const int64_t rows = plan.splits * args.batches * args.queries;
    op.partial = device.template allocate<float>(rows * args.channels);
    op.split_statistics = device.template allocate<float>(rows * 3);
  }
  const auto kernel = channel_first ? &hopper_forward_kernel<T, true> : &hopper_forward_kernel<T, false>;
  const int64_t blocks = args.batches * ceil_div_of(args.queries, kHopperQueries) * plan.splits * plan.slices;
  device.launch(kernel, LaunchShape{blocks, kHopperThreads, kHopperForwardBytes}, forward);
  if (plan.splits > 1) {
    const int64_t merges = args.batches * ceil_div_of(args.queries, kWarp);
    device.launch(&fused_merge_kernel<T>, LaunchShape{merges, kThreads, 0}, op, int64_t(0), args.channels);
  }
}

}  // namespace dnl
