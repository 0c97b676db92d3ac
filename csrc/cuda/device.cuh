// What the kernels share on the device: storage types, reductions over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/target.h"

namespace eapo::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}

__device__ inline float minus_infinity() { return -INFINITY; }

// 2^x by the special function unit, to 2 units in the last place; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

// Shared memory of the block, as much as the launch asked for.
__device__ inline void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 eapo_shared_memory[];
  return eapo_shared_memory;
#else
  return emulated_dynamic_shared();
#endif
}

// Every lane gets the largest value, or the sum; the order of additions is fixed.
__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}
template <typename T>
__device__ inline T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// fn(T{}) with the storage's type.
template <typename Fn>
auto with_type(Storage storage, Fn&& fn) {
  switch (storage) {
    case Storage::kBFloat16:
      return fn(__nv_bfloat16{});
    case Storage::kFloat16:
      return fn(__half{});
    default:
      return fn(float{});
  }
}

}  // namespace eapo::cuda
