// Runs CUDA kernels on the CPU, for tests: the part of the CUDA runtime that eapo_fast uses.
//
// The threads of a cluster are coroutines on one OS thread, clusters run one after another. A thread
// runs until it waits for its warp, its block or its cluster, and a block until all its threads
// wait, so results cannot depend on luck, and blocks are as far apart as they can be. The order in
// which threads and blocks get their turn is reversed by EAPO_EMULATOR_ORDER=descending, which shows
// a barrier that is missing. A barrier that not all threads reach is an error. An asynchronous copy
// happens when its thread waits for it, and no earlier. Static shared memory is one for all blocks,
// so that kernels with clusters must have theirs from the launch; that starts as NaN.
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

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// The device: two clusters run at once. EAPO_EMULATOR_ARCH=80 has no clusters.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const char* arch = std::getenv("EAPO_EMULATOR_ARCH");
  const bool old = arch != nullptr && std::strcmp(arch, "80") == 0;
  *value = name == cudaDevAttrMultiProcessorCount ? 2
           : name == cudaDevAttrClusterLaunch     ? !old
                                                  : (old ? 163 : 227) * 1024;
  return cudaSuccess;
}
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel, int, size_t) {
  *count = 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t*) {
  *count = 2;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  unsigned blocks = 1;
  if (config->numAttrs > 0) blocks = config->attrs[0].val.clusterDim.x;
  if (gridDim.x % blocks != 0) throw std::runtime_error("emulator: the grid has a broken cluster");
  const std::function<void()> body = [&] { kernel(args...); };
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; x += blocks)
        emulator::Cluster({x, y, z}, static_cast<int>(blocks), static_cast<int>(blockDim.x),
                          config->dynamicSmemBytes, body)
            .run();
  return cudaSuccess;
}

inline void __syncthreads() { emulator::Cluster::current->wait(emulator::Scope::kBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::Cluster::current->wait(emulator::Scope::kWarp);
}
inline void __cluster_barrier_arrive() {}  // the wait that follows does both
inline void __cluster_barrier_wait() {
  emulator::Cluster::current->wait(emulator::Scope::kCluster);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::Cluster::current->exchange(value, [&](auto of) { return of(source % 32); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& cluster = *emulator::Cluster::current;
  return cluster.exchange(value, [&](auto of) { return of(cluster.lane() ^ mask); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  auto& cluster = *emulator::Cluster::current;
  const int lane = cluster.lane() - static_cast<int>(delta);
  return cluster.exchange(value, [&](auto of) { return lane < 0 ? value : of(lane); });
}
inline int __any_sync(unsigned, int predicate) {
  return emulator::Cluster::current->exchange(predicate, [](auto of) {
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= of(lane) != 0;
    return any;
  });
}

// What csrc/cuda has as assembly.
inline void* emulated_dynamic_shared() { return emulator::Cluster::current->shared(); }
inline void emulated_copy_async(void* to, const void* from, size_t bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (bits % bytes != 0) throw std::runtime_error("emulator: a copy is not aligned");
  emulator::Cluster::current->own().open.push_back({to, from, bytes});
}
inline void emulated_commit_copies() {
  emulator::Fiber& own = emulator::Cluster::current->own();
  own.groups.push_back(std::exchange(own.open, {}));
}
inline void emulated_wait_for_copies(int left) {
  auto& groups = emulator::Cluster::current->own().groups;
  for (; static_cast<int>(groups.size()) > left; groups.pop_front())
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}
inline void emulated_mailbox_open(void* state) { emulator::mailbox_at(state) = {0, 1, 0}; }
inline void emulated_mailbox_expect(void* state, int bytes) {
  emulator::Mailbox& box = emulator::mailbox_at(state);
  if (box.missing != 1) throw std::runtime_error("emulator: a mailbox expects twice in a round");
  box.bytes += bytes;
  box.missing = 0;
  emulator::settle(box);
}
inline void emulated_mailbox_send(void* state, void* to, const void* message, int bytes, int rank) {
  auto& cluster = *emulator::Cluster::current;
  std::memcpy(cluster.there(to, rank), message, static_cast<size_t>(bytes));
  emulator::Mailbox& box = emulator::mailbox_at(cluster.there(state, rank));
  box.bytes -= bytes;
  emulator::settle(box);
}
inline void emulated_mailbox_wait(void* state, int parity) {
  const emulator::Mailbox& box = emulator::mailbox_at(state);
  emulator::Cluster::current->wait_until([&box, parity] { return (box.round & 1) != parity; });
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address |= value;
  return before;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <typename To, typename From>
To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }

template <typename A, typename B>
constexpr auto min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  return a > b ? a : b;
}
