// Copies from global to shared memory that no register sees (cp.async). A thread waits for its own
// copies in groups; others see them behind a barrier.
#pragma once

#include <cuda_runtime.h>

namespace eapo::cuda {

// 16 bytes, both addresses multiples of 16.
__device__ inline void copy_async(void* shared, const void* global) {
#ifdef __CUDACC__
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  emulated_copy_async(shared, global, 16);
#endif
}

// Ends a group.
__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulated_commit_copies();
#endif
}

// Waits until at most the `kLeft` youngest groups are on their way.
template <int kLeft>
__device__ inline void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emulated_wait_for_copies(kLeft);
#endif
}

}  // namespace eapo::cuda
