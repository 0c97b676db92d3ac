// Launching a kernel on the device and stream of torch's tensors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "cuda/target.h"

namespace eapo::cuda {

// Makes `device` the current one until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  cudaError_t status_ = cudaSuccess;
};

// Queues kernel(args...) and returns null, or what CUDA says went wrong.
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, const Target& target,
                   Args&&... args) {
  const DeviceScope scope(target.device);
  if (scope.status() != cudaSuccess) return cudaGetErrorString(scope.status());
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(target.stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace eapo::cuda
