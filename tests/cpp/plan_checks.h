// What the plan of the chain promises (ops/pairwise/chain/plan.h), for any sizes.
#pragma once

#include "check.h"
#include "ops/pairwise/chain/plan.h"

// A product of so many rows has kProductWaves tiles a multiprocessor, and of one tile of rows less it has not.
inline void check_waves(int64_t columns, int multiprocessors) {
  using namespace dnl;
  const int64_t rows = rows_of_waves(columns, multiprocessors), across = ceil_div_of(columns, 128);
  const int64_t wanted = 2 * multiprocessors;
  CHECK(rows % 128 == 0 && rows / 128 * across >= wanted && (rows / 128 - 1) * across < wanted,
        "%ld rows of %ld columns for %d multiprocessors", long(rows), long(columns), multiprocessors);
}

// Every row once, in chunks that keep to their bytes and fill the GPU, as far as both can be.
inline void check_chunks(int64_t batches, int64_t rows, int64_t columns, int64_t enough,
                         const dnl::ChunkLimits& limits) {
  using namespace dnl;
  const int64_t row_bytes = pitch_of(columns) * 4;
  const Chunks chunks(batches, rows, columns, 4, enough, limits);
  if (limits.rows) enough = limits.rows;
  int64_t seen = 0, most = 0;
  chunks.for_each(batches, rows, [&](int64_t b, int64_t group, int64_t first, int64_t count) {
    CHECK(b * rows + first * group == seen, "element %ld, row %ld after %ld rows", long(b), long(first), long(seen));
    seen += group * count;
    most = std::max(most, group * count);
    CHECK(first % limits.step == 0, "a chunk starts at %ld", long(first));
    CHECK(group == 1 || count == rows, "%ld elements of %ld rows", long(group), long(count));
    CHECK(count <= chunks.rows && pitch_of(count) <= chunks.buffer_rows() && group <= chunks.group,
          "more than the buffers hold");
    const bool least = group == 1 && count <= std::max<int64_t>(limits.step, 1);
    CHECK(least || group * pitch_of(count) * row_bytes <= limits.bytes, "a chunk of %ld x %ld rows of %ld bytes",
          long(group), long(count), long(row_bytes));
  });
  CHECK(seen == batches * rows, "%ld of %ld rows", long(seen), long(batches * rows));
  // Less than the GPU takes only where there is no more, or where twice as much is more than the bytes.
  const bool scarce = 2 * chunks.group * (pitch_of(chunks.rows) + limits.step) * row_bytes > limits.bytes;
  CHECK(most >= enough || most == batches * rows || scarce, "%ld rows of %ld x %ld where %ld are enough", long(most),
        long(batches), long(rows), long(enough));
  CHECK(most <= rows || most < 2 * enough + rows, "%ld rows of elements where %ld are enough", long(most),
        long(enough));
  CHECK(chunks.rows == rows || chunks.rows < 2 * enough + limits.step, "%ld rows where %ld are enough",
        long(chunks.rows), long(enough));
}

// Two blocks that keep their rows fit a multiprocessor, and a row that is longer by a byte does not stay.
inline void check_kept_rows(int shared_bytes) {
  using namespace dnl;
  const Gpu gpu{90, 1, shared_bytes};
  const int64_t room = shared_bytes / 2 - 1024;
  for (int rows : {1, 2}) {
    CHECK(kept_rows(rows, room / rows, gpu) == rows, "%d bytes: %d rows do not stay", shared_bytes, rows);
    CHECK(kept_rows(rows, room / rows + 1, gpu) == rows - 1, "%d bytes: %d longer rows stay", shared_bytes, rows);
  }
  CHECK(kept_rows(2, room + 1, gpu) == 0, "%d bytes: a row too long stays", shared_bytes);
  CHECK(kept_rows(2, 1, Gpu{80, 1, 0}) == 0, "a row stays where there is no shared memory");
}
