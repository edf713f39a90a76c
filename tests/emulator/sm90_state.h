// What a block has under way of Hopper's instructions (sm90.h): addresses in shared memory, tensor maps, loads,
// mbarriers, products, registers.
#pragma once

#include <map>

#include "instructions.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------------------------------
// Addresses in shared memory and the 128-byte swizzle
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kSwizzleRow = 128;           // bytes
constexpr int kSwizzle = 8 * kSwizzleRow;  // the pattern repeats
constexpr int kSwizzleChunk = 16;

// As on a GPU, 0 is a multiple of every alignment in use, and the block's memory begins somewhere above.
inline char* shared_origin() {
  const auto begin = reinterpret_cast<uintptr_t>(machine().shared_begin());
  return reinterpret_cast<char*>(begin / kSwizzle * kSwizzle);
}
inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_origin());
}

// The row of an address picks which 16-byte chunks change places.
constexpr uint32_t swizzled(uint32_t address) {
  const uint32_t row = address / kSwizzleRow % 8;
  return address ^ row * kSwizzleChunk;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a block has under way
// ---------------------------------------------------------------------------------------------------------------------

// A (batches, rows, columns) array in global memory, loaded in boxes of one matrix.
struct alignas(128) TensorMap {
  const char* data = nullptr;
  int element_bytes = 0;
  int64_t batches = 0, rows = 0, columns = 0;
  int64_t batch_bytes = 0, pitch_bytes = 0;  // between matrices, between rows
  int box_rows = 0, box_columns = 0;
  bool swizzle = false;  // in shared memory, by 128 bytes

  int64_t box_bytes() const { return int64_t(box_rows) * box_columns * element_bytes; }

  // Throws where cuTensorMapEncodeTiled would refuse. A swizzled box is 128 bytes wide.
  static TensorMap make(const void* data, int element_bytes, int64_t batches, int64_t rows, int64_t columns,
                        int64_t batch_bytes, int64_t pitch_bytes, int box_rows, int box_columns, bool swizzle) {
    constexpr int64_t kMostElements = int64_t(1) << 32, kMostStride = int64_t(1) << 40;
    const int64_t box_width = int64_t(box_columns) * element_bytes;
    const auto require = [](bool holds, const std::string& what) {
      if (!holds) throw Error("tensor map: " + what);
    };
    require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the data is not aligned to 16 bytes");
    require(pitch_bytes % 16 == 0, text("rows are ", pitch_bytes, " bytes apart, not a multiple of 16"));
    require(batch_bytes % 16 == 0, text("matrices are ", batch_bytes, " bytes apart, not a multiple of 16"));
    require(pitch_bytes < kMostStride && batch_bytes < kMostStride, "a stride of 2^40 bytes or more");
    require(pitch_bytes >= columns * element_bytes, text("rows overlap: ", pitch_bytes, " bytes apart"));
    require(batches == 1 || batch_bytes > 0, "a batch without a stride");
    require(batches > 0 && rows > 0 && columns > 0, "no elements");
    require(batches <= kMostElements && rows <= kMostElements && columns <= kMostElements, "more than 2^32 elements");
    require(box_rows >= 1 && box_rows <= 256 && box_columns >= 1 && box_columns <= 256, "a box has 1 to 256 a side");
    require(box_width % 16 == 0, text("a box of ", box_width, " bytes a row, not a multiple of 16"));
    require(!swizzle || box_width == kSwizzleRow, text("a swizzled box has 128 bytes a row, not ", box_width));
    return {static_cast<const char*>(data),
            element_bytes,
            batches,
            rows,
            columns,
            batch_bytes,
            pitch_bytes,
            box_rows,
            box_columns,
            swizzle};
  }
};

// A box on its way.
struct Load {
  char* to;
  TensorMap map;
  int64_t batch, row, column;
};

struct ArrivalBarrier {
  int expected = 0, missing = 0;  // arrivals
  int64_t bytes = 0;              // that loads have yet to bring; negative if they came before they were announced
  uint64_t phase = 0;
  uint32_t address = 0;
  std::vector<std::unique_ptr<Order>> orders;  // of each phase
  std::vector<Load> loads;
};

// One wgmma of one thread: what of it is this thread's to compute.
struct Product {
  float* result;
  void (*run)(const Product&, std::vector<float>& sums, unsigned thread);
  uint64_t a, b;               // descriptors
  uint32_t a_registers[4][4];  // or those of the four lanes that share the thread's rows
  bool accumulate;
  const uint32_t* own_registers;  // of this lane, which must keep them until the product is waited for
  unsigned own;                   // which of the four it is
  Site site;
};

struct ThreadProducts {
  std::vector<Product> products;                 // oldest first
  std::vector<size_t> groups;                    // how many in each committed group
  std::map<float*, std::vector<float>> results;  // what the arrays will hold
  size_t issued = 0;
  bool fenced = false;  // by wgmma.fence, since the thread could last touch registers of a product
};

// What the four warps of a warpgroup must agree on.
struct Signature {
  void (*run)(const Product&, std::vector<float>&, unsigned);
  uint64_t a, b;
  bool accumulate;

  bool operator==(const Signature& other) const {
    return run == other.run && a == other.a && b == other.b && accumulate == other.accumulate;
  }
};

constexpr unsigned kWarpgroup = 128;
constexpr int kRegisterFile = 64 << 10;  // registers of a multiprocessor

struct Hopper : BlockExtension {
  std::vector<char> async_view;       // dynamic shared memory as TMA and wgmma see it
  std::map<unsigned, int> registers;  // of each thread that has asked for another number
  std::map<const void*, ArrivalBarrier> barriers;
  std::map<unsigned, ThreadProducts> products;          // of each thread
  std::map<unsigned, std::vector<Signature>> sequence;  // of each warpgroup

  std::string unfinished() const override {
    for (const auto& [place, barrier] : barriers)
      if (!barrier.loads.empty())
        return text("ended with a TMA load under way, for the mbarrier at ", barrier.address, " in shared memory");
    for (const auto& [thread, mine] : products) {
      if (!mine.products.empty()) return text("ended with a wgmma under way in thread ", thread);
      if (mine.issued != sequence.at(thread / kWarpgroup).size())
        return text("ended with fewer wgmmas in thread ", thread, " than in others of its warpgroup");
    }
    return registers.empty() ? "" : registers_amiss();
  }

 private:
  std::string registers_amiss() const {
    int64_t total = 0;
    for (unsigned thread = 0; thread < machine().threads(); ++thread) {
      const int count = registers_of(thread);
      if (count != registers_of(thread / kWarpgroup * kWarpgroup))
        return text("ended with ", count, " registers in thread ", thread, ", others of its warpgroup with ",
                    registers_of(thread / kWarpgroup * kWarpgroup));
      total += count;
    }
    if (total <= kRegisterFile) return "";
    return text("waits for registers: its threads ask for ", total, " in all, there are ", kRegisterFile);
  }

 public:
  // What a block of that many threads starts with, where they asked for nothing else.
  int registers_of(unsigned thread) const {
    const auto found = registers.find(thread);
    return found != registers.end() ? found->second : kRegisterFile / static_cast<int>(machine().threads()) / 8 * 8;
  }
};

inline Hopper& hopper() { return machine().extension<Hopper>(); }

}  // namespace emulator
