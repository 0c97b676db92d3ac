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

// How a kernel is launched.
struct Shape {
  dim3 grid;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;    // blocks of a cluster; grid.x is a multiple of it
};

// The shape as CUDA wants it. It points into itself.
class LaunchConfig {
 public:
  LaunchConfig(const Shape& shape, const Target& target) {
    config_.gridDim = shape.grid;
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = shape.shared;
    config_.stream = static_cast<cudaStream_t>(target.stream);
    if (shape.cluster == 1) return;  // older devices have no clusters
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config_.attrs = &cluster_;
    config_.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute cluster_ = {};
};

// Queues kernel(args...) and returns null, or what CUDA says went wrong.
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), const Shape& shape, const Target& target,
                   Args&&... args) {
  const DeviceScope scope(target.device);
  if (scope.status() != cudaSuccess) return cudaGetErrorString(scope.status());
  const LaunchConfig config(shape, target);
  const cudaError_t status = cudaLaunchKernelEx(config.get(), kernel, std::forward<Args>(args)...);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, const Target& target,
                   Args&&... args) {
  return launch(kernel, Shape{grid, threads}, target, std::forward<Args>(args)...);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace eapo::cuda
