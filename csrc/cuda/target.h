#pragma once

namespace eapo::cuda {

// Where a kernel is queued: the device that holds its pointers, and a cudaStream_t of it.
struct Target {
  int device;
  void* stream;
};

enum class Storage { kFloat32, kBFloat16, kFloat16 };

}  // namespace eapo::cuda
