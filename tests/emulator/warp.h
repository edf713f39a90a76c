// What the lanes of a warp do together: shuffles, votes, __syncwarp. All but the last leave memory unordered, as CUDA
// does.
#pragma once

#include "machine.h"

namespace emulator {

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane, or one's own
};

template <class T>
void exchange(Shuffle<T>* const (&lanes)[kWarpLanes]) {
  for (Shuffle<T>* lane : lanes) {
    if (!lane) continue;
    const Shuffle<T>* source = lanes[lane->source];
    if (source)
      lane->result = source->value;
    else
      std::memset(static_cast<void*>(&lane->result), kPoison, sizeof(T));  // undefined: the source takes no part
  }
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  Shuffle<T> argument{value, value, source};
  machine().meet(name, mask, argument, &exchange<T>, site);
  return argument.result;
}

// Segments of `width` lanes exchange among themselves.
inline int segment_of(int width, const Site& site) {
  if (width < 1 || width > 32 || (width & (width - 1))) machine().fail(text("shuffle of width ", width), site);
  return static_cast<int>(machine().lane()) & ~(width - 1);
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline void count_votes(Vote* const (&lanes)[kWarpLanes]) {
  unsigned result = 0;
  for (unsigned l = 0; l < kWarpLanes; ++l)
    if (lanes[l] && lanes[l]->predicate) result |= 1u << l;
  for (Vote* lane : lanes)
    if (lane) lane->result = result;
}

inline unsigned vote(const char* name, unsigned mask, bool predicate, const Site& site, bool orders = false) {
  Vote argument{predicate, 0};
  machine().meet(name, mask, argument, &count_votes, site, orders);
  return argument.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int first = emulator::segment_of(width, site);
  return emulator::shuffle("__shfl_sync", mask, value, first + (lane & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int first = emulator::segment_of(width, site), own = emulator::machine().lane(), source = own ^ bits;
  // Earlier segments can be read, later ones cannot: PTX's rule for a segment mask.
  return emulator::shuffle("__shfl_xor_sync", mask, value, source < first + width ? source : own, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int first = emulator::segment_of(width, site), own = emulator::machine().lane();
  const int64_t source = own + int64_t(by);
  return emulator::shuffle("__shfl_down_sync", mask, value, source < first + width ? int(source) : own, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) {
  const int first = emulator::segment_of(width, site), own = emulator::machine().lane();
  const int64_t source = own - int64_t(by);
  return emulator::shuffle("__shfl_up_sync", mask, value, source >= first ? int(source) : own, site);
}

inline void __syncwarp(unsigned mask = emulator::kEveryLane, emulator::Site site = emulator::Site::here()) {
  emulator::vote("__syncwarp", mask, false, site, true);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::vote("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::vote("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::vote("__all_sync", mask, predicate, site) == mask;
}
