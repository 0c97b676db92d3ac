#pragma once

#include "bindings/tensor_view.h"
#include "cpu/kernels.h"

namespace eapo {

// Of a tensor that is float32 or bfloat16.
inline cpu::Storage storage_of(const TensorView& tensor) {
  return tensor.is_bfloat16() ? cpu::Storage::kBFloat16 : cpu::Storage::kFloat32;
}

}  // namespace eapo
