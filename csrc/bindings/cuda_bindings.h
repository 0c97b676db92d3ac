// Bindings of the CUDA kernels. `device` is where their tensors must be: the tests run
// the same kernels on the CPU, in an emulator.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "bindings/tensor_view.h"
#include "core/error.h"
#include "cuda/target.h"

namespace eapo {

void bind_cuda_cache(pybind11::module_& m, Device device);
void bind_cuda_attention(pybind11::module_& m, Device device);
void bind_cuda_sample(pybind11::module_& m, Device device);
void bind_cuda_rows(pybind11::module_& m, Device device);

// Torch's current stream of the tensor's device; nothing is waited for.
inline cuda::Target target_of(const TensorView& tensor) {
  return {tensor.device_index(), tensor.current_stream()};
}

inline void check_launch(const char* what, const char* problem) {
  if (problem != nullptr) throw std::runtime_error(join(what, " on CUDA: ", problem));
}

inline cuda::Storage storage_of(const TensorView& tensor) {
  if (tensor.is_float32()) return cuda::Storage::kFloat32;
  if (tensor.is_bfloat16()) return cuda::Storage::kBFloat16;
  if (tensor.has_dtype(kDLFloat, 16)) return cuda::Storage::kFloat16;
  throw pybind11::type_error(
      join(tensor.name(), ": want float32, bfloat16 or float16, got ", tensor.dtype_name()));
}

// The tensor's values, contiguous and of the given shape.
template <typename T>
T* values_of(const TensorView& tensor, std::initializer_list<int64_t> shape) {
  tensor.expect<T>().expect_shape(shape).expect_contiguous();
  return tensor.as<T>();
}

// The same, or null for None.
template <typename T>
T* values_or_null(pybind11::handle object, const char* name, Device device, int64_t size) {
  return object.is_none() ? nullptr : values_of<T>({object, name, device}, {size});
}

}  // namespace eapo
