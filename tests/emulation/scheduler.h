// Runs a grid of CUDA threads on one processor core: block after block, the threads of a block as fibres.
//
// A fibre runs one CUDA thread after another and is switched only when a thread waits, so kernels without barriers cost
// a function call per thread. Which thread runs next, and the order of blocks, are drawn at random under
// EVKERNELS_EMULATION_SEED (default 0): a missing barrier gives a wrong result under some seed. Atomics hand over to
// another thread now and then, so that check-then-act and compare-and-swap without a retry show as well.
//
// A barrier is complete when all live (not returned) threads wait at it; a warp operation when all live lanes of its
// mask do. When nothing can run and somebody waits, that is reported as an error with the places of all waiting
// threads. Not modelled: memory ordering, races of plain loads and stores between barriers, blocks that wait for other
// blocks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fibres.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline constinit uint3 threadIdx{}, blockIdx{};
inline constinit dim3 blockDim{}, gridDim{};

namespace cuda_emulation {

constexpr int kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
constexpr std::size_t kMaxSharedBytes = 227 * 1024;

using Site = std::source_location;

// The one warp operation in which lanes that have returned may not be missing.
inline constexpr const char* kProduct = "mma.sync";

template <class Index>
std::string to_string(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

enum class Wait : std::uint8_t { kNone, kBlock, kWarp };

struct Thread {
  uint3 index{};
  Fibre* fibre = nullptr;  // null until started
  Wait wait = Wait::kNone;
  const char* operation = nullptr;
  Site site{};
  std::uint32_t mask = 0;    // lanes named by the warp operation
  int source_lane = 0;       // lane whose value a shuffle reads
  std::uint64_t value = 0;   // what this thread contributes: shuffled bits or a predicate
  std::uint64_t result = 0;  // what it receives: shuffled bits, ballot or number of true predicates
};

struct Warp {
  std::uint32_t live = 0;
  std::uint32_t waiting = 0;
};

class Scheduler {
 public:
  static Scheduler& instance() {
    static Scheduler scheduler;
    return scheduler;
  }

  void launch(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, std::size_t shared_limit,
              void (*invoke)(const void*), const void* arguments) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernel_ = kernel;
    check_launch(grid, block, shared_bytes, shared_limit);
    if (owner_ != std::this_thread::get_id()) discard_fibres();
    owner_ = std::this_thread::get_id();
    invoke_ = invoke;
    arguments_ = arguments;
    prepare_grid(grid, block, shared_bytes);
    failure_ = nullptr;
    resume(main_, pick());
    std::free(std::exchange(shared_, nullptr));
    if (failure_) {
      discard_fibres();
      std::rethrow_exception(std::exchange(failure_, nullptr));
    }
  }

  // Waits for the whole block; returns how many threads came with a true predicate and how many came.
  std::pair<int, int> block_barrier(const char* operation, bool predicate, const Site& site) {
    Thread& thread = *current_;
    thread.value = predicate;
    wait(thread, Wait::kBlock, operation, site);
    ++waiting_at_barrier_;
    release_barrier_if_complete();
    hand_over();
    return {static_cast<int>(thread.result & 0xFFFF), static_cast<int>(thread.result >> 16)};
  }

  // Exchanges values between the lanes of `mask`: every lane contributes `value`, reads that of `source_lane`, or
  // (source_lane < 0) receives the lanes whose value is not zero.
  std::uint64_t warp_operation(const char* operation, std::uint32_t mask, std::uint64_t value, int source_lane,
                               const Site& site) {
    Thread& thread = *current_;
    if (!(mask >> lane(thread) & 1)) fail(std::string(operation) + ": the calling lane is not in its own mask");
    thread.mask = mask;
    thread.value = value;
    thread.source_lane = source_lane;
    wait(thread, Wait::kWarp, operation, site);
    Warp& warp = warp_of(thread);
    warp.waiting |= 1u << lane(thread);
    complete_warp_operation(thread);
    hand_over();
    return thread.result;
  }

  // Lets another thread run first, with probability 1/8.
  void maybe_yield() {
    if (!current_ || random() % 8 != 0) return;
    runnable_.push_back(current_);
    hand_over();
  }

  void* shared() const { return shared_; }

  int current_lane() const { return lane(*current_); }
  int current_warp() const { return static_cast<int>(linear_index(*current_)) / kWarpSize; }

  [[noreturn]] void fail(const std::string& message) const {
    std::string where = std::string("kernel ") + kernel_;  // as spelled at the launch, in parentheses
    if (current_) where += ", block " + to_string(blockIdx) + ", thread " + to_string(current_->index);
    throw std::runtime_error(where + ": " + message);
  }

 private:
  void check_launch(dim3 grid, dim3 block, std::size_t shared_bytes, std::size_t shared_limit) const {
    const auto inside = [](std::uint64_t value, std::uint64_t limit) { return value >= 1 && value <= limit; };
    if (!inside(grid.x, 0x7FFFFFFF) || !inside(grid.y, 65535) || !inside(grid.z, 65535))
      fail("grid must be within (1..2147483647, 1..65535, 1..65535), got " + to_string(grid));
    if (!inside(block.x, 1024) || !inside(block.y, 1024) || !inside(block.z, 64) ||
        !inside(std::uint64_t{block.x} * block.y * block.z, kMaxThreads))
      fail("block must be within (1..1024, 1..1024, 1..64) and hold at most 1024 threads, got " + to_string(block));
    if (shared_bytes > shared_limit)
      fail("dynamic shared memory must be at most " + std::to_string(shared_limit) + " bytes (raise it, up to " +
           std::to_string(kMaxSharedBytes) + ", with cudaFuncSetAttribute), got " + std::to_string(shared_bytes));
  }

  void prepare_grid(dim3 grid, dim3 block, std::size_t shared_bytes) {
    gridDim = grid;
    blockDim = block;
    const char* const seed = std::getenv("EVKERNELS_EMULATION_SEED");
    random_state_ = seed ? std::strtoull(seed, nullptr, 0) : 0;
    threads_.assign(std::size_t{block.x} * block.y * block.z, Thread{});
    for (std::size_t i = 0; i < threads_.size(); ++i)
      threads_[i].index = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                           static_cast<unsigned>(i / block.x / block.y)};
    runnable_.clear();
    current_ = nullptr;
    live_ = waiting_at_barrier_ = 0;
    shared_bytes_ = shared_bytes;
    // Exactly as long as asked for, so that the address sanitizer sees the first byte beyond it.
    if (shared_bytes && posix_memalign(&shared_, 16, shared_bytes) != 0) throw std::bad_alloc();
    // Blocks run in the order position, position + stride, ... modulo their number: a permutation without a table.
    blocks_ = std::uint64_t{grid.x} * grid.y * grid.z;
    blocks_left_ = blocks_;
    block_position_ = random() % blocks_;
    do block_stride_ = 1 + random() % blocks_;
    while (std::gcd(block_stride_, blocks_) != 1);
  }

  void start_block() {
    --blocks_left_;
    block_position_ = (block_position_ + block_stride_) % blocks_;
    blockIdx = {static_cast<unsigned>(block_position_ % gridDim.x),
                static_cast<unsigned>(block_position_ / gridDim.x % gridDim.y),
                static_cast<unsigned>(block_position_ / gridDim.x / gridDim.y)};
    if (shared_bytes_) std::memset(shared_, 0xFF, shared_bytes_);
    warps_.fill(Warp{});
    for (Thread& thread : threads_) {
      thread.fibre = nullptr;
      warp_of(thread).live |= 1u << lane(thread);
      runnable_.push_back(&thread);
    }
    live_ = static_cast<int>(threads_.size());
  }

  std::uint64_t random() {  // splitmix64
    std::uint64_t bits = random_state_ += 0x9E3779B97F4A7C15u;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
    return bits ^ bits >> 31;
  }

  std::size_t linear_index(const Thread& thread) const { return static_cast<std::size_t>(&thread - threads_.data()); }
  int lane(const Thread& thread) const { return static_cast<int>(linear_index(thread) % kWarpSize); }
  Warp& warp_of(const Thread& thread) { return warps_[linear_index(thread) / kWarpSize]; }

  // The next thread to run, of the next block when this one is through; null at the end of the grid.
  Thread* pick() {
    if (runnable_.empty()) {
      if (live_ > 0) fail_waiting();
      if (blocks_left_ == 0) return nullptr;
      start_block();
    }
    std::swap(runnable_[random() % runnable_.size()], runnable_.back());
    Thread* const thread = runnable_.back();
    runnable_.pop_back();
    return thread;
  }

  // Leaves fibre `from` for the one that runs `thread`, or for the caller of launch() when there is none.
  void resume(Fibre& from, Thread* thread) {
    current_ = thread;
    if (!thread) return from.switch_to(main_);
    threadIdx = thread->index;
    if (thread->fibre) return from.switch_to(*thread->fibre);
    if (idle_.empty()) {
      fibres_.push_back(std::make_unique<Fibre>(&Scheduler::fibre_main));
      idle_.push_back(fibres_.back().get());
    }
    running_ = idle_.back();
    idle_.pop_back();
    from.switch_to(*running_);
  }

  // Called by a thread that waits or yields: returns when it is picked again.
  void hand_over() {
    Thread* const self = current_;
    Thread* const next = pick();
    if (next != self) resume(*self->fibre, next);
  }

  static void fibre_main() {
    Scheduler& scheduler = instance();
    scheduler.running_->arrive();
    scheduler.run_threads(*scheduler.running_);
  }

  [[noreturn]] void run_threads(Fibre& self) {
    for (;;) {
      Thread* thread = current_;
      try {
        while (thread && !thread->fibre) {
          thread->fibre = &self;
          current_ = thread;
          threadIdx = thread->index;
          invoke_(arguments_);
          finish(*thread);
          thread = pick();
        }
      } catch (...) {
        failure_ = std::current_exception();
        thread = nullptr;
      }
      idle_.push_back(&self);
      resume(self, thread);
    }
  }

  void finish(Thread& thread) {
    --live_;
    Warp& warp = warp_of(thread);
    warp.live &= ~(1u << lane(thread));
    if (live_ > 0) release_barrier_if_complete();
    Thread* const first = &thread - lane(thread);
    for (int other = 0; warp.waiting >> other != 0 && other < kWarpSize; ++other)
      if (warp.waiting >> other & 1) complete_warp_operation(first[other]);
  }

  void wait(Thread& thread, Wait kind, const char* operation, const Site& site) {
    thread.wait = kind;
    thread.operation = operation;
    thread.site = site;
  }

  static bool same_place(const Thread& a, const Thread& b) {
    return a.site.line() == b.site.line() && std::strcmp(a.operation, b.operation) == 0 &&
           std::strcmp(a.site.file_name(), b.site.file_name()) == 0;
  }

  void release(Thread& thread, std::uint64_t result) {
    thread.result = result;
    thread.wait = Wait::kNone;
    runnable_.push_back(&thread);
  }

  void release_barrier_if_complete() {
    if (waiting_at_barrier_ != live_) return;
    const Thread* first = nullptr;
    std::uint64_t true_predicates = 0;
    for (const Thread& thread : threads_) {
      if (thread.wait != Wait::kBlock) continue;
      if (!first) first = &thread;
      if (!same_place(*first, thread)) fail_waiting();
      true_predicates += thread.value;
    }
    for (Thread& thread : threads_)
      if (thread.wait == Wait::kBlock) release(thread, true_predicates | static_cast<std::uint64_t>(live_) << 16);
    waiting_at_barrier_ = 0;
  }

  void complete_warp_operation(Thread& any_member) {
    Warp& warp = warp_of(any_member);
    if (any_member.operation == kProduct && warp.live != ~0u)
      fail(std::string(kProduct) + ": a lane of the warp has returned or does not exist");
    const std::uint32_t members = any_member.mask & warp.live;
    if ((warp.waiting & members) != members) return;
    Thread* const lanes = &any_member - lane(any_member);
    std::uint32_t ballot = 0;
    for (int i = 0; i < kWarpSize; ++i) {
      if (!(members >> i & 1)) continue;
      if (lanes[i].mask != any_member.mask || !same_place(lanes[i], any_member)) return;
      ballot |= static_cast<std::uint32_t>(lanes[i].value != 0) << i;
    }
    warp.waiting &= ~members;
    for (int i = 0; i < kWarpSize; ++i) {
      if (!(members >> i & 1)) continue;
      const int source = lanes[i].source_lane;
      // The value of a lane that does not take part is undefined: all bits set, a NaN for floats.
      release(lanes[i], source < 0 ? ballot : members >> source & 1 ? lanes[source].value : ~std::uint64_t{0});
    }
  }

  [[noreturn]] void fail_waiting() {
    std::map<std::string, int> places;
    for (Thread& thread : threads_) {
      if (thread.wait == Wait::kNone) continue;
      current_ = &thread;
      char mask[32] = "";
      if (thread.wait == Wait::kWarp) std::snprintf(mask, sizeof mask, "(0x%08x)", thread.mask);
      ++places[std::string(thread.operation) + mask + " " + thread.site.file_name() + ":" +
               std::to_string(thread.site.line())];
    }
    std::string message = "barrier or warp operation not reached by all live threads (" + std::to_string(live_) + "):";
    for (const auto& [place, count] : places) message += " " + std::to_string(count) + " wait at " + place + ";";
    message += " " + std::to_string(threads_.size() - live_) + " have returned";
    fail(message);
  }

  void discard_fibres() {
    idle_.clear();
    fibres_.clear();
  }

  std::mutex mutex_;
  std::thread::id owner_;
  Fibre main_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<Fibre*> idle_;
  Fibre* running_ = nullptr;

  const char* kernel_ = "";
  void (*invoke_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  std::exception_ptr failure_;

  std::uint64_t random_state_ = 0, blocks_ = 0, blocks_left_ = 0, block_position_ = 0, block_stride_ = 1;
  std::vector<Thread> threads_;
  std::vector<Thread*> runnable_;
  std::array<Warp, kMaxThreads / kWarpSize> warps_{};
  Thread* current_ = nullptr;
  int live_ = 0, waiting_at_barrier_ = 0;
  void* shared_ = nullptr;
  std::size_t shared_bytes_ = 0;
};

}  // namespace cuda_emulation
