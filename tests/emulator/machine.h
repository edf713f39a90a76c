// The machine: runs the blocks of a launch one after another, every thread of a block in a fiber of its own, and holds
// what threads meet at: barriers, and the collectives of a warp.
//
// A fiber runs until it waits. A warp runs as far as it can before another one gets its turn, so that it meets what
// slower warps have not yet done. When nobody can go on, the block is stuck, and the error says who waits where.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "shared_memory.h"
#include "state.h"

namespace emulator {

class Machine {
 public:
  static constexpr int kBarriers = 16;

  Options options;
  Statistics statistics;

  // Runs `kernel` in blocks * threads fibers. Throws Error, with the block and thread in its message.
  void launch(int64_t blocks, int64_t threads, int64_t shared_bytes, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(one_at_a_time_);
    check_limits(blocks, threads, shared_bytes);
    {
      const Unseen scheduler;
      ++statistics.launches;
      kernel_ = std::move(kernel);
      blocks_ = static_cast<unsigned>(blocks);
      thread_count_ = static_cast<unsigned>(threads);
      shared_bytes_ = shared_bytes;
      error_ = nullptr;
      generator_.seed(options.seed);
      run_blocks();
      traces_.free();
      kernel_ = nullptr;
    }
    launch_order_.acquire();
    if (error_) std::rethrow_exception(error_);
  }

  // What a kernel asks of the thread it runs in.
  EMULATOR_UNSEEN unsigned thread_index() const { return current_->index; }
  EMULATOR_UNSEEN unsigned lane() const { return current_->index % kWarpLanes; }
  EMULATOR_UNSEEN unsigned block_index() const { return block_; }
  EMULATOR_UNSEEN unsigned block_count() const { return blocks_; }
  EMULATOR_UNSEEN unsigned threads() const { return thread_count_; }
  EMULATOR_UNSEEN Thread& current() const { return *current_; }

  // Dynamic shared memory of the block, aligned to `alignment` and not to more.
  char* dynamic_shared(size_t alignment) {
    const Unseen unseen;
    if (!shared_.begin()) shared_.allocate(static_cast<size_t>(shared_bytes_), alignment);
    if (shared_.alignment() != alignment) fail("dynamic shared memory was asked for with two alignments");
    return shared_.begin();
  }
  int64_t shared_bytes() const { return shared_bytes_; }
  char* shared_begin() const { return shared_.begin(); }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(text(what, " [block ", block_, ", thread ", current_->index, "]"));
  }
  [[noreturn]] void fail(const std::string& what, const Site& site) const { fail(text(what, " at ", site)); }

  // bar.sync id, threads; for id 0 and threads = 0, __syncthreads.
  void barrier(int id, unsigned threads, const Site& site) {
    Order* order = nullptr;
    {
      const Unseen unseen;
      if (id < 0 || id >= kBarriers) fail(text("barrier ", id, ": a block has barriers 0 to ", kBarriers - 1), site);
      if (threads % kWarpLanes) fail(text("barrier ", id, " for ", threads, " threads: not whole warps"), site);
      if (threads > thread_count_) fail(text("barrier ", id, " for ", threads, " threads: the block has fewer"), site);
      Barrier& barrier = barriers_[id];
      if (!barrier.arrived) barrier = {id, 0, threads, site, new_order()};
      if (barrier.threads != threads)
        fail(text("barrier ", id, " for ", threads, " threads, where others came to it for ", barrier.threads, " at ",
                  barrier.site),
             site);
      // The same barrier means the same line to the compiler: it may not be reached by different branches.
      if (threads == 0 && !(barrier.site == site))
        fail(text("__syncthreads, while other threads are at __syncthreads at ", barrier.site), site);
      order = barrier.order;
    }
    order->release();
    bool last = false;
    {
      const Unseen unseen;
      Barrier& barrier = barriers_[id];
      ++barrier.arrived;
      ++order->leaving;
      last = barrier.arrived == (threads ? threads : alive_);
      if (last)
        open(barrier);
      else
        wait_at(&barrier, site, [](const Thread& thread) {
          const auto& at = *static_cast<const Barrier*>(thread.place);
          return at.threads ? text("at barrier ", at.id, " for ", at.threads, " threads, ", at.arrived, " came")
                            : text("at __syncthreads");
        });
    }
    if (!last) pause();
    depart(order);
  }

  // A collective of a warp. Every lane of `mask` brings `argument`; the last one to come runs `together` on all of
  // them (nullptr for lanes that are not in the mask). `orders`: whether it orders memory, as __syncwarp does.
  template <class A>
  void meet(const char* name, unsigned mask, A& argument, void (*together)(A* const (&)[kWarpLanes]), const Site& site,
            bool orders = false) {
    Order* order = nullptr;
    {
      const Unseen unseen;
      order = join(name, mask, reinterpret_cast<void (*)()>(together), site, orders)->order;
    }
    if (order) order->release();
    bool last = false;
    {
      const Unseen unseen;
      const unsigned lane = current_->index % kWarpLanes;
      Gathering* gathering = find(mask);
      gathering->arguments[lane] = &argument;
      gathering->arrived |= 1u << lane;
      if (order) ++order->leaving;
      last = gathering->arrived == mask;
      if (last) {
        A* arguments[kWarpLanes];
        for (unsigned l = 0; l < kWarpLanes; ++l) arguments[l] = static_cast<A*>(gathering->arguments[l]);
        together(arguments);
        wake(gathering, current_->index / kWarpLanes * kWarpLanes, kWarpLanes);
        gatherings_[current_->index / kWarpLanes].remove_if([&](const Gathering& g) { return &g == gathering; });
      } else {
        wait_at(gathering, site, [](const Thread& thread) {
          const auto& at = *static_cast<const Gathering*>(thread.place);
          return text("in ", at.name, " of lanes ", lanes_of(at.mask), " without lanes ",
                      lanes_of(at.mask & ~at.arrived));
        });
      }
    }
    if (!last) pause();
    if (order) depart(order);
  }

  // The block's one extension, made at first use.
  template <class E>
  E& extension() {
    if (!extension_) extension_ = std::make_unique<E>();
    return static_cast<E&>(*extension_);
  }

  // Waiting at places that are not the machine's own. Call wait_at() with bookkeeping unseen, then pause().
  void wait_at(const void* place, const Site& site, std::string (*describe)(const Thread&)) {
    current_->state = State::waiting;
    current_->place = place;
    current_->site = site;
    current_->waits_for = describe;
  }
  void wake(const void* place) { wake(place, 0, thread_count_); }
  void wake(const void* place, unsigned first, unsigned count) {
    for (unsigned t = first; t < first + count && t < thread_count_; ++t)
      if (thread_list_[t].state == State::waiting && thread_list_[t].place == place)
        thread_list_[t].state = State::ready;
  }
  void pause() {
    current_->fiber->leave(home_, false);
    if (stopping_) throw Stop{};
  }
  // Goes on only when nobody else can: what it is about to do takes as long as it may.
  void defer() {
    {
      const Unseen unseen;
      current_->state = State::deferred;
    }
    pause();
  }
  Order* new_order() { return kThreadSanitizer ? new Order : &no_order_; }
  void depart(Order* order) {
    order->acquire();
    const Unseen unseen;
    if (--order->leaving == 0 && order != &no_order_) delete order;
  }

 private:
  struct Stop {};  // unwinds the fibers that are left when a block has failed

  void check_limits(int64_t blocks, int64_t threads, int64_t shared_bytes) const {
    const auto limit = [](const char* what, int64_t value, int64_t least, int64_t most) {
      if (value < least || value > most)
        throw Error(text("launch: ", what, " is ", value, ", expected ", least, " to ", most));
    };
    limit("the number of blocks", blocks, 1, options.max_blocks);
    limit("the number of threads of a block", threads, 1, options.max_threads);
    limit("dynamic shared memory in bytes", shared_bytes, 0, options.max_shared_bytes);
    for (int64_t block : options.only_blocks) limit("a block to run", block, 0, blocks - 1);
  }

  void run_blocks() {
    const bool chosen = !options.only_blocks.empty();
    const int64_t count = chosen ? static_cast<int64_t>(options.only_blocks.size()) : blocks_;
    std::vector<unsigned> shuffled;  // only random turns need a list
    if (options.turns == Turns::random) {
      for (int64_t i = 0; i < count; ++i) shuffled.push_back(static_cast<unsigned>(i));
      std::shuffle(shuffled.begin(), shuffled.end(), generator_);
    }
    for (int64_t i = 0; i < count && !error_; ++i) {
      const int64_t turn = options.turns == Turns::ascending    ? i
                           : options.turns == Turns::descending ? count - 1 - i
                                                                : shuffled[i];
      block_ = static_cast<unsigned>(chosen ? options.only_blocks[turn] : turn);
      run_block();
    }
  }

  void run_block() {
    prepare_block();
    std::vector<unsigned> warps((thread_count_ + kWarpLanes - 1) / kWarpLanes), lanes(kWarpLanes);
    for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
    for (unsigned i = 0; i < kWarpLanes; ++i) lanes[i] = i;
    if (options.turns == Turns::descending) {
      std::reverse(warps.begin(), warps.end());
      std::reverse(lanes.begin(), lanes.end());
    }
    for (bool moved = true; moved && !error_;) {
      moved = false;
      if (options.turns == Turns::random) std::shuffle(warps.begin(), warps.end(), generator_);
      for (unsigned warp : warps) {
        if (options.turns == Turns::random) std::shuffle(lanes.begin(), lanes.end(), generator_);
        while (run_warp(warp, lanes)) {
          moved = true;
          if (options.turns == Turns::random && generator_() % 2) break;
        }
      }
      moved = moved || resume_deferred();
    }
    if (!error_ && alive_)
      error_ = std::make_exception_ptr(Error(text("block ", block_, " cannot go on:", who_waits(thread_list_))));
    if (!error_ && extension_) {
      const std::string unfinished = extension_->unfinished();
      if (!unfinished.empty()) error_ = std::make_exception_ptr(Error(text("block ", block_, " ", unfinished)));
    }
    stop_the_rest();
    extension_ = nullptr;
    shared_.release();
  }

  // Gives each ready lane a turn. Returns whether there was one.
  bool run_warp(unsigned warp, const std::vector<unsigned>& lanes) {
    bool moved = false;
    for (unsigned lane : lanes) {
      const unsigned index = warp * kWarpLanes + lane;
      if (error_ || index >= thread_count_ || thread_list_[index].state != State::ready) continue;
      moved = true;
      run(thread_list_[index]);
    }
    return moved;
  }

  bool resume_deferred() {
    bool moved = false;
    for (Thread& thread : thread_list_) {
      if (thread.state != State::deferred) continue;
      thread.state = State::ready;
      moved = true;
    }
    return moved;
  }

  void run(Thread& thread) {
    current_ = &thread;
    thread.started = true;
    thread.fiber->enter(home_);
  }

  void prepare_block() {
    while (fibers_.size() < thread_count_) fibers_.push_back(std::make_unique<Fiber>());
    alive_ = thread_count_;
    thread_list_.assign(thread_count_, Thread{});
    for (unsigned t = 0; t < thread_count_; ++t) {
      thread_list_[t].index = t;
      thread_list_[t].fiber = fibers_[t].get();
      fibers_[t]->prepare(&Machine::entry);
    }
    gatherings_.assign((thread_count_ + kWarpLanes - 1) / kWarpLanes, {});
    for (Barrier& barrier : barriers_) barrier = Barrier{};
    renew_static_shared();
  }

  // Where every fiber begins.
  static void entry();

  void run_thread() {
    try {
      kernel_();
      finish();
    } catch (const Stop&) {
    } catch (...) {
      const Unseen unseen;
      if (!error_) error_ = std::current_exception();
    }
    launch_order_.release();
    const Unseen unseen;
    current_->state = State::done;
  }

  void finish() {
    const Unseen unseen;
    if (!current_->copies.empty()) fail("the thread returned before a cp.async had landed: wait for every group");
    --alive_;
    Barrier& barrier = barriers_[0];
    if (alive_ && barrier.threads == 0 && barrier.arrived == alive_) open(barrier);
  }

  void open(Barrier& barrier) {
    if (barrier.threads == 0 && alive_ < thread_count_ && !options.allow_early_exit)
      fail(text("__syncthreads at ", barrier.site, " after ", thread_count_ - alive_,
                " threads of the block have returned: they passed fewer barriers"));
    barrier.arrived = 0;
    wake(&barrier);
  }

  Gathering* find(unsigned mask) {
    for (Gathering& gathering : gatherings_[current_->index / kWarpLanes])
      if (gathering.mask == mask) return &gathering;
    return nullptr;
  }

  // The gathering that the current lane has come to.
  Gathering* join(const char* name, unsigned mask, void (*together)(), const Site& site, bool orders) {
    const unsigned lane = current_->index % kWarpLanes, warp = current_->index / kWarpLanes;
    const unsigned lanes_left = thread_count_ - warp * kWarpLanes;
    const unsigned existing = lanes_left < kWarpLanes ? (1u << lanes_left) - 1 : kEveryLane;
    if (!(mask >> lane & 1)) fail(text(name, " of lanes ", lanes_of(mask), " by lane ", lane), site);
    if (mask & ~existing) fail(text(name, " of lanes ", lanes_of(mask), ": the warp has only ", lanes_left), site);
    Gathering* gathering = find(mask);
    if (!gathering) {
      gatherings_[warp].push_back({name, mask, 0, site, together, {}, orders ? new_order() : nullptr});
      return &gatherings_[warp].back();
    }
    if (gathering->together != together || std::strcmp(gathering->name, name) || !(gathering->site == site))
      fail(text(name, " by lane ", lane, ", while lanes ", lanes_of(gathering->arrived), " are in ", gathering->name,
                " at ", gathering->site),
           site);
    return gathering;
  }

  void stop_the_rest() {
    stopping_ = true;
    for (Thread& thread : thread_list_)
      if (thread.started && thread.state != State::done) run(thread);
    stopping_ = false;
    for (unsigned t = 0; t < thread_count_; ++t) traces_.keep(fibers_[t]->trace());
  }

  std::unique_ptr<BlockExtension> extension_;
  std::mutex one_at_a_time_;
  std::function<void()> kernel_;
  unsigned block_ = 0, blocks_ = 0, thread_count_ = 0, alive_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Thread> thread_list_;
  Thread* current_ = nullptr;
  Home home_;
  std::vector<std::list<Gathering>> gatherings_;  // of each warp
  Barrier barriers_[kBarriers];
  Order launch_order_, no_order_;
  std::mt19937_64 generator_;
  std::exception_ptr error_;
  bool stopping_ = false;
  int64_t shared_bytes_ = 0;
  DynamicShared shared_;
  Traces traces_;
};

inline Machine the_machine;
EMULATOR_UNSEEN Machine& machine() { return the_machine; }

EMULATOR_UNSEEN void Machine::entry() {
  Machine& self = machine();
  Fiber::arrive(self.home_);
  self.run_thread();
  self.current().fiber->leave(self.home_, true);
}

}  // namespace emulator
