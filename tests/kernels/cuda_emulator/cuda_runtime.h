// Runs CUDA kernels on the CPU, for tests: the part of the CUDA runtime that eapo_fast uses.
#pragma once

#include "emulator.h"

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
