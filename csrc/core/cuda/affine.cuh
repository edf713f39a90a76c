// out = scale f_b (alpha_p x + beta_p gamma_c): the one elementwise kernel. It centres (alpha = 1, beta = -1, gamma =
// mean), copies into another pitch or layout, and writes every result: a sum in float scaled, a rank-one term added,
// rounded once to the output's type and placed where the output lies. What rounding took can be kept beside it.
//
// A block takes a tile of kTileSlow x kTileFast elements, lanes along whichever of positions and channels lies closer
// together in the output. Traded away: vector loads, as in reduce.cuh.
#pragma once

#include "core/cuda/device.cuh"

namespace dnl {

constexpr int kPerLane = 4;
constexpr int kTileFast = kWarp * kPerLane;
constexpr int kTileSlow = 32;
static_assert(kTileSlow % kWarps == 0, "warps share the rows of a tile evenly");

template <class In, class Out>
struct Affine {
  using A = AccOf<Out>;
  Matrix<const In> in;  // (batches, positions, channels); data = nullptr leaves the first term out
  Matrix<Out> out;      // the same shape
  int64_t batches, positions, channels;
  Matrix<Out> rest = {};  // the same shape: what rounding took from `out`; or data = nullptr
  A alpha = 1;
  Rows<const A> alpha_row = {};  // (batches, positions), multiplies alpha; or null
  A beta = 1;
  Rows<const A> beta_row = {};  // (batches, positions), multiplies beta; or null
  const A* gamma = nullptr;     // (batches, channels); nullptr leaves the second term out
  A scale = 1;
  const A* factor = nullptr;  // (batches), multiplies scale; or nullptr
  // Extents of `out`, which is 0 beyond the above. Not with `rest`.
  int64_t written_positions = positions, written_channels = channels;

  void zeros_to(int64_t all_positions, int64_t all_channels) {
    written_positions = all_positions;
    written_channels = all_channels;
  }
};

template <class In, class Out, bool kPositionFast>
__global__ void __launch_bounds__(kThreads) affine_kernel(Affine<In, Out> op, int64_t tasks) {
  using A = AccOf<Out>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t slow_count = kPositionFast ? op.written_channels : op.written_positions;
  const int64_t fast_count = kPositionFast ? op.written_positions : op.written_channels;
  const int64_t fast_tiles = ceil_div_of(fast_count, kTileFast), slow_tiles = ceil_div_of(slow_count, kTileSlow);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t fast = task % fast_tiles * kTileFast, slow = task / fast_tiles % slow_tiles * kTileSlow;
    const int64_t b = task / fast_tiles / slow_tiles;
    const In* in = op.in.data ? op.in.element(b) : nullptr;
    Out *out = op.out.element(b), *rest = op.rest.data ? op.rest.element(b) : nullptr;
    const A* alpha = op.alpha_row.data ? op.alpha_row.element(b) : nullptr;
    const A* beta = op.beta_row.data ? op.beta_row.element(b) : nullptr;
    const A* gamma = op.gamma ? op.gamma + b * op.channels : nullptr;
    const A scale = op.factor ? op.scale * op.factor[b] : op.scale;
    for (int64_t s = slow + warp; s < slow + kTileSlow && s < slow_count; s += kWarps) {
      for (int u = 0; u < kPerLane; ++u) {
        const int64_t f = fast + u * kWarp + lane;
        if (f >= fast_count) continue;
        const int64_t i = kPositionFast ? f : s, c = kPositionFast ? s : f;
        A value = 0;
        if (i < op.positions && c < op.channels) {
          if (in) value = op.alpha * (alpha ? alpha[i] : A(1)) * wide(in[i * op.in.position + c * op.in.channel]);
          if (gamma) value += op.beta * (beta ? beta[i] : A(1)) * gamma[c];
          value *= scale;
        }
        const Out result = rounded<Out>(value);
        out[i * op.out.position + c * op.out.channel] = result;
        if (rest) rest[i * op.rest.position + c * op.rest.channel] = rounded<Out>(value - wide(result));
      }
    }
  }
}

template <class In, class Out, class Device>
void affine(Device& device, const Affine<In, Out>& op) {
  const bool position_fast = position_is_fast(op.out, op.positions, op.channels);
  const int64_t slow = position_fast ? op.written_channels : op.written_positions;
  const int64_t fast = position_fast ? op.written_positions : op.written_channels;
  const int64_t tasks = op.batches * ceil_div_of(slow, kTileSlow) * ceil_div_of(fast, kTileFast);
  device.launch(position_fast ? &affine_kernel<In, Out, true> : &affine_kernel<In, Out, false>, tasks, op, tasks);
}

}  // namespace dnl
