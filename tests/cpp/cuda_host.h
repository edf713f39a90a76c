// What host tests of the CUDA drivers share: a machine that the drivers can launch on, with the promises they rely on
// checked, operands in several layouts, and the definitions in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

// clang-format off
#include "emulator.h"
#include "device.h"
// clang-format on
#include "check.h"
#include "core/cuda/affine.cuh"
#include "core/cuda/cublas.h"
#include "core/cuda/ptx.cuh"

using namespace dnl;

inline std::mt19937 generator(1);
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Orders in which threads and blocks get their turns, as command lines name them.
constexpr std::pair<const char*, emulator::Turns> kTurns[] = {{"ascending", emulator::Turns::ascending},
                                                              {"descending", emulator::Turns::descending},
                                                              {"random", emulator::Turns::random}};

// test() in each order that the command line names, all where it names none.
template <class Test>
void for_turns(int argc, char** argv, const Test& test) {
  for (const auto& [name, turns] : kTurns) {
    if (argc > 1 && std::find(argv + 1, argv + argc, std::string(name)) == argv + argc) continue;
    emulator::machine().options.turns = turns;
    generator.seed(1);
    test();
  }
}

template <class T>
constexpr DType kType = std::is_same_v<T, double>          ? DType::f64
                        : std::is_same_v<T, float>         ? DType::f32
                        : std::is_same_v<T, __nv_bfloat16> ? DType::bf16
                                                           : DType::f16;

// Relative error allowed against double, on inputs that are already rounded.
template <class T>
constexpr double kBound = std::is_same_v<T, double>          ? 1e-12
                          : std::is_same_v<T, float>         ? 2e-5
                          : std::is_same_v<T, __nv_bfloat16> ? 1.5e-2
                                                             : 2e-3;

// Memory and products as core/cuda/launch.h gives them, and the promises they rely on.
struct HostDevice : emulator::Launcher {
  HostDevice() { most_blocks = 3; }  // so that blocks take several tasks

  std::deque<std::unique_ptr<void, void (*)(void*)>> buffers;
  cublasContext blas;       // whether products of float round their operands to TF32
  bool whole_lines = true;  // extents of products are multiples of kPitch, as the chain promises
  Gpu on{90, 4, 227 << 10};

  Gpu gpu() const { return on; }

  // Aligned, of its exact size (a sanitizer sees the next byte), and NaN in every type.
  template <class T>
  T* allocate(int64_t count) {
    if (count == 0) return nullptr;
    void* data = nullptr;
    if (posix_memalign(&data, 64, count * sizeof(T))) std::abort();
    std::memset(data, 0xff, count * sizeof(T));
    buffers.emplace_back(data, std::free);
    return static_cast<T*>(data);
  }

  // By the stand-in for cuBLAS (cublas_v2.h beside this file).
  template <class T, class Out>
  void product(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<Out>& c, int64_t batches, int64_t m,
               int64_t n, int64_t k, bool accumulate = false) {
    CHECK(operand(a, m, k), "left operand of a product is not one");
    CHECK(operand(b, k, n), "right operand of a product is not one");
    CHECK((operand<Out>(c.read(), m, n)), "result of a product is not one");
    CHECK(m > 0 && n > 0 && k > 0, "an extent of a product is zero");
    CHECK(!whole_lines || (m % kPitch == 0 && n % kPitch == 0 && k % kPitch == 0),
          "an extent of a product is no whole line");
    cublas_gemm(&blas, gemm_of(a, b, c, batches, m, n, k), accumulate);
  }

  template <class T>
  static bool operand(const Matrix<const T>& x, int64_t rows, int64_t columns) {
    const int64_t align = 16 / sizeof(T);
    if (rows * columns == 0) return true;
    if (x.batch.dims > 1 || (x.batch.dims && x.batch.stride[0] % align)) return false;
    const int64_t fast = x.channel == 1 ? x.channel : x.position, slow = x.channel == 1 ? x.position : x.channel;
    const int64_t length = x.channel == 1 ? columns : rows;
    return fast == 1 && slow >= length && slow % align == 0;
  }
};

// padded: rows of whole 16-byte lines, longer than their elements.
enum class Layout { rows, channel_first, gaps, heads, padded };

// A (batches, positions, channels) matrix in one of several layouts, and its values in double.
template <class T>
struct Tensor {
  int64_t batches, positions, channels;
  std::vector<T> data;
  std::vector<int64_t> offsets;
  std::vector<double> value;
  View view;

  Tensor(int64_t b, int64_t n, int64_t c, Layout layout, double mean = 0, double deviation = 1)
      : batches(b), positions(n), channels(c) {
    int64_t position = c, channel = 1, batch = n * c, first = 0;
    if (layout == Layout::channel_first) position = 1, channel = n;
    if (layout == Layout::gaps) position = 3 * (c + 1), channel = 3, batch = n * position + 7, first = 1;
    if (layout == Layout::padded) position = pitch_of(c) + kPitch, batch = n * position;
    if (layout == Layout::heads) position = b * c, batch = c;  // (positions, batches, channels) in memory
    for (int64_t i = 0; i < b; ++i) offsets.push_back(i * batch);
    data.resize(first + (b - 1) * batch + (n ? (n - 1) * position : 0) + (c ? (c - 1) * channel : 0) + 1);
    std::memset(static_cast<void*>(data.data()), 0xff, data.size() * sizeof(T));
    view = View{data.data() + first, offsets.data(), position, channel};
    std::normal_distribution<double> normal(0, deviation);
    value.resize(b * n * c);
    for (int64_t e = 0; e < b; ++e)
      for (int64_t j = 0; j < c; ++j) {
        const double shift = mean * (j % 2 ? 1 : -1);
        for (int64_t i = 0; i < n; ++i) set(e, i, j, normal(generator) + shift);
      }
  }
  T& at(int64_t e, int64_t i, int64_t c) {
    return static_cast<T*>(view.data)[offsets[e] + i * view.position + c * view.channel];
  }
  void set(int64_t e, int64_t i, int64_t c, double x) {
    at(e, i, c) = rounded<T>(static_cast<AccOf<T>>(x));
    value[(e * positions + i) * channels + c] = wide(at(e, i, c));
  }
  void read() {
    for (int64_t e = 0; e < batches; ++e)
      for (int64_t i = 0; i < positions; ++i)
        for (int64_t c = 0; c < channels; ++c) value[(e * positions + i) * channels + c] = wide(at(e, i, c));
  }
};

using Values = std::vector<double>;

inline double relative(const Values& got, const Values& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return want.empty() ? 0 : std::sqrt(error) / (std::sqrt(size) + 1e-30);
}

inline Values softmax(const double* x, int64_t n) {
  Values p(x, x + n);
  const double most = *std::max_element(p.begin(), p.end());
  double sum = 0;
  for (double& value : p) sum += value = std::exp(value - most);
  for (double& value : p) value /= sum;
  return p;
}

inline Values centred(const Values& x, int64_t batches, int64_t positions, int64_t channels) {
  Values y = x;
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < positions; ++i) sum += x[(b * positions + i) * channels + c];
      for (int64_t i = 0; i < positions; ++i) y[(b * positions + i) * channels + c] -= sum / positions;
    }
  return y;
}
