// Mean subtraction on the CPU: one task owns a block of channels of one batch element, sums it over the positions in
// double, and writes it with the mean subtracted. It reads the input twice; a block that fits the cache is read from
// memory once.
#pragma once

#include "core/cpu/reduce.h"
#include "ops/whiten/whiten.h"

namespace dnl {
namespace DNL_ISA {

template <class T>
void whiten_typed(const WhitenArgs& args, const Executor& executor) {
  // A channel-first row is contiguous on its own, so small blocks balance better; rows of channels want whole lines.
  const int64_t width = args.input.position == 1 ? 4 : kReduceBlock;
  const int64_t blocks = ceil_div(args.channels, width);
  executor.parallel(args.batches * blocks, [&](int64_t task) {
    const int64_t b = task / blocks, begin = task % blocks * width;
    const int64_t end = std::min(args.channels, begin + width);
    const T* x = element<T>(args.input, b);
    T* y = static_cast<T*>(args.output.data) + args.output.batch[b];
    double sums[kReduceBlock];
    column_sums<T>(x, args.input, args.positions, begin, end, nullptr, sums);
    Acc<T> mean[kReduceBlock];
    for (int64_t c = 0; c < end - begin; ++c) mean[c] = static_cast<Acc<T>>(sums[c] / args.positions);

    const View &in = args.input, &out = args.output;
    if (in.position == 1 && out.position == 1) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t i = 0; i < args.positions; ++i)
          y[c * out.channel + i] = narrow<T>(widen(x[c * in.channel + i]) - mean[c - begin]);
    } else if (in.channel == 1 && out.channel == 1) {
      for (int64_t i = 0; i < args.positions; ++i)
        for (int64_t c = begin; c < end; ++c)
          y[i * out.position + c] = narrow<T>(widen(x[i * in.position + c]) - mean[c - begin]);
    } else {
      for (int64_t i = 0; i < args.positions; ++i)
        for (int64_t c = begin; c < end; ++c)
          y[i * out.position + c * out.channel] =
              narrow<T>(widen(x[i * in.position + c * in.channel]) - mean[c - begin]);
    }
  });
}

inline void whiten(const WhitenArgs& args, const Executor& executor) {
  dispatch(args.dtype, [&](auto type) { whiten_typed<decltype(type)>(args, executor); });
}

}  // namespace DNL_ISA
}  // namespace dnl
