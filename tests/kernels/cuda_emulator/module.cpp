// The CUDA kernels and their bindings, on CPU tensors.

#include "bindings/cuda_bindings.h"

PYBIND11_MODULE(_cuda_emulated, m) {
  eapo::bind_cuda_cache(m, eapo::Device::kCpu);
  eapo::bind_cuda_attention(m, eapo::Device::kCpu);
  eapo::bind_cuda_sample(m, eapo::Device::kCpu);
  eapo::bind_cuda_rows(m, eapo::Device::kCpu);
}
