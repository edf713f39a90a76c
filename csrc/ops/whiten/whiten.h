// Mean subtraction: y_i = x_i - mean over i of x_i, per channel.
//
// The map is a symmetric projection (I - 11'/N), so its backward is the map itself. dnl_ext/ops/whiten.py.
#pragma once

#include "core/types.h"

namespace dnl {

struct WhitenArgs {
  View input;   // (batches, positions, channels)
  View output;  // the same shape
  DType dtype;
  int64_t batches, positions, channels;
};

}  // namespace dnl
