// Borrowed views of torch tensors through the DLPack exchange API. No libtorch is linked, nothing
// is copied, and no reference is taken: a view is valid only within the call that received it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "dlpack/dlpack.h"

namespace eapo {

enum class Device { kCpu, kCuda };

class TensorView {
 public:
  // Throws TypeError when `object` is no tensor on `device`; `name` is the argument's name.
  TensorView(pybind11::handle object, const char* name, Device device = Device::kCpu);

  const char* name() const { return name_; }
  int ndim() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  int64_t stride(int dim) const { return tensor_.strides[dim]; }
  int64_t numel() const;
  bool is_contiguous() const;
  bool is_bfloat16() const { return has_dtype(kDLBfloat, 16); }
  bool is_float32() const { return has_dtype(kDLFloat, 32); }
  bool has_dtype(int code, int bits) const {
    return tensor_.dtype.code == code && tensor_.dtype.bits == bits && tensor_.dtype.lanes == 1;
  }
  int64_t element_bytes() const { return tensor_.dtype.bits * tensor_.dtype.lanes / 8; }
  std::string dtype_name() const;
  std::string shape_text() const;
  std::string device_text() const;
  int64_t item_bytes() const { return (int64_t{tensor_.dtype.bits} * tensor_.dtype.lanes + 7) / 8; }
  int device_index() const { return tensor_.device.device_id; }
  // The stream torch would launch on now (null on the CPU).
  void* current_stream() const;

  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }

  // Each throws ValueError (TypeError for the dtype) that names the argument, and returns *this.
  const TensorView& expect_shape(std::initializer_list<int64_t> shape) const;  // -1: any size
  const TensorView& expect_float32_or_bfloat16() const;
  const TensorView& expect_same_dtype(const TensorView& other) const;
  const TensorView& expect_contiguous() const;
  // Every dimension but the first is packed; the rows may lie apart (a slice of a wider tensor).
  const TensorView& expect_packed_rows() const;
  // The last dimension is packed; the others may be strided.
  const TensorView& expect_packed_columns() const;
  template <typename T>
  const TensorView& expect() const;

 private:
  [[noreturn]] void fail(const std::string& wanted) const;
  const TensorView& expect_dtype(int code, int bits) const;

  DLTensor tensor_{};
  const DLPackExchangeAPI* api_ = nullptr;
  const char* name_;
};

template <>
inline const TensorView& TensorView::expect<bool>() const {
  return expect_dtype(kDLBool, 8);
}
template <>
inline const TensorView& TensorView::expect<float>() const {
  return expect_dtype(kDLFloat, 32);
}
template <>
inline const TensorView& TensorView::expect<double>() const {
  return expect_dtype(kDLFloat, 64);
}
template <>
inline const TensorView& TensorView::expect<int32_t>() const {
  return expect_dtype(kDLInt, 32);
}
template <>
inline const TensorView& TensorView::expect<int64_t>() const {
  return expect_dtype(kDLInt, 64);
}

}  // namespace eapo
