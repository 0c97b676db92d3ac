// Threads, blocks and clusters of a CUDA kernel on the CPU.
//
// The threads of a cluster are coroutines on one OS thread, clusters run one after another. A
// thread runs until it waits for its warp, its block or its cluster, and a block until all its
// threads wait, so results cannot depend on luck, and blocks are as far apart as they can be. The
// order in which threads and blocks get their turn is reversed by EAPO_EMULATOR_ORDER=descending,
// which shows a barrier that is missing. A barrier that not all threads reach is an error. An
// asynchronous copy happens when its thread waits for it, and no earlier. Static shared memory is
// one for all blocks, so that kernels with clusters must have theirs from the launch; that starts
// as NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// A coroutine that runs one thread of cluster after cluster.
struct Fiber {
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  uint64_t slot = 0;            // what the thread shows to its warp
  std::function<bool()> ready;  // what it waits for, if anything
  bool done = false;
  std::vector<Copy> open;               // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // and of groups, the oldest first
};

struct Barrier {
  int size = 0, arrived = 0;
  long round = 0;
};

// Bytes that are still to arrive in a round, of which 0 to 1 arrivals are missing.
struct Mailbox {
  int32_t bytes;
  int16_t missing, round;
};
static_assert(sizeof(Mailbox) == sizeof(uint64_t));

enum class Scope { kWarp, kBlock, kCluster };

class Cluster {
 public:
  // Its first block is `first`; each has `shared` bytes of its own.
  Cluster(dim3 first, int blocks, int threads, size_t shared, const std::function<void()>& body)
      : body_(body), first_(first), blocks_(blocks), threads_(threads), shared_(shared) {
    barriers_.resize(1 + blocks + blocks * warps());
    barriers_[0].size = blocks * threads;
    for (int i = 1; i < static_cast<int>(barriers_.size()); ++i)
      barriers_[i].size = i <= blocks ? threads : kWarp;
    memory_.assign((blocks * shared + sizeof(uint4)) / sizeof(uint4), {~0u, ~0u, ~0u, ~0u});
    while (static_cast<int>(fibers.size()) < blocks * threads)
      fibers.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < blocks * threads; ++i) {
      fibers[i]->ready = nullptr;
      fibers[i]->done = false;
      fibers[i]->open.clear();
      fibers[i]->groups.clear();
    }
  }

  void run() {
    current = this;
    const char* order = std::getenv("EAPO_EMULATOR_ORDER");
    const bool descending = order != nullptr && std::strcmp(order, "descending") == 0;
    for (live_ = blocks_ * threads_; live_ > 0;) {
      bool progress = false;
      for (int i = 0; i < blocks_; ++i)
        while (advance(descending ? blocks_ - 1 - i : i, descending)) progress = true;
      if (!progress) give_up();
    }
    if (error_) std::rethrow_exception(error_);
  }

  // Waits until all threads of the scope have come this far.
  void wait(Scope scope) {
    const int block = index_ / threads_, warp = index_ % threads_ / kWarp;
    Barrier& barrier = barriers_[scope == Scope::kCluster ? 0
                                 : scope == Scope::kBlock ? 1 + block
                                                          : 1 + blocks_ + block * warps() + warp];
    const long round = barrier.round;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.round;
    }
    wait_until([&barrier, round] { return barrier.round != round; });
  }

  void wait_until(std::function<bool()> ready) {
    own().ready = std::move(ready);
    if (_setjmp(own().state) == 0) _longjmp(scheduler, 1);
    own().ready = nullptr;
  }

  // A value of each lane, readable by its warp between the barriers of `exchange`.
  template <typename T, typename Read>
  T exchange(T value, Read read) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&own().slot, &value, sizeof(T));
    wait(Scope::kWarp);
    const int base = index_ / kWarp * kWarp;
    const T result = read([&](int lane) {
      T other;
      std::memcpy(&other, &fibers.at(base + lane)->slot, sizeof(T));
      return other;
    });
    wait(Scope::kWarp);
    return result;
  }

  int lane() const { return index_ % kWarp; }
  Fiber& own() { return *fibers[index_]; }
  char* shared() { return shared_of(index_ / threads_); }

  // What lies at `pointer` in this block's shared memory, in block `rank`.
  void* there(const void* pointer, int rank) {
    const auto offset = static_cast<const char*>(pointer) - shared();
    if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(shared_) || rank < 0 || rank >= blocks_)
      throw std::runtime_error("emulator: no such place in the cluster's shared memory");
    return shared_of(rank) + offset;
  }

  static inline Cluster* current = nullptr;

 private:
  int warps() const { return threads_ / kWarp; }
  char* shared_of(int block) { return reinterpret_cast<char*>(memory_.data()) + block * shared_; }

  // Gives each thread of a block a turn that can use it; returns whether there was one.
  bool advance(int block, bool descending) {
    bool progress = false;
    for (int i = 0; i < threads_; ++i) {
      index_ = block * threads_ + (descending ? threads_ - 1 - i : i);
      const Fiber& fiber = own();
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      progress = true;
      resume();
    }
    return progress;
  }

  [[noreturn]] void give_up() {
    for (int i = 0; i < blocks_ * threads_; ++i)
      if (!fibers[i]->done) fibers[i]->stack.reset();  // it starts afresh next time
    if (error_) std::rethrow_exception(error_);
    throw std::runtime_error("emulator: threads wait for a barrier or a message in vain");
  }

  // Switches by jumps; only a fiber's first start needs a context of its own.
  void resume() {
    Fiber& fiber = *fibers[index_];
    threadIdx.x = static_cast<unsigned>(index_ % threads_);
    blockIdx = first_;
    blockIdx.x += static_cast<unsigned>(index_ / threads_);
    if (_setjmp(scheduler) != 0) return;
    if (fiber.stack != nullptr) _longjmp(fiber.state, 1);
    fiber.stack.reset(new char[kStack]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, &Cluster::work, 0);
    setcontext(&context);
  }

  static void work() {
    for (;;) {
      try {
        current->body_();
      } catch (...) {
        current->error_ = std::current_exception();
      }
      current->own().done = true;
      --current->live_;
      if (_setjmp(current->own().state) == 0) _longjmp(scheduler, 1);
    }
  }

  static inline std::vector<std::unique_ptr<Fiber>> fibers;
  static inline jmp_buf scheduler;

  const std::function<void()>& body_;
  dim3 first_;
  int blocks_, threads_;
  size_t shared_;
  std::vector<Barrier> barriers_;  // of the cluster, its blocks, their warps
  std::vector<uint4> memory_;
  int index_ = 0, live_ = 0;
  std::exception_ptr error_;
};

inline Mailbox& mailbox_at(void* state) { return *static_cast<Mailbox*>(state); }

inline void settle(Mailbox& box) {
  if (box.missing != 0 || box.bytes != 0) return;
  box.missing = 1;
  ++box.round;
}

}  // namespace emulator
