// Prints what a call of pairwise attention launches, without a GPU: the drivers run on a device that launches nothing.
//
//   launches forward|backward chain|fused|hopper rows|channel-first B N M D C CAPABILITY MULTIPROCESSORS [KEY_TILES]
//
// A line of JSON per launch, in order: a kernel by its mangled name with its blocks, threads, dynamic shared memory and
// parameters as they lie in constant memory, or a library product by its sizes and element bytes; and before a fused
// forward, how many tiles of keys a block passes. KEY_TILES: it passes that many, under the plan of the whole call. Of
// kernels whose blocks walk over tiles, the line has the tiles of the first block.
#define DNL_EXT_HOPPER  // before the headers: the drivers of all paths are defined
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

// clang-format off
#include "emulator.h"
#include "device.h"
#include "sm90.h"
// clang-format on
#include "ops/pairwise/chain/backward.cuh"
#include "ops/pairwise/chain/forward.cuh"
#include "ops/pairwise/fused/forward.cuh"
#include "ops/pairwise/hopper/backward_map.cuh"
#include "ops/pairwise/hopper/forward.cuh"
#include "ops/unary/unary_cuda.cuh"

using namespace dnl;

static_assert(alignof(TensorMap) == 128 && sizeof(TensorMap) == 128, "as CUtensorMap: parameters lie as on the device");

template <class T, class = void>
struct HasTiles : std::false_type {};
template <class T>
struct HasTiles<T, std::void_t<decltype(T::tiles)>> : std::true_type {};

struct RecordingDevice {
  Gpu on;
  uintptr_t next = uintptr_t(1) << 40;  // of memory that is never touched

  template <class T>
  T* allocate(int64_t count) {
    const uintptr_t address = next;
    next += round_up_to(count * sizeof(T), 512);
    return count ? reinterpret_cast<T*>(address) : nullptr;
  }

  Gpu gpu() const { return on; }

  template <class T, class Out>
  void product(const Matrix<const T>&, const Matrix<const T>&, const Matrix<Out>&, int64_t batches, int64_t m,
               int64_t n, int64_t k, bool accumulate = false) const {
    static_cast<void>(accumulate);  // costs what the first product does
    std::printf("{\"product\": [%ld, %ld, %ld, %ld], \"bytes\": [%zu, %zu]}\n", long(batches), long(m), long(n),
                long(k), sizeof(T), sizeof(Out));
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Tasks& tasks, const Arguments&... arguments) const {
    launch(kernel, LaunchShape{tasks.count, kThreads, tasks.shared_bytes}, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) const {
    Dl_info symbol{};
    dladdr(reinterpret_cast<const void*>(kernel), &symbol);
    std::vector<unsigned char> bytes;
    // As conversions to the parameters' types would pass them.
    (append(bytes, static_cast<Parameters>(arguments)), ...);
    std::printf("{\"kernel\": \"%s\", \"blocks\": %ld, \"threads\": %d, \"shared\": %ld, \"parameters\": \"",
                symbol.dli_sname ? symbol.dli_sname : "", long(shape.blocks), shape.threads, long(shape.shared_bytes));
    for (const unsigned char byte : bytes) std::printf("%02x", byte);
    std::printf("\", \"alignment\": %zu", std::max({alignof(Parameters)...}));
    (print_tiles(arguments, shape.blocks), ...);
    std::printf("}\n");
  }

  template <class T>
  static void print_tiles(const T& parameter, int64_t blocks) {
    if constexpr (HasTiles<T>::value) std::printf(", \"tiles\": %ld", long(ceil_div_of(parameter.tiles, blocks)));
  }

  template <class T>
  static void append(std::vector<unsigned char>& bytes, const T& parameter) {
    bytes.resize(round_up_to(bytes.size(), alignof(T)));
    const auto* data = reinterpret_cast<const unsigned char*>(&parameter);
    bytes.insert(bytes.end(), data, data + sizeof(T));
  }
};

int main(int argc, char** argv) {
  using T = __nv_bfloat16;
  if (argc < 11) return 2;
  const std::string direction = argv[1], path = argv[2], layout = argv[3];
  const auto number = [&](int i) { return std::stoll(argv[i]); };
  const int64_t B = number(4), N = number(5), M = number(6), D = number(7), C = number(8);
  const int capability = static_cast<int>(number(9));
  const bool channel_first = layout == "channel-first";

  RecordingDevice device{{capability, static_cast<int>(number(10)), shared_bytes_of(capability)}};
  std::vector<std::vector<int64_t>> offsets;
  offsets.reserve(16);
  const auto view = [&](int64_t positions, int64_t channels) {
    offsets.emplace_back();
    for (int64_t b = 0; b < B; ++b) offsets.back().push_back(b * positions * channels);
    return View{device.allocate<T>(B * positions * channels), offsets.back().data(), channel_first ? 1 : channels,
                channel_first ? positions : 1};
  };
  PairwiseArgs args{};
  args.query = view(N, D), args.key = view(M, D), args.value = view(M, C), args.output = view(N, C);
  args.stats = device.allocate<float>(2 * B * N);
  args.dtype = DType::bf16;
  args.batches = B, args.queries = N, args.keys = M, args.width = D, args.channels = C;
  args.scale = 0.0625, args.whiten = true;

  if (direction == "forward") {
    if (path == "chain") {
      pairwise_forward_cuda<T>(args, device);
      return 0;
    }
    ForwardPlan plan = plan_fused_forward(shape_of<T>(args), device.gpu());
    if (path == "hopper") plan = plan_hopper_forward(shape_of<T>(args), device.gpu());
    const int64_t key_tiles = ceil_div_of(M, kForwardTiles[plan.tile].keys);
    std::printf("{\"tiles\": %ld}\n", long(ceil_div_of(key_tiles, plan.splits)));
    if (argc > 11) {
      plan.splits = 1;
      args.keys = number(11) * kForwardTiles[plan.tile].keys;
    }
    if (path == "hopper") {
      pairwise_hopper_forward_cuda<T>(args, device, plan);
      return 0;
    }
    pairwise_fused_forward_cuda<T>(args, device, plan);
    return 0;
  }
  args.residual = view(N, C);
  args.grad_output = view(N, C);
  args.grad_query = view(N, D), args.grad_key = view(M, D), args.grad_value = view(M, C);
  const auto by = path == "hopper" ? BackwardMap::hopper : path == "fused" ? BackwardMap::fused : BackwardMap::products;
  pairwise_backward_cuda<T>(args, device, {}, {by, device.gpu().multiprocessors});
}
