// Unary attention, and the row softmax that it shares with the pairwise map.
//
//   softmax           p_j = exp(x_j - lse),  lse = log sum_j exp(x_j)
//   softmax backward  dx_j = p_j (dp_j - sum_i p_i dp_i)
//   pooling           y = sum_j u_j v_j,  u = softmax(m)
//   pooling backward  dv_j = u_j dy,  dm_j = u_j (<dy, v_j> - sum_i u_i <dy, v_i>)
//
// Everything is O(N) or O(N Dv): the unary map is one row, shared by all queries.
#pragma once

#include "core/types.h"

namespace dnl {

struct SoftmaxArgs {
  View input;        // (rows, columns): x, or dp in the backward; `position` is the stride of columns
  View probability;  // (rows, columns): p, read by the backward only
  View output;       // (rows, columns): p, or dx
  DType dtype;
  int64_t rows, columns;
};

// All accumulated quantities are float, or double where dtype is f64.
struct UnaryArgs {
  View mask;     // (batches, keys): m
  View value;    // (batches, keys, channels): v
  void* pooled;  // (batches, channels), accumulate type: y
  void* lse;     // (batches), accumulate type
  DType dtype;
  int64_t batches, keys, channels;
  // Backward only.
  const void* grad_pooled;  // (batches, channels), accumulate type: dy
  View grad_mask;           // (batches, keys), or data = nullptr where nobody needs it
  View grad_value;          // (batches, keys, channels), or data = nullptr
};

}  // namespace dnl
