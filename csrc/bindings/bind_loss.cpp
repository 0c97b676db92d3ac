#include "bindings/advantage_args.h"
#include "bindings/bindings.h"
#include "bindings/tensor_view.h"
#include "core/error.h"
#include "cpu/huge_pages.h"
#include "cpu/loss.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1;
constexpr int64_t kStateSize = sizeof(cpu::LossRow) / sizeof(double);

cpu::Storage storage_of(const TensorView& tensor) {
  return tensor.is_bfloat16() ? cpu::Storage::kBFloat16 : cpu::Storage::kFloat32;
}

// A vector that may be None: null.
template <typename T>
const T* optional_vector(py::handle object, const char* name, int64_t size) {
  return object.is_none() ? nullptr : vector_of<T>({object, name}, size);
}

cpu::LossRow* state_of(py::handle object, int64_t rows) {
  const TensorView state(object, "state");
  state.expect<double>().expect_shape({rows, kStateSize}).expect_contiguous();
  return reinterpret_cast<cpu::LossRow*>(state.as<double>());
}

// Starts rise from 0 to the number of ids.
void check_starts(const int32_t* starts, int64_t rows, int64_t ids) {
  require(starts[0] == 0 && starts[rows] == ids, "ban_starts must run from 0 to ", ids,
          " (ban_ids), got ", starts[0], " to ", starts[rows]);
  for (int64_t row = 0; row < rows; ++row)
    require(starts[row] <= starts[row + 1], "ban_starts falls after entry ", row);
}

void check_rows(const int64_t* rows, int64_t count, int64_t limit, const char* name) {
  for (int64_t k = 0; k < count; ++k)
    require(rows[k] >= 0 && rows[k] < limit, name, "[", k, "] is ", rows[k], ", but the tile has ",
            limit, " rows");
}

void check_map(float temperature, float softcap) {
  require(temperature > 0, "temperature is ", temperature, ", want a number above 0");
  require(softcap >= 0, "softcap is ", softcap, ", want >= 0 (0 is off)");
}

void absorb_logits(py::handle logits_, int64_t column, py::handle targets, py::handle bias,
                   py::handle shift, py::handle own, float temperature, float softcap, py::handle ban_starts,
                   py::handle ban_ids_, py::handle state, bool powers, py::handle out_,
                   py::handle references_) {
  const TensorView logits(logits_, "logits");
  logits.expect_float32_or_bfloat16().expect_shape({kAny, kAny}).expect_contiguous();
  check_map(temperature, softcap);
  const int64_t rows = logits.size(0), width = logits.size(1);
  cpu::AbsorbArgs args{
      .storage = storage_of(logits),
      .logits = logits.data(),
      .rows = rows,
      .width = width,
      .column = column,
      .map = {.bias = optional_vector<float>(bias, "bias", width),
              .shift = optional_vector<float>(shift, "shift", rows),
              .own = optional_vector<float>(own, "own", rows),
              .temperature = temperature,
              .softcap = softcap,
              .ban_starts = optional_vector<int32_t>(ban_starts, "ban_starts", rows + 1),
              .ban_ids = nullptr},
      .targets = vector_of<int64_t>({targets, "targets"}, rows),
      .state = state.is_none() ? nullptr : state_of(state, rows),
      .powers = powers,
      .out = nullptr,
      .references = nullptr,
  };
  if (args.map.ban_starts != nullptr) {
    const TensorView ids(ban_ids_, "ban_ids");
    ids.expect<int32_t>().expect_shape({kAny}).expect_contiguous();
    check_starts(args.map.ban_starts, rows, ids.size(0));
    args.map.ban_ids = ids.as<int32_t>();
  }
  if (!out_.is_none()) {
    const TensorView out(out_, "out"), references(references_, "references");
    out.expect_same_dtype(logits).expect_shape({rows, width}).expect_contiguous();
    references.expect<float>().expect_shape({rows, cpu::loss_blocks(width)}).expect_contiguous();
    args.out = out.data();
    args.references = references.as<float>();
  }
  const py::gil_scoped_release unlocked;
  cpu::absorb_logits(args);
}

void logit_gradient(py::handle tile_, int64_t column, py::handle references_, py::handle state,
                    py::handle targets, py::handle source_, py::handle target, py::handle a,
                    py::handle b, float temperature, float softcap) {
  const TensorView tile(tile_, "tile"), references(references_, "references"),
      source(source_, "source");
  tile.expect_float32_or_bfloat16().expect_shape({kAny, kAny}).expect_contiguous();
  const int64_t rows = tile.size(0), width = tile.size(1);
  references.expect<float>().expect_shape({rows, cpu::loss_blocks(width)}).expect_contiguous();
  source.expect<int64_t>().expect_shape({kAny}).expect_contiguous();
  check_map(temperature, softcap);
  const int64_t count = source.size(0);
  const cpu::LogitGradientArgs args{
      .storage = storage_of(tile),
      .tile = tile.data(),
      .rows = rows,
      .width = width,
      .column = column,
      .references = references.as<float>(),
      .state = state_of(state, rows),
      .targets = vector_of<int64_t>({targets, "targets"}, rows),
      .count = count,
      .source = source.as<int64_t>(),
      .target = vector_of<int64_t>({target, "target"}, count),
      .a = vector_of<float>({a, "a"}, count),
      .b = optional_vector<float>(b, "b", count),
      .temperature = temperature,
      .softcap = softcap,
  };
  check_rows(args.source, count, rows, "source");
  check_rows(args.target, count, rows, "target");
  const py::gil_scoped_release unlocked;
  cpu::logit_gradient(args);
}

void fill_rows(py::handle out_, py::handle values) {
  const TensorView out(out_, "out");
  out.expect_shape({kAny, kAny}).expect_contiguous();
  require(out.is_bfloat16(), "out: want bfloat16, got ", out.dtype_name());
  const int64_t rows = out.size(0), width = out.size(1);
  const float* numbers = vector_of<float>({values, "values"}, rows);
  auto* to = out.as<uint16_t>();
  const py::gil_scoped_release unlocked;
  cpu::fill_rows(to, numbers, rows, width);
}

// `high` is the bfloat16 tensor itself, `low` an int16 one beside it.
uint16_t* plane_of(const TensorView& plane, int64_t count) {
  plane.expect_contiguous();
  require(plane.numel() == count, plane.name(), ": want ", count, " elements like high, got ",
          plane.numel());
  return plane.as<uint16_t>();
}

void check_planes(const TensorView& high, const TensorView& low) {
  require(high.is_bfloat16(), "high: want bfloat16, got ", high.dtype_name());
  require(low.has_dtype(kDLInt, 16), "low: want int16, got ", low.dtype_name());
}

void add_to_planes(py::handle high_, py::handle low_, py::handle addend_) {
  const TensorView high(high_, "high"), low(low_, "low"), addend(addend_, "addend");
  check_planes(high, low);
  addend.expect_same_dtype(high);
  const int64_t count = high.numel();
  uint16_t *upper = plane_of(high, count), *lower = plane_of(low, count);
  const uint16_t* more = plane_of(addend, count);
  const py::gil_scoped_release unlocked;
  cpu::add_to_planes(upper, lower, more, count);
}

void round_planes(py::handle high_, py::handle low_) {
  const TensorView high(high_, "high"), low(low_, "low");
  check_planes(high, low);
  const int64_t count = high.numel();
  uint16_t *upper = plane_of(high, count), *lower = plane_of(low, count);
  const py::gil_scoped_release unlocked;
  cpu::round_planes(upper, lower, count);
}

void take_transposed(py::handle to_, py::handle source_, bool add) {
  const TensorView to(to_, "to"), source(source_, "source");
  to.expect<float>().expect_shape({kAny, kAny}).expect_contiguous();
  const int64_t rows = to.size(0), width = to.size(1);
  source.expect<float>().expect_shape({width, rows}).expect_contiguous();
  auto* target = to.as<float>();
  const auto* values = source.as<float>();
  const py::gil_scoped_release unlocked;
  cpu::take_transposed(target, values, rows, width, add);
}

void advise_huge_pages(py::handle tensor_) {
  const TensorView tensor(tensor_, "tensor");
  cpu::advise_huge_pages(tensor.expect_contiguous().data(), tensor.numel() * tensor.element_bytes());
}

}  // namespace

void bind_loss(py::module_& m) {
  m.attr("LOSS_BLOCK") = cpu::kLossBlock;
  m.attr("LOSS_STATE") = kStateSize;
  m.def("absorb_logits", &absorb_logits, py::arg("logits"), py::arg("column"), py::arg("targets"),
        py::arg("bias"), py::arg("shift"), py::arg("own"), py::arg("temperature"),
        py::arg("softcap"), py::arg("ban_starts"), py::arg("ban_ids"), py::arg("state"),
        py::arg("powers"), py::arg("out"), py::arg("references"));
  m.def("logit_gradient", &logit_gradient, py::arg("tile"), py::arg("column"),
        py::arg("references"), py::arg("state"), py::arg("targets"), py::arg("source"),
        py::arg("target"), py::arg("a"), py::arg("b"), py::arg("temperature"), py::arg("softcap"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("tensor"));
  m.def("fill_rows", &fill_rows, py::arg("out"), py::arg("values"));
  m.def("add_to_planes", &add_to_planes, py::arg("high"), py::arg("low"), py::arg("addend"));
  m.def("take_transposed", &take_transposed, py::arg("to"), py::arg("source"), py::arg("add"));
  m.def("round_planes", &round_planes, py::arg("high"), py::arg("low"));
}

}  // namespace eapo
