// The instructions behind csrc/core/cuda/ptx_sm90.cuh: mbarrier, TMA loads, wgmma and their fences, setmaxnreg. Each
// runs at the worst moment that the rules allow: a load lands when somebody waits for it, and a product reads its
// operands and writes its result when the thread waits; until then both destinations are NaN.
#pragma once

#include "sm90_state.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------------------------------
// Proxies: TMA and wgmma see what a thread wrote to shared memory only after fence.proxy.async
// ---------------------------------------------------------------------------------------------------------------------

// Of the byte at `address`, with bookkeeping unseen.
inline char& async_byte(const void* address) {
  std::vector<char>& view = hopper().async_view;
  if (view.empty()) view.assign(machine().shared_bytes(), static_cast<char>(kPoison));
  return view[static_cast<const char*>(address) - machine().shared_begin()];
}

// Looser than a GPU: what all threads wrote becomes visible, not only what this one did.
inline void fence_async_proxy() {
  const Unseen unseen;
  std::memcpy(&async_byte(machine().shared_begin()), machine().shared_begin(), machine().shared_bytes());
}

// What TMA writes is visible to both.
inline void async_wrote(const void* address, int64_t bytes) {
  const Unseen unseen;
  std::memcpy(&async_byte(address), address, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// setmaxnreg
// ---------------------------------------------------------------------------------------------------------------------

inline void nothing_together(int* const (&)[kWarpLanes]) {}

inline void set_registers(int count, bool more, const Site& site) {
  Machine& self = machine();
  self.meet("setmaxnreg", kEveryLane, count, &nothing_together, site);
  const Unseen unseen;
  const unsigned thread = self.thread_index();
  const int before = hopper().registers_of(thread);
  if (more ? count < before : count > before)
    self.fail(text("setmaxnreg: ", count, " registers are not ", more ? "more" : "fewer", " than ", before), site);
  hopper().registers[thread] = count;
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarrier
// ---------------------------------------------------------------------------------------------------------------------

constexpr uint64_t kBarrierMark = 0x6d62617272696572;  // in the eight bytes, so that other uses of them are noticed

inline void mbarrier_init(uint64_t* place, int arrivals, const Site& site) {
  check_shared("mbarrier", place, sizeof(*place), sizeof(*place), site);
  if (arrivals < 1) machine().fail(text("mbarrier_init for ", arrivals, " arrivals"), site);
  *place = kBarrierMark;
  const Unseen unseen;
  ArrivalBarrier& barrier = hopper().barriers[place] = {};
  barrier.expected = barrier.missing = arrivals;
  barrier.address = shared_address(place);
  barrier.orders.push_back(std::make_unique<Order>());
}

inline ArrivalBarrier& mbarrier_at(uint64_t* place, const Site& site) {
  check_shared("mbarrier", place, sizeof(*place), sizeof(*place), site);
  // Races with an init that nothing has ordered before it.
  const uint64_t mark = __atomic_load_n(place, __ATOMIC_RELAXED);
  const Unseen unseen;
  auto& barriers = hopper().barriers;
  const auto found = barriers.find(place);
  if (found == barriers.end()) machine().fail("mbarrier: used before its init", site);
  if (mark != kBarrierMark) machine().fail("mbarrier: something else was written to it", site);
  return found->second;
}

inline Order* order_of(ArrivalBarrier& barrier, uint64_t phase) {
  const Unseen unseen;
  return barrier.orders[phase].get();
}

// With bookkeeping unseen.
inline void settle(ArrivalBarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  ++barrier.phase;
  barrier.missing = barrier.expected;
  barrier.orders.push_back(std::make_unique<Order>());
  machine().wake(&barrier);
}

inline void mbarrier_arrive(uint64_t* place, int64_t expect_bytes, const Site& site) {
  ArrivalBarrier& barrier = mbarrier_at(place, site);
  order_of(barrier, barrier.phase)->release();
  const Unseen unseen;
  if (barrier.missing == 0)
    machine().fail(text("mbarrier: one arrival more than the ", barrier.expected, " of its init"), site);
  barrier.bytes += expect_bytes;
  --barrier.missing;
  settle(barrier);
}

inline void land(const Load& load) {
  for (int r = 0; r < load.map.box_rows; ++r)
    for (int c = 0; c < load.map.box_columns; ++c) {
      const int64_t row = load.row + r, column = load.column + c;
      uint32_t offset = static_cast<uint32_t>((r * load.map.box_columns + c) * load.map.element_bytes);
      if (load.map.swizzle) offset = swizzled(offset);  // of the offset too: the box is aligned to the pattern
      const bool inside = row >= 0 && row < load.map.rows && column >= 0 && column < load.map.columns &&
                          load.batch >= 0 && load.batch < load.map.batches;
      const char* from = load.map.data + load.batch * load.map.batch_bytes + row * load.map.pitch_bytes +
                         column * load.map.element_bytes;
      if (inside)
        std::memcpy(load.to + offset, from, load.map.element_bytes);
      else
        std::memset(load.to + offset, 0, load.map.element_bytes);
    }
  async_wrote(load.to, load.map.box_bytes());
}

// Lands the loads that were issued for the barrier: in the eyes of ThreadSanitizer, an access of the thread that waits,
// after everything the threads did that have arrived.
inline void land_all(ArrivalBarrier& barrier) {
  std::vector<Load> landing;
  {
    const Unseen unseen;
    landing.swap(barrier.loads);
  }
  if (landing.empty()) return;
  Order* order = order_of(barrier, barrier.phase);
  order->acquire();
  for (const Load& load : landing) land(load);
  order->release();
  const Unseen unseen;
  for (const Load& load : landing) barrier.bytes -= load.map.box_bytes();
  settle(barrier);
}

// Until the phase of that parity has completed; the first one has parity 0, the one before it counts as complete.
inline void mbarrier_wait(uint64_t* place, int parity, const Site& site) {
  ArrivalBarrier& barrier = mbarrier_at(place, site);
  const auto complete = [&] {
    const Unseen unseen;
    return (barrier.phase & 1) != static_cast<uint64_t>(parity & 1);
  };
  land_all(barrier);
  while (!complete()) {
    {
      const Unseen unseen;
      machine().wait_at(&barrier, site, [](const Thread& thread) {
        const auto& at = *static_cast<const ArrivalBarrier*>(thread.place);
        return text("for the mbarrier at ", at.address, " in shared memory: ", at.missing, " of ", at.expected,
                    " arrivals and ", at.bytes, " bytes are missing");
      });
    }
    machine().pause();
    land_all(barrier);
  }
  uint64_t phase;
  {
    const Unseen unseen;
    phase = barrier.phase;
  }
  if (phase) order_of(barrier, phase - 1)->acquire();
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA
// ---------------------------------------------------------------------------------------------------------------------

inline void tma_load_3d(void* to, const TensorMap& map, int column, int row, int batch, uint64_t* place,
                        const Site& site) {
  check_shared("TMA load", to, map.box_bytes(), map.swizzle ? kSwizzle : kSwizzleRow, site);
  ArrivalBarrier& barrier = mbarrier_at(place, site);
  std::memset(to, kPoison, map.box_bytes());
  async_wrote(to, map.box_bytes());
  order_of(barrier, barrier.phase)->release();
  const Unseen unseen;
  barrier.loads.push_back({static_cast<char*>(to), map, batch, row, column});
  machine().wake(&barrier);  // somebody who waits already lets it land
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: d += a b for a (64, 16), b (16, N), d (64, N), by the 128 threads of a warpgroup
// ---------------------------------------------------------------------------------------------------------------------

// What a descriptor says, in bytes.
struct Operand {
  uint32_t start, leading, stride;

  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {}
};

// Reads the 16-bit elements of an operand in shared memory.
template <class T, bool kAlongK>
class OperandReader {
 public:
  explicit OperandReader(uint64_t descriptor) : operand_(descriptor) {
    const Unseen unseen;
    origin_ = shared_origin();
    begin_ = machine().shared_begin();
    bytes_ = machine().shared_bytes();
    async_view_ = &async_byte(begin_);
  }

  // Element (i, k), i along M or N.
  float operator()(int i, int k) const {
    constexpr int kWide = kSwizzleRow / int(sizeof(T));  // elements of a row of the pattern
    const uint32_t offset =
        kAlongK ? i % 8 * kSwizzleRow + i / 8 * operand_.stride + k * sizeof(T)
                : i % kWide * sizeof(T) + i / kWide * operand_.leading + k % 8 * kSwizzleRow + k / 8 * operand_.stride;
    const char* element = origin_ + swizzled(operand_.start + offset);
    const int64_t byte = element - begin_;
    if (byte < 0 || byte + int64_t(sizeof(T)) > bytes_) check_shared("wgmma operand", element, sizeof(T), 2, {});
    const uint16_t bits = *reinterpret_cast<const uint16_t*>(element);
    if (std::memcmp(async_view_ + byte, &bits, sizeof(bits)))
      machine().fail("wgmma: reads what a thread wrote without fence.proxy.async");
    return element_of<T>(bits, 0);
  }

 private:
  Operand operand_;
  const char *origin_, *begin_, *async_view_;
  int64_t bytes_;
};

inline void check_descriptor(uint64_t descriptor, bool along_k, const Site& site) {
  const Operand x(descriptor);
  if (descriptor >> 62 != 1) machine().fail("wgmma: the descriptor does not say 128-byte swizzle", site);
  if (descriptor >> 49 & 7 || x.start / kSwizzleRow % 8)
    machine().fail("wgmma: the operand does not begin in the first row of the swizzle's pattern", site);
  if (along_k ? x.start % kSwizzleRow > kSwizzleRow - 32 : x.start % kSwizzleRow != 0)
    machine().fail("wgmma: the operand goes beyond a row of the swizzle's pattern", site);
}

template <class T, int N, bool kRegisters, bool kAAlongK, bool kBAlongK>
void run_product(const Product& product, std::vector<float>& sums, unsigned thread) {
  constexpr int kInner = 16;
  const int lane = thread % kWarpLanes, warp = thread % kWarpgroup / kWarpLanes;
  const OperandReader<T, kAAlongK> a_operand(product.a);
  const OperandReader<T, kBAlongK> b_operand(product.b);
  float a[2][kInner];  // rows lane / 4 and lane / 4 + 8 of the warp's sixteen
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kInner; ++k)
      a[half][k] = kRegisters ? element_of<T>(product.a_registers[k % 8 / 2][k / 8 * 2 + half], k % 2)
                              : a_operand(warp * 16 + lane / 4 + half * 8, k);
  for (int first = 0; first < N; first += 8)
    for (int pair = 0; pair < 2; ++pair) {
      const int column = first + lane % 4 * 2 + pair;
      float b[kInner];
      for (int k = 0; k < kInner; ++k) b[k] = b_operand(column, k);
      for (int half = 0; half < 2; ++half) {
        float& sum = sums[first / 2 + half * 2 + pair];
        if (!product.accumulate) sum = 0;
        for (int k = 0; k < kInner; ++k) sum += a[half][k] * b[k];
      }
    }
}

// What a lane brings; it leaves with the registers of its quad.
struct Issue {
  Signature signature;
  const uint32_t* registers;  // or nullptr
  uint32_t quad[4][4];
  bool agreed;
};

inline void gather_quads(Issue* const (&lanes)[kWarpLanes]) {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    lanes[lane]->agreed = lanes[lane]->signature == lanes[0]->signature;
    for (unsigned j = 0; j < 4 && lanes[lane]->registers; ++j)
      std::memcpy(lanes[lane]->quad[j], lanes[lane / 4 * 4 + j]->registers, sizeof(lanes[lane]->quad[j]));
  }
}

// `a_registers` or the descriptor `a`.
template <class T, int N, bool kAAlongK, bool kBAlongK>
void wgmma(float (&d)[N / 2], const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate, const Site& site) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "widths that wgmma has");
  Machine& self = machine();
  const unsigned thread = self.thread_index(), group = thread / kWarpgroup;
  if ((group + 1) * kWarpgroup > self.threads()) self.fail("wgmma: the warpgroup is not whole", site);
  if (!a_registers) check_descriptor(a, kAAlongK, site);
  check_descriptor(b, kBAlongK, site);
  const auto run =
      a_registers ? &run_product<T, N, true, kAAlongK, kBAlongK> : &run_product<T, N, false, kAAlongK, kBAlongK>;
  Issue issue{{run, a, b, accumulate}, a_registers, {}, false};
  self.meet("wgmma", kEveryLane, issue, &gather_quads, site);
  const Unseen unseen;
  auto& sequence = hopper().sequence[group];
  ThreadProducts& mine = hopper().products[thread];
  if (mine.issued == sequence.size()) sequence.push_back(issue.signature);
  if (!issue.agreed || !(sequence[mine.issued] == issue.signature))
    self.fail("wgmma: threads of the warpgroup came with different operands", site);
  // Products in flight add to the same registers in their order; whatever else touches them needs the fence between.
  if (!mine.fenced && (a_registers || !mine.results.count(d)))
    self.fail("wgmma: no wgmma_fence since the thread could last touch its registers", site);
  ++mine.issued;
  Product product{d, run, a, b, {}, accumulate, a_registers, self.lane() % 4, site};
  std::memcpy(product.a_registers, issue.quad, sizeof(issue.quad));
  mine.results.try_emplace(d, d, d + N / 2);
  std::fill_n(d, N / 2, std::numeric_limits<float>::quiet_NaN());
  mine.products.push_back(product);
}

// fence, commit and wait are `.aligned`: every thread of the warpgroup comes to the same ones in the same order.
enum class Aligned : uint64_t { fence, commit, wait };

// With bookkeeping unseen.
inline ThreadProducts& aligned(Aligned what, uint64_t argument, const Site& site) {
  const unsigned thread = machine().thread_index();
  auto& sequence = hopper().sequence[thread / kWarpgroup];
  ThreadProducts& mine = hopper().products[thread];
  const Signature signature{nullptr, static_cast<uint64_t>(what), argument, false};
  if (mine.issued == sequence.size()) sequence.push_back(signature);
  if (!(sequence[mine.issued] == signature))
    machine().fail("wgmma: threads of the warpgroup came to different fences, commits or waits", site);
  ++mine.issued;
  return mine;
}

inline void wgmma_fence(const Site& site) {
  const Unseen unseen;
  aligned(Aligned::fence, 0, site).fenced = true;
}

inline void wgmma_commit(const Site& site) {
  const Unseen unseen;
  ThreadProducts& mine = aligned(Aligned::commit, 0, site);
  size_t committed = 0;
  for (size_t group : mine.groups) committed += group;
  mine.groups.push_back(mine.products.size() - committed);
}

inline void wgmma_wait(size_t left, const Site& site) {
  ThreadProducts* mine;
  std::vector<Product> finishing;
  {
    const Unseen unseen;
    mine = &aligned(Aligned::wait, left, site);
    size_t count = 0;
    while (mine->groups.size() > left) {
      count += mine->groups.front();
      mine->groups.erase(mine->groups.begin());
    }
    finishing.assign(mine->products.begin(), mine->products.begin() + count);
    mine->products.erase(mine->products.begin(), mine->products.begin() + count);
  }
  if (!finishing.empty()) machine().defer();
  for (const Product& product : finishing) {
    if (product.own_registers &&
        std::memcmp(product.own_registers, product.a_registers[product.own], sizeof(product.a_registers[0])))
      machine().fail("wgmma: registers of its operand changed before the wait", product.site);
    product.run(product, mine->results.at(product.result), machine().thread_index());
  }
  const Unseen unseen;
  for (auto entry = mine->results.begin(); entry != mine->results.end();) {
    const bool busy = std::any_of(mine->products.begin(), mine->products.end(),
                                  [&](const Product& product) { return product.result == entry->first; });
    if (!busy) std::copy(entry->second.begin(), entry->second.end(), entry->first), mine->fenced = false;
    entry = busy ? std::next(entry) : mine->results.erase(entry);
  }
}

}  // namespace emulator
