// Whitening: what is subtracted from query and key before their inner products.
//
//   mean_subtract   y_i = x_i - mean over i of x_i, per channel
//   whiten          y = (x - mean) * rstd, rstd = 1 or 1 / sqrt(var + eps), var unbiased, where mean and variance are
//                   over the positions of one channel, the channels of one position, a sample, or a whole batch
//
// mean_subtract is a symmetric projection (I - 11'/n), so its backward is the map itself. With a deviation,
// dx = rstd (dy - mean(dy) - y <dy, y> / (n - 1)). dnl_ext/ops/whiten.py is the Python side.
#pragma once

#include "core/types.h"

namespace dnl {

struct WhitenArgs {
  View input;   // (batches, positions, channels)
  View output;  // the same shape
  DType dtype;
  int64_t batches, positions, channels;
};

// Forward, or backward where `result` is given. A column is one channel of one batch element; runs of `group`
// consecutive columns (of b * channels + c) share their statistics: 1, channels, or channels times some batch elements.
struct StandardiseArgs {
  View input;   // (batches, positions, channels): x, in the backward dy
  View result;  // the same shape: y of the forward; data = nullptr in the forward
  View output;  // the same shape
  void* rstd;   // (groups), accumulate type: written by the forward, read by the backward; nullptr without a deviation
  DType dtype;
  int64_t batches, positions, channels;
  int64_t group;
  double eps;

  int64_t columns() const { return batches * channels; }
  int64_t groups() const { return columns() / group; }
  int64_t count() const { return positions * group; }  // elements that share statistics
};

// mean_subtract as the other one. The workspace that its kernel wants is none.
inline StandardiseArgs mean_of_columns(const WhitenArgs& args) {
  return {args.input, View{}, args.output, nullptr, args.dtype, args.batches, args.positions, args.channels, 1, 0};
}

// What shares one mean, and whether its deviation is divided out.
enum class Scope { channel, position, sample, batch };
struct Whitening {
  const char* name;
  Scope scope;
  bool deviation;
};

// The names stand in dnl_ext/reference.py too, where None is no whitening.
constexpr Whitening kWhitenings[] = {
    {"channel", Scope::channel, false}, {"in_nostd", Scope::channel, false}, {"spatial", Scope::position, false},
    {"ln_nostd", Scope::sample, false}, {"fln_nostd", Scope::batch, false},  {"in", Scope::channel, true},
    {"ln", Scope::sample, true},        {"fln", Scope::batch, true},
};

}  // namespace dnl
