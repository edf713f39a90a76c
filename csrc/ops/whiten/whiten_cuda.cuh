// Mean subtraction on CUDA: column sums in two stages, then one elementwise pass (core/cuda/reduce.cuh, affine.cuh).
// The input is read twice, the second time mostly from L2 where it fits.
#pragma once

#include "core/cuda/affine.cuh"
#include "core/cuda/operand.cuh"
#include "core/cuda/reduce.cuh"
#include "ops/whiten/whiten.h"

namespace dnl {

template <class T, class Device>
void whiten_cuda(const WhitenArgs& args, Device& device) {
  using A = AccOf<T>;
  const auto x = matrix_of<const T>("x", args.input, args.batches);
  A* mean = device.template allocate<A>(args.batches * args.channels);
  column_sums<T>(device, x, args.batches, args.positions, args.channels, {}, 1.0 / args.positions, mean);
  Affine<T, T> op{x, matrix_of<T>("x", args.output, args.batches), args.batches, args.positions, args.channels};
  op.beta = -1;
  op.gamma = mean;
  affine(device, op);
}

}  // namespace dnl
