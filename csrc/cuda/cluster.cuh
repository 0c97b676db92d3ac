// Messages between the blocks of a cluster (sm_90): 16 bytes that a block leaves in the shared
// memory of another, which waits until all have arrived. No fence of the whole device is needed, as
// a barrier of the cluster has one. On older devices a cluster is one block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define EAPO_CLUSTERS 0
#else
#define EAPO_CLUSTERS 1
#endif

namespace eapo::cuda {

#ifdef __CUDACC__
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// In shared memory: counts the bytes that arrive for one round after another.
struct Mailbox {
  uint64_t state;

  // By one thread, before all threads call `cluster_sync`.
  __device__ void open() {
#if !defined(__CUDACC__)
    emulated_mailbox_open(&state);
#elif EAPO_CLUSTERS
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(&state))
        : "memory");
#endif
  }

  // By one thread in every round.
  __device__ void expect(int bytes) {
#if !defined(__CUDACC__)
    emulated_mailbox_expect(&state, bytes);
#elif EAPO_CLUSTERS
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(&state)),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // Leaves the message at `to` in block `rank` of the cluster and counts it in that block's box.
  __device__ void send(float4* to, const float4& message, int rank) {
#if !defined(__CUDACC__)
    emulated_mailbox_send(&state, to, &message, sizeof message, rank);
#elif EAPO_CLUSTERS
    unsigned there, box;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(box)
        : "r"(shared_address(&state)), "r"(rank));
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(there),
        "f"(message.x), "f"(message.y), "f"(message.z), "f"(message.w), "r"(box)
        : "memory");
#else
    *to = message;
#endif
  }

  // By all threads: waits for the messages of a round; rounds count from 0.
  __device__ void wait(int round) {
#if !defined(__CUDACC__)
    emulated_mailbox_wait(&state, round & 1);
#elif EAPO_CLUSTERS
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [%0], %1;\n"
        "@!there bra again;\n"
        "}" ::"r"(shared_address(&state)),
        "r"(round & 1)
        : "memory");
#else
    __syncthreads();
#endif
  }
};

// Waits until all threads of the cluster have come this far; what they wrote is visible then.
__device__ inline void cluster_sync() {
#if EAPO_CLUSTERS
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}

}  // namespace eapo::cuda
