// How much of the map the chain makes at a time, and what of a row stays in shared memory: host code that needs no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cuda/device.cuh"
#include "core/types.h"

namespace dnl {

// ---------------------------------------------------------------------------------------------------------------------
// Chunks
// ---------------------------------------------------------------------------------------------------------------------

// Libraries make a product in tiles of about this size, a tile to a multiprocessor.
constexpr int64_t kProductTile = 128, kProductWaves = 2;

// Rows that a product of `columns` columns must have to keep a GPU busy for kProductWaves waves.
constexpr int64_t rows_of_waves(int64_t columns, int multiprocessors) {
  const int64_t across = std::max<int64_t>(1, ceil_div_of(columns, kProductTile));
  return ceil_div_of(kProductWaves * std::max(1, multiprocessors), across) * kProductTile;
}

struct ChunkLimits {
  int64_t rows = 0;                    // so many are enough; 0: what rows_of_waves() says
  int64_t bytes = int64_t(512) << 20;  // of a chunk of one map, at most
  int64_t step = kProductTile;         // chunks start at multiples of it, a multiple of kPitch
};

constexpr int64_t kMostProducts = 65'535;  // of a batch: a kernel may have it along the grid's z

// `group` batch elements and `rows` rows of the map at a time; group > 1 only with all rows. As few chunks as keep to
// the bytes, but no larger ones than fill the GPU: more rows would only cost memory. At least one row, or `step` of
// them where there are several chunks, whatever the bytes. All are of about equal size.
struct Chunks {
  int64_t group = 1, rows;

  // Maps of `all_rows` rows and `columns` columns; `enough` rows fill the GPU.
  Chunks(int64_t batches, int64_t all_rows, int64_t columns, int64_t element_bytes, int64_t enough,
         const ChunkLimits& limits) {
    if (limits.rows) enough = limits.rows;
    const int64_t fit = limits.bytes / (pitch_of(columns) * element_bytes);
    const int64_t most = std::max(limits.step, fit / limits.step * limits.step);
    const int64_t count = std::max({int64_t(1), all_rows / enough, ceil_div_of(all_rows, most)});
    rows = std::min(all_rows, round_up_to(ceil_div_of(all_rows, count), limits.step));
    if (rows < all_rows) return;
    const int64_t most_elements = std::max<int64_t>(1, fit / pitch_of(all_rows));
    const int64_t groups =
        std::max({int64_t(1), batches / ceil_div_of(enough, all_rows), ceil_div_of(batches, most_elements)});
    group = std::min(kMostProducts, ceil_div_of(batches, groups));
  }

  // Rows of a chunk's buffers for each batch element: extents of products are whole lines (chain/operands.cuh).
  int64_t buffer_rows() const { return pitch_of(rows); }

  // f(first batch element, their number, first row, their number)
  template <class F>
  void for_each(int64_t batches, int64_t all_rows, const F& f) const {
    for (int64_t b = 0; b < batches; b += group)
      for (int64_t i = 0; i < all_rows; i += rows) f(b, std::min(group, batches - b), i, std::min(rows, all_rows - i));
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Rows in shared memory
// ---------------------------------------------------------------------------------------------------------------------

// How many of the `rows` that a row kernel reads more than once stay in shared memory, `row_bytes` of each: as many as
// leave room for a second block on the multiprocessor, which loads while the first computes.
constexpr int kReservedBytes = 1024;  // of shared memory: the system's and a block's own static part
constexpr int kept_rows(int rows, int64_t row_bytes, const Gpu& gpu) {
  const int64_t room = gpu.shared_bytes / 2 - kReservedBytes;
  return static_cast<int>(std::min<int64_t>(rows, std::max<int64_t>(0, room / std::max<int64_t>(1, row_bytes))));
}

}  // namespace dnl
