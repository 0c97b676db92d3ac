// Runs CUDA kernels on the CPU, for tests: the part of the CUDA runtime that eapo_fast uses.
//
// The threads of a block are coroutines on one OS thread, blocks run one after another. A thread
// runs until it waits for its warp or its block, so results cannot depend on luck; the order in
// which threads get their turn is reversed by EAPO_EMULATOR_ORDER=descending, which shows a barrier
// that is missing. A barrier that not all threads reach is an error. Shared memory is static.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
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

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

// A coroutine that runs one thread of block after block.
struct Fiber {
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  uint64_t slot = 0;  // what the thread shows to its warp
  struct Barrier* barrier = nullptr;
  long round = 0;
  bool done = false;
};

struct Barrier {
  int size = 0, arrived = 0;
  long round = 0;
};

class Block {
 public:
  Block(int threads, const std::function<void()>& body)
      : body_(body), threads_(threads), barriers_(1 + threads / kWarp) {
    barriers_[0].size = threads;
    for (size_t warp = 1; warp < barriers_.size(); ++warp) barriers_[warp].size = kWarp;
    while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < threads; ++i) {
      fibers[i]->barrier = nullptr;
      fibers[i]->done = false;
    }
  }

  void run() {
    current = this;
    const char* order = std::getenv("EAPO_EMULATOR_ORDER");
    const bool descending = order != nullptr && std::strcmp(order, "descending") == 0;
    for (live_ = threads_; live_ > 0;) {
      bool progress = false;
      for (int i = 0; i < threads_; ++i) {
        index_ = descending ? threads_ - 1 - i : i;
        const Fiber& fiber = *fibers[index_];
        if (fiber.done || (fiber.barrier != nullptr && fiber.barrier->round == fiber.round))
          continue;
        progress = true;
        resume();
      }
      if (!progress) throw std::runtime_error("emulator: threads wait for a barrier in vain");
    }
    if (error_) std::rethrow_exception(error_);
  }

  // Waits until all threads of the warp, or of the block, have come this far.
  void wait(bool whole_block) {
    Fiber& fiber = *fibers[index_];
    fiber.barrier = &barriers_[whole_block ? 0 : 1 + index_ / kWarp];
    fiber.round = fiber.barrier->round;
    if (++fiber.barrier->arrived == fiber.barrier->size) {
      fiber.barrier->arrived = 0;
      ++fiber.barrier->round;
    }
    if (_setjmp(fiber.state) == 0) _longjmp(scheduler, 1);
    fiber.barrier = nullptr;
  }

  // A value of each lane, readable by its warp between the barriers of `exchange`.
  template <typename T, typename Read>
  T exchange(T value, Read read) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&fibers[index_]->slot, &value, sizeof(T));
    wait(false);
    const int base = index_ / kWarp * kWarp;
    const T result = read([&](int lane) {
      T other;
      std::memcpy(&other, &fibers.at(base + lane)->slot, sizeof(T));
      return other;
    });
    wait(false);
    return result;
  }

  int lane() const { return index_ % kWarp; }

  static inline Block* current = nullptr;

 private:
  // Switches by jumps; only a fiber's first start needs a context of its own.
  void resume() {
    Fiber& fiber = *fibers[index_];
    threadIdx.x = static_cast<unsigned>(index_);
    if (_setjmp(scheduler) != 0) return;
    if (fiber.stack != nullptr) _longjmp(fiber.state, 1);
    fiber.stack = std::make_unique<char[]>(kStack);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, &Block::work, 0);
    setcontext(&context);
  }

  static void work() {
    for (;;) {
      Block& block = *current;
      Fiber& fiber = *fibers[block.index_];
      try {
        block.body_();
      } catch (...) {
        block.error_ = std::current_exception();
      }
      fiber.done = true;
      --block.live_;
      if (_setjmp(fiber.state) == 0) _longjmp(scheduler, 1);
    }
  }

  static inline std::vector<std::unique_ptr<Fiber>> fibers;
  static inline jmp_buf scheduler;

  const std::function<void()>& body_;
  int threads_;
  std::vector<Barrier> barriers_;  // of the block, then of its warps
  int index_ = 0, live_ = 0;
  std::exception_ptr error_;
};

}  // namespace emulator

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(args...); };
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        emulator::Block(static_cast<int>(blockDim.x), body).run();
  return cudaSuccess;
}

inline void __syncthreads() { emulator::Block::current->wait(true); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::Block::current->wait(false); }

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::Block::current->exchange(value, [&](auto of) { return of(source % 32); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = *emulator::Block::current;
  return block.exchange(value, [&](auto of) { return of(block.lane() ^ mask); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  auto& block = *emulator::Block::current;
  const int lane = block.lane() - static_cast<int>(delta);
  return block.exchange(value, [&](auto of) { return lane < 0 ? value : of(lane); });
}
inline int __any_sync(unsigned, int predicate) {
  return emulator::Block::current->exchange(predicate, [](auto of) {
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= of(lane) != 0;
    return any;
  });
}

inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address |= value;
  return before;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename A, typename B>
constexpr auto min(A a, B b) {
  return a < b ? a : b;
}
