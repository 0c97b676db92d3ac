#include <string>

#include "bindings/bindings.h"
#include "bindings/storage.h"
#include "bindings/tensor_view.h"
#include "core/error.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1;

// All dimensions but the last as one: `count` rows of `size` entries, `stride` apart.
struct Rows {
  int64_t count, size, stride;
};

Rows rows_of(const TensorView& tensor) {
  require(tensor.ndim() > 0, tensor.name(), ": want at least one dimension");
  const int last = tensor.ndim() - 1;
  const int64_t size = tensor.size(last);
  Rows rows{.count = 1, .size = size, .stride = size};
  bool fits = size <= 1 || tensor.stride(last) == 1;
  for (int dim = last - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (rows.count == 1) rows.stride = tensor.stride(dim);
    fits = fits && tensor.stride(dim) == rows.stride * rows.count;
    rows.count *= tensor.size(dim);
  }
  require(fits || rows.count == 0, tensor.name(), ": want rows at one distance (call ",
          ".contiguous()), got shape ", tensor.shape_text());
  return rows;
}

Rows contiguous_rows(const TensorView& tensor, const Rows& like) {
  tensor.expect_contiguous();
  const Rows rows = rows_of(tensor);
  require(rows.count == like.count && rows.size == like.size, tensor.name(), ": want ", like.count,
          " rows of ", like.size, ", got shape ", tensor.shape_text());
  return rows;
}

void rms_norm(py::handle x_, py::handle weight_, double eps, bool unit_offset,
              bool cast_before_weight, py::handle out_) {
  const TensorView x(x_, "x"), weight(weight_, "weight"), out(out_, "out");
  const Rows rows = rows_of(x.expect_float32_or_bfloat16());
  weight.expect_same_dtype(x).expect_shape({rows.size}).expect_contiguous();
  contiguous_rows(out.expect_same_dtype(x), rows);
  require(eps >= 0, "eps is ", eps, ", want >= 0");
  const cpu::RmsNormArgs args{
      .storage = storage_of(x),
      .rows = rows.count,
      .size = rows.size,
      .x = x.data(),
      .x_stride = rows.stride,
      .weight = weight.data(),
      .eps = static_cast<float>(eps),
      .unit_offset = unit_offset,
      .cast_before_weight = cast_before_weight,
      .out = out.data(),
  };
  const py::gil_scoped_release unlocked;
  cpu::kernels().rms_norm(args);
}

cpu::Activation activation_of(const std::string& kind) {
  if (kind == "silu") return cpu::Activation::kSilu;
  require(kind == "gelu_tanh", "kind is '", kind, "', want silu or gelu_tanh");
  return cpu::Activation::kGeluTanh;
}

void gated_activation(py::handle gate_, py::handle up_, const std::string& kind, py::handle out_) {
  const TensorView gate(gate_, "gate"), up(up_, "up"), out(out_, "out");
  const Rows rows = rows_of(gate.expect_float32_or_bfloat16());
  const Rows up_rows = rows_of(up.expect_same_dtype(gate));
  require(up_rows.count == rows.count && up_rows.size == rows.size, "up: want shape ",
          gate.shape_text(), " like gate, got ", up.shape_text());
  contiguous_rows(out.expect_same_dtype(gate), rows);
  const cpu::GatedActivationArgs args{
      .storage = storage_of(gate),
      .activation = activation_of(kind),
      .rows = rows.count,
      .size = rows.size,
      .gate = gate.data(),
      .up = up.data(),
      .gate_stride = rows.stride,
      .up_stride = up_rows.stride,
      .out = out.data(),
  };
  const py::gil_scoped_release unlocked;
  cpu::kernels().gated_activation(args);
}

void rotary(py::handle x_, py::handle cos_, py::handle sin_, py::handle out_) {
  const TensorView x(x_, "x"), cos(cos_, "cos"), sin(sin_, "sin"), out(out_, "out");
  x.expect_float32_or_bfloat16().expect_shape({kAny, kAny, kAny, kAny});
  const int64_t batches = x.size(0), heads = x.size(1), tokens = x.size(2), dim = x.size(3);
  require(x.stride(3) == 1 || dim <= 1 || x.numel() == 0,
          "x: want the last dimension packed (call .contiguous())");
  cos.expect_float32_or_bfloat16().expect_shape({kAny, tokens, kAny}).expect_contiguous();
  if (!cos.is_float32()) cos.expect_same_dtype(x);
  sin.expect_same_dtype(cos).expect_shape({cos.size(0), tokens, cos.size(2)}).expect_contiguous();
  require(cos.size(0) == batches || cos.size(0) == 1, "cos: want ", batches,
          " or 1 in the first dimension, got ", cos.size(0));
  require(cos.size(2) % 2 == 0 && cos.size(2) <= dim,
          "cos: want an even last dimension of at most ", dim, ", got ", cos.size(2));
  out.expect_same_dtype(x).expect_shape({batches, tokens, heads, dim}).expect_contiguous();
  const cpu::RotaryArgs args{
      .storage = storage_of(x),
      .angle_storage = storage_of(cos),
      .batches = batches,
      .heads = heads,
      .tokens = tokens,
      .dim = dim,
      .rotated = cos.size(2),
      .x = x.data(),
      .batch_stride = x.stride(0),
      .head_stride = x.stride(1),
      .token_stride = x.stride(2),
      .cos = cos.data(),
      .sin = sin.data(),
      .angle_batches = cos.size(0),
      .out = out.data(),
  };
  const py::gil_scoped_release unlocked;
  cpu::kernels().rotary(args);
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("unit_offset"), py::arg("cast_before_weight"), py::arg("out"));
  m.def("gated_activation", &gated_activation, py::arg("gate"), py::arg("up"), py::arg("kind"),
        py::arg("out"));
  m.def("rotary", &rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"));
}

}  // namespace eapo
