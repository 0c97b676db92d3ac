#include "bindings/tensor_view.h"

#include <vector>

namespace py = pybind11;

namespace eapo {
namespace {

std::string dtype_text(int code, int bits) {
  const std::string width = std::to_string(bits);
  switch (code) {
    case kDLInt: return "int" + width;
    case kDLUInt: return "uint" + width;
    case kDLFloat: return "float" + width;
    case kDLBfloat: return "bfloat" + width;
    case kDLComplex: return "complex" + width;
    case kDLBool: return "bool";
    default: return "dtype code " + std::to_string(code) + " of " + width + " bits";
  }
}

std::string size_text(int64_t size) { return size < 0 ? "*" : std::to_string(size); }

template <typename Sizes>
std::string joined(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + size_text(size);
  return text + "]";
}

// The table of the type, or null when the type does not offer the exchange API.
const DLPackExchangeAPI* find_api(PyTypeObject* type) {
  py::object capsule =
      py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) throw py::error_already_set();
  auto* api = static_cast<const DLPackExchangeAPI*>(pointer);
  const bool usable = api->header.version.major == DLPACK_MAJOR_VERSION &&
                      api->dltensor_from_py_object_no_sync != nullptr;
  return usable ? api : nullptr;
}

// Remembers the last type seen; the GIL guards the two statics.
const DLPackExchangeAPI* api_of(py::handle object) {
  static PyTypeObject* last_type = nullptr;
  static const DLPackExchangeAPI* last_api = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != last_type) {
    const DLPackExchangeAPI* api = find_api(type);
    if (api == nullptr) return nullptr;
    Py_INCREF(type);
    Py_XDECREF(last_type);
    last_type = type;
    last_api = api;
  }
  return last_api;
}

bool is_cuda(const DLDevice& device) {
  return device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
}

}  // namespace

TensorView::TensorView(py::handle object, const char* name, Device device) : name_(name) {
  api_ = api_of(object);
  if (api_ == nullptr)
    throw py::type_error(std::string(name) + ": want a torch.Tensor, got " +
                         Py_TYPE(object.ptr())->tp_name);
  if (api_->dltensor_from_py_object_no_sync(object.ptr(), &tensor_) != 0)
    throw py::error_already_set();
  const bool matches = device == Device::kCuda ? is_cuda(tensor_.device)
                                               : tensor_.device.device_type == kDLCPU;
  if (!matches)
    throw py::type_error(std::string(name) + ": want a " +
                         (device == Device::kCuda ? "CUDA" : "CPU") + " tensor, got one on " +
                         device_text());
}

int64_t TensorView::numel() const {
  int64_t count = 1;
  for (int dim = 0; dim < ndim(); ++dim) count *= size(dim);
  return count;
}

bool TensorView::is_contiguous() const {
  int64_t packed = 1;
  for (int dim = ndim() - 1; dim >= 0; --dim) {
    if (size(dim) != 1 && stride(dim) != packed) return numel() == 0;
    packed *= size(dim);
  }
  return true;
}

std::string TensorView::dtype_name() const {
  return dtype_text(tensor_.dtype.code, tensor_.dtype.bits);
}

std::string TensorView::shape_text() const {
  return joined(std::vector<int64_t>(tensor_.shape, tensor_.shape + ndim()));
}

std::string TensorView::device_text() const {
  if (tensor_.device.device_type == kDLCPU) return "cpu";
  if (is_cuda(tensor_.device)) return "cuda:" + std::to_string(tensor_.device.device_id);
  return "DLPack device type " + std::to_string(tensor_.device.device_type);
}

void* TensorView::current_stream() const {
  void* stream = nullptr;
  if (api_->current_work_stream(tensor_.device.device_type, device_index(), &stream) != 0)
    throw py::error_already_set();
  return stream;
}

const TensorView& TensorView::expect_shape(std::initializer_list<int64_t> shape) const {
  bool matches = ndim() == static_cast<int>(shape.size());
  int dim = 0;
  for (auto wanted = shape.begin(); matches && wanted != shape.end(); ++wanted, ++dim)
    matches = *wanted < 0 || *wanted == size(dim);
  if (!matches) fail("shape " + joined(shape));
  return *this;
}

const TensorView& TensorView::expect_float32_or_bfloat16() const {
  if (!is_float32() && !is_bfloat16())
    throw py::type_error(std::string(name_) + ": want float32 or bfloat16, got " + dtype_name());
  return *this;
}

const TensorView& TensorView::expect_same_dtype(const TensorView& other) const {
  if (!has_dtype(other.tensor_.dtype.code, other.tensor_.dtype.bits))
    throw py::type_error(std::string(name_) + ": want " + other.dtype_name() + " like " +
                         other.name() + ", got " + dtype_name());
  return *this;
}

const TensorView& TensorView::expect_contiguous() const {
  if (!is_contiguous()) fail("a contiguous tensor (call .contiguous())");
  return *this;
}

const TensorView& TensorView::expect_packed_rows() const {
  int64_t packed = 1;
  for (int dim = ndim() - 1; dim > 0; --dim) {
    if (size(dim) != 1 && stride(dim) != packed && numel() != 0)
      fail("every dimension but the first packed (call .contiguous())");
    packed *= size(dim);
  }
  return *this;
}

const TensorView& TensorView::expect_packed_columns() const {
  if (size(ndim() - 1) != 1 && stride(ndim() - 1) != 1 && numel() != 0)
    fail("the last dimension packed (call .contiguous())");
  return *this;
}

const TensorView& TensorView::expect_dtype(int code, int bits) const {
  if (!has_dtype(code, bits))
    throw py::type_error(std::string(name_) + ": want " + dtype_text(code, bits) + ", got " +
                         dtype_name());
  return *this;
}

void TensorView::fail(const std::string& wanted) const {
  std::string strides = joined(std::vector<int64_t>(tensor_.strides, tensor_.strides + ndim()));
  throw py::value_error(std::string(name_) + ": want " + wanted + ", got shape " + shape_text() +
                        " with strides " + strides);
}

}  // namespace eapo
