// The products of core/cpu/amx.h with loops in place of the tile instructions, on any CPU: against plain sums, for rows
// that fill no block, runs of depth, and panels; and nothing is read or written beside the operands.
#define DNL_ISA loops
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "core/cpu/amx.h"

using namespace dnl::loops;

namespace {

struct Bf16 {
  uint16_t bits;
};
struct Rows {
  const Bf16* data;
  int64_t row, run, jump;
};
struct Panels {
  const Bf16* data;
  int64_t panel;
};
struct Result {
  float* data;
  int64_t panel;
};

std::mt19937 generator(1);

// A number of eight bits, so that sums of products are exact in float: any order gives the same.
Bf16 draw() {
  const float value = static_cast<float>(std::uniform_int_distribution<int>(-15, 15)(generator));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>(bits >> 16)};
}
double value(Bf16 x) { return double(Tiles::widened(reinterpret_cast<const unsigned char*>(&x))); }

void test(int64_t rows, int64_t panels, int64_t runs, int64_t run, bool fresh) {
  const int64_t depth = runs * run, gap = 3, row = run + gap, jump = rows * row;
  // Exact sizes: a sanitizer sees the next element.
  std::vector<Bf16> a((runs - 1) * jump + (rows - 1) * row + run), b(panels * depth * kPanelLanes);
  for (Bf16& x : a) x = draw();
  for (Bf16& x : b) x = draw();
  std::vector<float> c(panels * rows * kPanelLanes);
  for (float& x : c) x = fresh ? NAN : float(generator() % 100);
  const std::vector<float> before = c;
  tile_product(rows, panels, depth, Rows{a.data(), row, run, jump}, Panels{b.data(), depth * kPanelLanes},
               Result{c.data(), rows * kPanelLanes}, fresh);
  int64_t wrong = 0;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t lane = 0; lane < kPanelLanes; ++lane) {
        const int64_t at = (p * rows + r) * kPanelLanes + lane;
        double sum = fresh ? 0 : before[at];
        for (int64_t k = 0; k < depth; ++k)
          sum += value(a[k / run * jump + r * row + k % run]) *
                 value(b[p * depth * kPanelLanes + k / 2 * 2 * kPanelLanes + 2 * lane + k % 2]);
        wrong += c[at] != float(sum);
      }
  CHECK(wrong == 0, "%ld of %ld sums, rows %ld panels %ld runs %ld x %ld fresh %d", long(wrong), long(c.size()),
        long(rows), long(panels), long(runs), long(run), int(fresh));
}

}  // namespace

int main() {
  for (int64_t rows = 1; rows <= 66; ++rows)
    for (bool fresh : {true, false}) test(rows, 1 + rows % 3, 1 + rows % 2, kTileDepth * (1 + rows % 4), fresh);
  return report();
}
