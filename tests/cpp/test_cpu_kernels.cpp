// Every CPU kernel of every instruction set this CPU has, without torch, against plain loops in double.
//
// Run it under the sanitizers too (CMakeLists.txt): buffers have their exact size, and threads are real.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "core/cpu/kernels.h"
#include "half.h"
#include "host_threads.h"

namespace {

using dnl::CpuKernels;
using dnl::DType;
using dnl::Executor;
using dnl::View;

std::mt19937 generator(1);

// One element of a tensor, and its value.
void put(DType dtype, char* to, double x) {
  const float single = static_cast<float>(x);
  const uint16_t bits = half::nearest(x);
  switch (dtype) {
    case DType::f64:
      std::memcpy(to, &x, 8);
      break;
    case DType::f32:
      std::memcpy(to, &single, 4);
      break;
    case DType::bf16:  // cut, not rounded: any number will do
      std::memcpy(to, reinterpret_cast<const char*>(&single) + 2, 2);
      break;
    case DType::f16:
      std::memcpy(to, &bits, 2);
  }
}
double get(DType dtype, const char* from) {
  double x;
  float single = 0;
  uint16_t bits;
  switch (dtype) {
    case DType::f64:
      std::memcpy(&x, from, 8);
      return x;
    case DType::f32:
      std::memcpy(&single, from, 4);
      return single;
    case DType::bf16:
      std::memcpy(reinterpret_cast<char*>(&single) + 2, from, 2);
      return single;
    case DType::f16:
      std::memcpy(&bits, from, 2);
      return (bits & 0x7c00) == 0x7c00 ? NAN : half::value(bits);
  }
  return NAN;
}

// A (batches, positions, channels) matrix, channel-first or not, and its values in double.
struct Matrix {
  int64_t batches, positions, channels;
  DType dtype;
  bool channel_first;
  int64_t bytes;  // of an element
  std::vector<char> data;
  std::vector<int64_t> offsets;

  Matrix(int64_t b, int64_t n, int64_t c, DType type, bool first, double mean = 0)
      : batches(b), positions(n), channels(c), dtype(type), channel_first(first) {
    bytes = type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
    data.resize(b * n * c * bytes);
    for (int64_t i = 0; i < b; ++i) offsets.push_back(i * n * c);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < b * n * c; ++i) put(type, data.data() + i * bytes, normal(generator) + mean);
  }
  int64_t at(int64_t b, int64_t i, int64_t c) const {
    return offsets[b] + (channel_first ? c * positions + i : i * channels + c);
  }
  double operator()(int64_t b, int64_t i, int64_t c) const { return get(dtype, data.data() + at(b, i, c) * bytes); }
  View view() { return View{data.data(), offsets.data(), channel_first ? 1 : channels, channel_first ? positions : 1}; }
};

double error(const std::vector<double>& x, const std::vector<double>& truth) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - truth[i]) * (x[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

std::vector<double> values(const Matrix& x) {
  std::vector<double> result;
  for (int64_t b = 0; b < x.batches; ++b)
    for (int64_t i = 0; i < x.positions; ++i)
      for (int64_t c = 0; c < x.channels; ++c) result.push_back(x(b, i, c));
  return result;
}

// The same once, for loops that read each value many times.
struct Values {
  int64_t positions, channels;
  std::vector<double> data;

  explicit Values(const Matrix& x) : positions(x.positions), channels(x.channels), data(values(x)) {}
  double operator()(int64_t b, int64_t i, int64_t c) const { return data[(b * positions + i) * channels + c]; }
};

// Forward and backward of whitened pairwise attention in double: y, dq, dk, dv. Without mask logits `mask` is null.
struct Truth {
  std::vector<double> y, dq, dk, dv;

  Truth(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& grad, double scale, bool whiten,
        const Matrix* mask) {
    const Values q(query), k(key), v(value), dy(grad);
    const int64_t Q = q.positions, K = k.positions, D = q.channels, C = v.channels;
    for (int64_t b = 0; b < query.batches; ++b) {
      std::vector<double> mq(D), mk(D), P(Q * K), dS(Q * K), u(K);
      for (int64_t c = 0; whiten && c < D; ++c) {
        for (int64_t i = 0; i < Q; ++i) mq[c] += q(b, i, c) / Q;
        for (int64_t j = 0; j < K; ++j) mk[c] += k(b, j, c) / K;
      }
      double total = 0;
      for (int64_t j = 0; mask && j < K; ++j) total += u[j] = std::exp((*mask)(b, j, 0));
      for (int64_t j = 0; mask && j < K; ++j) u[j] /= total;
      for (int64_t i = 0; i < Q; ++i) {
        double most = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < K; ++j) {
          double s = 0;
          for (int64_t c = 0; c < D; ++c) s += (q(b, i, c) - mq[c]) * (k(b, j, c) - mk[c]);
          P[i * K + j] = s * scale;
          most = std::max(most, s * scale);
        }
        for (int64_t j = 0; j < K; ++j) sum += P[i * K + j] = std::exp(P[i * K + j] - most);
        for (int64_t j = 0; j < K; ++j) {
          P[i * K + j] /= sum;
          for (int64_t c = 0; c < C; ++c) dS[i * K + j] += dy(b, i, c) * v(b, j, c);
          delta += P[i * K + j] * dS[i * K + j];
        }
        for (int64_t j = 0; j < K; ++j) dS[i * K + j] = scale * P[i * K + j] * (dS[i * K + j] - delta);
      }
      for (int64_t i = 0; i < Q; ++i)
        for (int64_t c = 0; c < C; ++c) {
          double s = 0;
          for (int64_t j = 0; j < K; ++j) s += (P[i * K + j] + u[j]) * v(b, j, c);
          y.push_back(s);
        }
      std::vector<double> mean(D);
      const size_t first = dq.size();
      for (int64_t i = 0; i < Q; ++i)
        for (int64_t c = 0; c < D; ++c) {
          double s = 0;
          for (int64_t j = 0; j < K; ++j) s += dS[i * K + j] * (k(b, j, c) - mk[c]);
          dq.push_back(s);
          mean[c] += s / Q;
        }
      for (size_t i = first; whiten && i < dq.size(); ++i) dq[i] -= mean[(i - first) % D];
      for (int64_t j = 0; j < K; ++j) {
        for (int64_t c = 0; c < D; ++c) {
          double s = 0;
          for (int64_t i = 0; i < Q; ++i) s += dS[i * K + j] * (q(b, i, c) - mq[c]);
          dk.push_back(s);
        }
        for (int64_t c = 0; c < C; ++c) {
          double s = 0;
          for (int64_t i = 0; i < Q; ++i) s += (P[i * K + j] + u[j]) * dy(b, i, c);
          dv.push_back(s);
        }
      }
    }
  }
};

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

struct Shape {
  int64_t batches, queries, keys, width, channels;
};

void test_pairwise(const CpuKernels& kernels, const Shape& shape, DType dtype, bool channel_first, bool whiten,
                   int thread_count, bool mask = false, unsigned needs = 7) {
  const auto [B, Q, K, D, C] = shape;
  const double offset = whiten ? 3 : 0;  // uncentred, a shared offset would only make the logits hot
  Matrix q(B, Q, D, dtype, channel_first, offset), k(B, K, D, dtype, channel_first, -offset);
  Matrix v(B, K, C, dtype, channel_first, 1);
  Matrix dy(B, Q, C, dtype, !channel_first), y(B, Q, C, dtype, channel_first), rest(B, Q, C, dtype, channel_first);
  Matrix dq = q, dk = k, dv = v, m(B, K, 1, dtype, false);
  std::vector<double> stats(B * Q * 2), pooled(B * C), mask_lse(B);  // of float, for all but float64
  dnl::PairwiseArgs args{};
  args.query = q.view();
  args.key = k.view();
  args.value = v.view();
  args.output = y.view();
  if (rest.bytes == 2) args.residual = rest.view();
  args.stats = stats.data();
  args.dtype = dtype;
  args.batches = B;
  args.queries = Q;
  args.keys = K;
  args.width = D;
  args.channels = C;
  args.scale = (Q + K) % 2 ? 1 / std::sqrt(double(D)) : -1 / std::sqrt(double(D));
  args.whiten = whiten;
  const Executor executor = host_threads(thread_count);
  if (mask) {
    kernels.unary_forward({m.view(), v.view(), pooled.data(), mask_lse.data(), dtype, B, K, C, nullptr, {}, {}},
                          executor);
    args.pooled = pooled.data(), args.mask_lse = mask_lse.data();
  }
  {
    const Workspace workspace(kernels.pairwise_forward_workspace(args, executor));
    kernels.pairwise_forward(args, workspace.data(), executor);
  }
  args.grad_output = dy.view();
  if (mask) args.mask = m.view();
  if (needs & 1) args.grad_query = dq.view();
  if (needs & 2) args.grad_key = dk.view();
  if (needs & 4) args.grad_value = dv.view();
  {
    const Workspace workspace(kernels.pairwise_backward_workspace(args, executor));
    kernels.pairwise_backward(args, workspace.data(), executor);
  }
  const Truth truth(q, k, v, dy, args.scale, whiten, mask ? &m : nullptr);
  const double bound = dtype == DType::f64 ? 1e-12 : dtype == DType::f32 ? 2e-5 : dtype == DType::f16 ? 3e-3 : 2e-2;
  const auto check = [&](const char* name, const Matrix& x, const std::vector<double>& expected) {
    const double e = error(values(x), expected);
    // With one query or one key the true gradient of q and k is zero and the error is not relative to anything.
    const bool degenerate =
        expected.size() && std::all_of(expected.begin(), expected.end(), [](double t) { return std::abs(t) < 1e-9; });
    CHECK(degenerate || e < bound,
          "%s %s (%ld %ld %ld %ld %ld) dtype %d first %d whiten %d mask %d threads %d: error %g", kernels.name, name,
          (long)B, (long)Q, (long)K, (long)D, (long)C, int(dtype), channel_first, whiten, mask, thread_count, e);
  };
  check("y", y, truth.y);
  if (needs & 1) check("dq", dq, truth.dq);
  if (needs & 2) check("dk", dk, truth.dk);
  if (needs & 4) check("dv", dv, truth.dv);
}

void test_whiten(const CpuKernels& kernels, bool channel_first) {
  Matrix x(3, 77, 19, DType::f32, channel_first, 5), y(3, 77, 19, DType::f32, !channel_first);
  dnl::WhitenArgs args{x.view(), y.view(), DType::f32, 3, 77, 19};
  kernels.standardise(mean_of_columns(args), nullptr, host_threads(2));
  std::vector<double> truth;
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t i = 0; i < 77; ++i)
      for (int64_t c = 0; c < 19; ++c) {
        double mean = 0;
        for (int64_t j = 0; j < 77; ++j) mean += x(b, j, c) / 77;
        truth.push_back(x(b, i, c) - mean);
      }
  const double e = error(values(y), truth);
  CHECK(e < 1e-6, "%s whiten first %d: error %g", kernels.name, channel_first, e);
}

// Forward and backward with statistics per column (group 1), sample (channels) or batch (all columns).
void test_standardise(const CpuKernels& kernels, int64_t group, bool channel_first, bool deviation) {
  const int64_t B = 3, N = 77, C = 19, groups = B * C / group;
  const double eps = 1e-5, n = double(N * group);
  Matrix x(B, N, C, DType::f32, channel_first, 5), y(B, N, C, DType::f32, channel_first);
  Matrix dy(B, N, C, DType::f32, !channel_first, 1), dx(B, N, C, DType::f32, channel_first);
  std::vector<float> rstd(groups);
  void* saved = deviation ? rstd.data() : nullptr;
  dnl::StandardiseArgs args{x.view(), {}, y.view(), saved, DType::f32, B, N, C, group, eps};
  std::vector<double> workspace(kernels.standardise_workspace(args));
  kernels.standardise(args, workspace.data(), host_threads(2));
  args.input = dy.view(), args.result = y.view(), args.output = dx.view();
  kernels.standardise(args, workspace.data(), host_threads(3));

  std::vector<double> mean(groups), factor(groups, 1), mean_dy(groups), slope(groups), truth, gradient;
  const auto visit = [&](auto f) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < N; ++i)
        for (int64_t c = 0; c < C; ++c) f((b * C + c) / group, x(b, i, c), dy(b, i, c));
  };
  visit([&](int64_t g, double value, double grad) { mean[g] += value / n, mean_dy[g] += grad / n; });
  if (deviation) {
    std::vector<double> variance(groups);
    visit([&](int64_t g, double value, double) { variance[g] += (value - mean[g]) * (value - mean[g]) / (n - 1); });
    for (int64_t g = 0; g < groups; ++g) factor[g] = 1 / std::sqrt(variance[g] + eps);
    visit([&](int64_t g, double value, double grad) { slope[g] += grad * (value - mean[g]) * factor[g] / (n - 1); });
  }
  visit([&](int64_t g, double value, double grad) {
    truth.push_back((value - mean[g]) * factor[g]);
    gradient.push_back(factor[g] * (grad - mean_dy[g] - slope[g] * truth.back()));
  });
  const double forward = error(values(y), truth), backward = error(values(dx), gradient);
  CHECK(forward < 1e-6 && backward < 1e-6, "%s standardise group %ld first %d deviation %d: errors %g %g", kernels.name,
        (long)group, channel_first, deviation, forward, backward);
}

void test_softmax(const CpuKernels& kernels, int64_t columns) {
  Matrix x(4, columns, 1, DType::f32, false), p = x, dp(4, columns, 1, DType::f32, false), dx = x;
  dnl::SoftmaxArgs args{x.view(), {}, p.view(), DType::f32, 4, columns};
  kernels.softmax(args, host_threads(2));
  args = {dp.view(), p.view(), dx.view(), DType::f32, 4, columns};
  kernels.softmax_backward(args, host_threads(2));
  std::vector<double> truth, gradient;
  for (int64_t b = 0; b < 4; ++b) {
    double sum = 0, dot = 0;
    for (int64_t j = 0; j < columns; ++j) sum += std::exp(x(b, j, 0));
    for (int64_t j = 0; j < columns; ++j) dot += std::exp(x(b, j, 0)) / sum * dp(b, j, 0);
    for (int64_t j = 0; j < columns; ++j) {
      truth.push_back(std::exp(x(b, j, 0)) / sum);
      gradient.push_back(truth.back() * (dp(b, j, 0) - dot));
    }
  }
  CHECK(error(values(p), truth) < 1e-6, "%s softmax of %ld", kernels.name, (long)columns);
  CHECK(columns == 1 || error(values(dx), gradient) < 1e-5, "%s softmax backward of %ld", kernels.name, (long)columns);
}

void test_unary(const CpuKernels& kernels, const Shape& shape, DType dtype, bool channel_first, int thread_count) {
  const int64_t B = shape.batches, K = shape.keys, C = shape.channels;
  Matrix m(B, K, 1, dtype, false), v(B, K, C, dtype, channel_first, 3), dm = m, dv = v;
  const bool wide = dtype == DType::f64;
  std::vector<double> pooled(B * C), lse(B), grad(B * C);  // of float, for all but float64
  const auto number = [&](std::vector<double>& of, int64_t i) {
    return wide ? of[i] : double(reinterpret_cast<float*>(of.data())[i]);
  };
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < B * C; ++i) {
    const double x = normal(generator);
    if (wide)
      grad[i] = x;
    else
      reinterpret_cast<float*>(grad.data())[i] = static_cast<float>(x);
  }
  dnl::UnaryArgs args{m.view(), v.view(), pooled.data(), lse.data(), dtype, B, K, C, nullptr, {}, {}};
  kernels.unary_forward(args, host_threads(thread_count));
  args.grad_pooled = grad.data(), args.grad_mask = dm.view(), args.grad_value = dv.view();
  kernels.unary_backward(args, host_threads(thread_count));

  std::vector<double> y, got, truth_dm, truth_dv;
  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> u(K), x(K);
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < K; ++j) sum += u[j] = std::exp(m(b, j, 0));
    for (int64_t j = 0; j < K; ++j) u[j] /= sum;
    for (int64_t c = 0; c < C; ++c) {
      double total = 0;
      for (int64_t j = 0; j < K; ++j) total += u[j] * v(b, j, c);
      y.push_back(total), got.push_back(number(pooled, b * C + c));
    }
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t c = 0; c < C; ++c) x[j] += number(grad, b * C + c) * v(b, j, c);
      mean += u[j] * x[j];
    }
    for (int64_t j = 0; j < K; ++j) truth_dm.push_back(u[j] * (x[j] - mean));
    for (int64_t j = 0; j < K; ++j)
      for (int64_t c = 0; c < C; ++c) truth_dv.push_back(u[j] * number(grad, b * C + c));
  }
  const double rounding = dtype == DType::bf16 ? 4e-3 : dtype == DType::f16 ? 1e-3 : wide ? 1e-13 : 2e-6;
  const double of_y = error(got, y), of_dm = error(values(dm), truth_dm), of_dv = error(values(dv), truth_dv);
  CHECK(of_y < (wide ? 1e-13 : 1e-6) && (K == 1 || of_dm < rounding) && of_dv < rounding,
        "%s unary (%ld %ld %ld) dtype %d first %d threads %d: errors %g %g %g", kernels.name, (long)B, (long)K, (long)C,
        int(dtype), channel_first, thread_count, of_y, of_dm, of_dv);
}

// Random cases FIRST .. FIRST + COUNT - 1: a case is drawn from its number alone.
int random_cases(int64_t count, int64_t first) {
  for (int64_t number = first; number < first + count; ++number) {
    generator.seed(static_cast<unsigned>(number + 1));
    const auto upto = [](int64_t least, int64_t most) {
      return std::uniform_int_distribution<int64_t>(least, most)(generator);
    };
    const auto size = [&] { return upto(0, 2) ? upto(1, 40) : upto(1, 150); };
    const auto positions = [&] { return upto(0, 9) ? size() : upto(300, 500); };      // several blocks
    const int64_t queries = upto(0, 3) ? positions() : upto(1, 8);                    // few have kernels of their own
    const int64_t keys = queries < 9 && !upto(0, 2) ? upto(385, 1200) : positions();  // several blocks of theirs
    const Shape shape{upto(1, 4), queries, keys, size(), size()};
    const DType dtype = kTypes[upto(0, 3)];
    const bool first_channel = upto(0, 1), whiten = upto(0, 1), mask = upto(0, 1);
    const auto needs = static_cast<unsigned>(upto(0, 1) ? 7 : upto(1, 6));
    const int thread_count = static_cast<int>(upto(1, 3));
    for (const CpuKernels* kernels : dnl::all_cpu_kernels())
      if (kernels->supported()) {
        test_pairwise(*kernels, shape, dtype, first_channel, whiten, thread_count, mask, needs);
        test_unary(*kernels, shape, dtype, first_channel, thread_count);
        test_softmax(*kernels, shape.keys);
      }
  }
  std::printf("%ld cases\n", static_cast<long>(count));
  return report();
}

int name_sets() {
  for (const CpuKernels* kernels : dnl::all_cpu_kernels())
    if (kernels->supported()) std::printf("%s ", kernels->name);
  try {
    std::printf("%s\n", dnl::cpu_kernels().name);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  return 0;
}

}  // namespace

// Without arguments, the fixed cases; with COUNT [FIRST], random ones; with "sets", the name of each instruction set
// that this CPU has, and last that of the one in use.
int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "sets")) return name_sets();
  if (argc > 1) return random_cases(std::atoll(argv[1]), argc > 2 ? std::atoll(argv[2]) : 0);
  const Shape shapes[] = {{1, 1, 1, 1, 1},       {2, 65, 63, 5, 7},   {1, 200, 390, 33, 17}, {3, 7, 500, 16, 70},
                          {1, 400, 129, 130, 9}, {5, 20, 20, 3, 129}, {1, 5, 1, 2, 3},       {1, 1, 9, 4, 4},
                          {2, 13, 30, 603, 6},   {2, 3, 900, 20, 70}, {3, 8, 400, 7, 33},    {1, 32, 65, 70, 5},
                          {2, 1, 1100, 37, 9},   {1, 2, 40, 16, 300}, {1, 4, 520, 300, 24}};
  for (const CpuKernels* kernels : dnl::all_cpu_kernels()) {
    if (!kernels->supported()) continue;
    for (const Shape& shape : shapes)
      for (DType dtype : kTypes)
        for (int options = 0; options < 4; ++options)
          for (int thread_count : {1, 3}) {
            const bool wide = dtype == DType::f32 || dtype == DType::bf16;  // the others differ in conversions alone
            if (wide || thread_count == 3)
              test_pairwise(*kernels, shape, dtype, options & 1, options & 2, thread_count);
          }
    test_whiten(*kernels, false);
    test_whiten(*kernels, true);
    for (int64_t group : {1, 19, 57})
      for (int options = 0; options < 4; ++options) test_standardise(*kernels, group, options & 1, options & 2);
    for (int64_t columns : {1, 5, 256, 1000, 1100}) test_softmax(*kernels, columns);
    for (const Shape& shape :
         {Shape{1, 1, 1, 1, 1}, {3, 1, 5, 1, 3}, {2, 1, 200, 1, 70}, {1, 1, 77, 1, 85}, {2, 1, 1040, 1, 21}})
      for (DType dtype : kTypes)
        for (bool channel_first : {false, true})
          for (int thread_count : {1, 3}) test_unary(*kernels, shape, dtype, channel_first, thread_count);
  }
  return report();
}
