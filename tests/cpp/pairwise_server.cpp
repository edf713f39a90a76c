// Pairwise attention by this program's CPU kernels for another process, which need not be of the same machine: calls
// come from the standard input, results go to the standard output. tests/arm_route.py writes and reads them.
//
// A call: Header; then Slots, in their order: their number of bytes, where in elements, offsets of the batch elements,
// and what is in memory. The answer: the memory of the slots that the call writes, in their order.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/cpu/kernels.h"
#include "host_threads.h"

namespace {

struct Header {
  int64_t backward, dtype, batches, queries, keys, width, channels, whiten, threads;
  double scale;
};

enum SlotName {
  kQuery,
  kKey,
  kValue,
  kOutput,
  kStats,
  kResidual,
  kPooled,
  kMask,
  kMaskLse,
  kGradOutput,
  kGradQuery,
  kGradKey,
  kGradValue,
  kGradMask,
  kSlots
};

struct Place {
  int64_t bytes, position, channel;  // bytes = 0: absent
};

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

struct Slot {
  Place place{};
  std::vector<int64_t> offsets;
  std::vector<char> memory;

  bool read_from_input(int64_t batches) {
    if (!read(&place, sizeof place)) return false;
    if (!place.bytes) return true;
    offsets.resize(batches), memory.resize(place.bytes);
    return read(offsets.data(), batches * sizeof(int64_t)) && read(memory.data(), memory.size());
  }
  void* data() { return place.bytes ? memory.data() : nullptr; }
  dnl::View view() {
    return place.bytes ? dnl::View{memory.data(), offsets.data(), place.position, place.channel} : dnl::View{};
  }
};

bool serve_call() {
  Header header;
  if (!read(&header, sizeof header)) return false;
  Slot slots[kSlots];
  for (Slot& slot : slots)
    if (!slot.read_from_input(header.batches)) return false;
  dnl::PairwiseArgs args{};
  args.query = slots[kQuery].view(), args.key = slots[kKey].view(), args.value = slots[kValue].view();
  args.output = slots[kOutput].view(), args.residual = slots[kResidual].view();
  args.stats = slots[kStats].data(), args.pooled = slots[kPooled].data(), args.mask_lse = slots[kMaskLse].data();
  args.mask = slots[kMask].view(), args.grad_output = slots[kGradOutput].view();
  args.grad_query = slots[kGradQuery].view(), args.grad_key = slots[kGradKey].view();
  args.grad_value = slots[kGradValue].view(), args.grad_mask = slots[kGradMask].view();
  args.dtype = static_cast<dnl::DType>(header.dtype);
  args.batches = header.batches, args.queries = header.queries, args.keys = header.keys;
  args.width = header.width, args.channels = header.channels;
  args.scale = header.scale, args.whiten = header.whiten;
  const dnl::Executor executor = host_threads(static_cast<int>(header.threads));
  const dnl::CpuKernels& kernels = dnl::cpu_kernels();
  if (header.backward) {
    const Workspace workspace(kernels.pairwise_backward_workspace(args, executor));
    kernels.pairwise_backward(args, workspace.data(), executor);
  } else {
    const Workspace workspace(kernels.pairwise_forward_workspace(args, executor));
    kernels.pairwise_forward(args, workspace.data(), executor);
  }
  const int first = header.backward ? kGradQuery : kOutput, last = header.backward ? kGradMask : kResidual;
  for (int s = first; s <= last; ++s) std::fwrite(slots[s].memory.data(), 1, slots[s].memory.size(), stdout);
  return std::fflush(stdout) == 0;
}

}  // namespace

int main() {
  while (serve_call()) {
  }
  return std::feof(stdin) ? 0 : 1;
}
