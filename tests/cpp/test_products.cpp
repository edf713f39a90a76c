// Packing and products of core/cpu/pack.h and product.h against plain sums of small integers, which are exact in every
// type: for rows and lanes that fill no block, any depth, runs of depth, and both orders of memory. Buffers have their
// exact size, so that a sanitizer sees the next element, and what nobody may read is NaN.
//
// With DNL_NEON, and DNL_BF16_PRODUCTS, those of Arm's instructions (tests/arm.py).
#define DNL_ISA checked
#define DNL_VECTOR_BYTES 16
#ifdef DNL_BF16_PRODUCTS
#define DNL_TARGET "arch=armv8.2-a+bf16"
#endif
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "core/cpu/target_begin.h"
// clang-format off
#include "core/cpu/pack.h"
// clang-format on

using namespace dnl::checked;

namespace {

std::mt19937 generator(1);
int draw() { return std::uniform_int_distribution<int>(-7, 7)(generator); }

template <class E>
struct Name;
template <>
struct Name<double> {
  static constexpr const char* text = "float64";
};
template <>
struct Name<float> {
  static constexpr const char* text = "float32";
};
template <>
struct Name<bf16> {
  static constexpr const char* text = "bfloat16";
};

template <class E>
E number(int x) {
  return narrow<E>(Acc<E>(x));
}
template <class E>
E nan() {
  return narrow<E>(std::numeric_limits<Acc<E>>::quiet_NaN());
}

// rows x columns of integers.
struct Integers {
  int64_t rows, columns;
  std::vector<int> data;

  Integers(int64_t r, int64_t c) : rows(r), columns(c), data(r * c) {
    for (int& x : data) x = draw();
  }
  int operator()(int64_t r, int64_t c) const { return data[r * columns + c]; }
};

// The same as elements of E, one row after the other or one column after the other.
template <class E>
struct Elements {
  std::vector<E> data;
  Source<E> source;

  Elements(const Integers& x, bool by_row) : data(x.rows * x.columns) {
    source = {data.data(), by_row ? x.columns : 1, by_row ? 1 : x.rows};
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t c = 0; c < x.columns; ++c)
        data[r * source.outer_stride + c * source.inner_stride] = number<E>(x(r, c));
  }
};

// C = A B from packed operands, C before being `before`.
template <class E, Into into>
void test_product(int64_t rows, int64_t lanes, int64_t depth, bool a_by_row, bool b_by_row) {
  constexpr int64_t L = Block<E>::kLanes, G = Block<E>::kGroup;
  const Integers a(rows, depth), b(depth, lanes);
  const int64_t panels = ceil_div(lanes, L), pitch = round_up(depth, G);
  std::vector<E> left(row_space<E>(rows) * pitch, nan<E>()), right(panels * pitch * L, nan<E>());
  const Elements<E> a_elements(a, a_by_row), b_elements(b, b_by_row);
  pack_rows(a_elements.source, rows, depth, pitch, left.data());
  pack_panels(b_elements.source, depth, lanes, right.data(), pitch * L);
  std::vector<Acc<E>> sums(panels * rows * L), alpha(panels * L);
  for (auto& x : sums) x = into == Into::store ? NAN : Acc<E>(draw());
  for (auto& x : alpha) x = Acc<E>(draw());
  const auto before = sums;
  product<E, into>(rows, panels, pitch, {left.data(), pitch, pitch, 0}, {right.data(), pitch * L},
                   {sums.data(), rows * L}, alpha.data());
  int64_t wrong = 0;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < L; ++l) {
        const int64_t lane = p * L + l, at = (p * rows + r) * L + l;
        double sum = into == Into::store ? 0 : into == Into::add ? before[at] : before[at] * alpha[lane];
        for (int64_t k = 0; k < depth && lane < lanes; ++k) sum += a(r, k) * b(k, lane);
        wrong += double(sums[at]) != sum;
      }
  CHECK(wrong == 0, "%s: %ld sums of %ld rows, %ld lanes, depth %ld, into %d, orders %d %d", Name<E>::text, long(wrong),
        long(rows), long(lanes), long(depth), int(into), a_by_row, b_by_row);
}

// An A whose depth comes in runs, as that of a tile in panels does.
template <class E>
void test_runs(int64_t rows, int64_t runs) {
  constexpr int64_t L = Block<E>::kLanes;
  const int64_t depth = runs * L, gap = 8, jump = row_space<E>(rows) * L + gap;
  const Integers a(rows, depth), b(depth, L);
  std::vector<E> left(runs * jump - gap, nan<E>()), right(depth * L);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; ++k) left[k / L * jump + row_place<E>(r, k % L, L)] = number<E>(a(r, k));
  const Elements<E> elements(b, true);
  pack_panels(elements.source, depth, L, right.data(), depth * L);
  std::vector<Acc<E>> sums(rows * L);
  product<E, Into::store>(rows, 1, depth, {left.data(), L, L, jump}, {right.data(), 0}, {sums.data(), 0});
  int64_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t lane = 0; lane < L; ++lane) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += a(r, k) * b(k, lane);
      wrong += double(sums[r * L + lane]) != sum;
    }
  CHECK(wrong == 0, "%s: %ld sums of %ld rows, %ld runs", Name<E>::text, long(wrong), long(rows), long(runs));
}

// Means are subtracted from the element that they belong to, and what fills up groups and panels is zero.
template <class E>
void test_centring(int64_t rows, int64_t depth, bool by_row, bool outer) {
  constexpr int64_t L = Block<E>::kLanes, G = Block<E>::kGroup;
  const Integers x(rows, depth);
  Elements<E> elements(x, by_row);
  std::vector<Acc<E>> mean(outer ? rows : depth);
  for (auto& m : mean) m = Acc<E>(draw());
  (outer ? elements.source.outer_mean : elements.source.inner_mean) = mean.data();
  const auto centred = [&](int64_t r, int64_t k) { return Acc<E>(x(r, k)) - mean[outer ? r : k]; };
  int64_t wrong = 0;

  const int64_t pitch = round_up(depth, G);
  std::vector<E> packed(row_space<E>(rows) * pitch, nan<E>());
  pack_rows(elements.source, rows, depth, pitch, packed.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < pitch; ++k)
      wrong += widen(packed[row_place<E>(r, k, pitch)]) != (k < depth ? centred(r, k) : 0);

  const int64_t filled = round_up(rows, G), panels = ceil_div(depth, L);
  std::vector<E> panel(panels * filled * L, nan<E>());
  pack_panels(elements.source, rows, depth, panel.data(), filled * L);
  for (int64_t k = 0; k < filled; ++k)
    for (int64_t lane = 0; lane < panels * L; ++lane)
      wrong += widen(panel[lane / L * filled * L + panel_place<E>(k, lane % L, L)]) !=
               (k < rows && lane < depth ? centred(k, lane) : 0);
  CHECK(wrong == 0, "%s: %ld of %ld x %ld, by row %d, outer %d", Name<E>::text, long(wrong), long(rows), long(depth),
        by_row, outer);
}

// A tile of sums, rounded to 16 bits, is where both operands of a following product have it.
#ifdef DNL_BF16_PRODUCTS
void test_stores() {
  constexpr int64_t L = Block<bf16>::kLanes, G = Block<bf16>::kGroup, T = Block<bf16>::kRowGroup, W = kWidth<float>;
  std::vector<bf16> panel(T * L, nan<bf16>()), rows(T * L, nan<bf16>());
  std::vector<float> x(T * L), group_sum(T * L / G), row_sum(L);
  for (float& v : x) v = float(draw()) + 0x1p-9f * float(draw());  // not exact in 16 bits
  for (int64_t r = 0; r < T; r += G)
    for (int64_t lane = 0; lane < L; lane += W) {
      Vec<float> group[G], sum = load(row_sum.data() + lane);
      for (int64_t i = 0; i < G; ++i) group[i] = load(x.data() + (r + i) * L + lane);
      store(group_sum.data() + r / G * L + lane, store_group(panel.data() + panel_place<bf16>(r, lane, L), group));
      store_rows(rows.data() + row_place<bf16>(r, lane, L), group, sum);
      store(row_sum.data() + lane, sum);
    }
  int64_t wrong = 0;
  for (int64_t lane = 0; lane < L; ++lane) {
    float all = 0;
    for (int64_t r = 0; r < T; ++r) {
      const bf16 rounded = narrow<bf16>(x[r * L + lane]);
      wrong += panel[panel_place<bf16>(r, lane, L)].bits != rounded.bits;
      wrong += rows[row_place<bf16>(r, lane, L)].bits != rounded.bits;
      all += widen(rounded);
    }
    wrong += row_sum[lane] != all;
    for (int64_t r = 0; r < T; r += G) {
      float sum = 0;
      for (int64_t i = 0; i < G; ++i) sum += widen(narrow<bf16>(x[(r + i) * L + lane]));
      wrong += group_sum[r / G * L + lane] != sum;
    }
  }
  CHECK(wrong == 0, "%ld stores", long(wrong));
}
#endif

template <class E>
void test_type() {
  constexpr int64_t kMostRows = 2 * Block<E>::kRows + 1;
  constexpr int64_t L = Block<E>::kLanes;
  for (int64_t rows = 1; rows <= kMostRows; ++rows)
    for (int64_t depth : {1, 2, 3, 4, 5, 7, 8, 9, 12, 31, 40}) {
      const bool a = rows & 1, b = depth & 1;
      test_product<E, Into::store>(rows, 1 + (rows * 7 + depth) % (3 * L), depth, a, b);
      test_product<E, Into::add>(rows, L + 1, depth, b, a);
      test_product<E, Into::rescale>(rows, 2 * L, depth, !a, !b);
      for (int order = 0; order < 4; ++order) test_centring<E>(rows, depth, order & 1, order & 2);
    }
  for (int64_t depth : {127, 128, 129, 511, 512, 515, 1030})  // slices
    test_product<E, Into::rescale>(Block<E>::kRows + 1, L + 3, depth, true, false);
  for (int64_t rows = 1; rows <= kMostRows; ++rows)
    for (int64_t runs : {1, 2, 4}) test_runs<E>(rows, runs);
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
#ifdef DNL_BF16_PRODUCTS
  test_type<bf16>();
  test_stores();
#endif
  return report();
}

#include "core/cpu/target_end.h"
