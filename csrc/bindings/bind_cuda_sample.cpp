#include "bindings/cuda_bindings.h"
#include "sample/launch.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1;

void sample(py::handle logits_, py::handle rows_, py::handle uniforms, py::handle temperatures,
            py::handle top_ks, py::handle top_ps, py::handle min_ps, py::handle ban_samples_,
            py::handle ban_ids, py::handle tops, py::handle sums, py::handle out_tokens,
            py::handle out_logprobs, py::handle out_kept, Device device) {
  const auto view = [&](py::handle object, const char* name) {
    return TensorView(object, name, device);
  };
  const TensorView logits = view(logits_, "logits"), rows = view(rows_, "rows"),
                   ban_samples = view(ban_samples_, "ban_samples");
  logits.expect_shape({kAny, kAny}).expect_packed_rows();
  rows.expect_shape({kAny});
  ban_samples.expect_shape({kAny});
  const int64_t vocab = logits.size(1), samples = rows.size(0), bans = ban_samples.size(0);
  const int64_t tiles = (vocab + SampleRowsArgs::kTile - 1) / SampleRowsArgs::kTile;
  require(vocab > 0 && tiles <= SampleRowsArgs::kMaxTiles, "logits: a row has ", vocab,
          " entries, want 1 to ", int64_t{SampleRowsArgs::kTile} * SampleRowsArgs::kMaxTiles);
  const SampleRowsArgs args{
      .storage = storage_of(logits),
      .logits = logits.data(),
      .num_rows = logits.size(0),
      .row_stride = logits.stride(0),
      .vocab = static_cast<int32_t>(vocab),
      .samples = static_cast<int32_t>(samples),
      .rows = values_of<int32_t>(rows, {samples}),
      .uniforms = values_of<float>(view(uniforms, "uniforms"), {samples}),
      .temperatures = values_of<float>(view(temperatures, "temperatures"), {samples}),
      .top_ks = values_of<int32_t>(view(top_ks, "top_ks"), {samples}),
      .top_ps = values_of<float>(view(top_ps, "top_ps"), {samples}),
      .min_ps = values_of<float>(view(min_ps, "min_ps"), {samples}),
      .bans = static_cast<int32_t>(bans),
      .ban_samples = values_of<int32_t>(ban_samples, {bans}),
      .ban_ids = values_of<int32_t>(view(ban_ids, "ban_ids"), {bans}),
      .tiles = static_cast<int32_t>(tiles),
      .tops = values_of<float>(view(tops, "tops"), {samples, tiles}),
      .sums = values_of<float>(view(sums, "sums"), {samples, tiles}),
      .tokens = values_of<int64_t>(view(out_tokens, "out_tokens"), {samples}),
      .logprobs = values_of<float>(view(out_logprobs, "out_logprobs"), {samples}),
      .kept = values_of<float>(view(out_kept, "out_kept"), {samples}),
  };
  check_launch("sample", cuda::sample_rows(args, target_of(logits)));
}

}  // namespace

void bind_cuda_sample(py::module_& m, Device device) {
  m.attr("SAMPLE_TILE") = int{SampleRowsArgs::kTile};
  m.def(
      "sample",
      [device](py::handle logits, py::handle rows, py::handle uniforms, py::handle temperatures,
               py::handle top_ks, py::handle top_ps, py::handle min_ps, py::handle ban_samples,
               py::handle ban_ids, py::handle tops, py::handle sums, py::handle out_tokens,
               py::handle out_logprobs, py::handle out_kept) {
        sample(logits, rows, uniforms, temperatures, top_ks, top_ps, min_ps, ban_samples, ban_ids,
               tops, sums, out_tokens, out_logprobs, out_kept, device);
      },
      py::arg("logits"), py::arg("rows"), py::arg("uniforms"), py::arg("temperatures"),
      py::arg("top_ks"), py::arg("top_ps"), py::arg("min_ps"), py::arg("ban_samples"),
      py::arg("ban_ids"), py::arg("tops"), py::arg("sums"), py::arg("out_tokens"),
      py::arg("out_logprobs"), py::arg("out_kept"));
}

}  // namespace eapo
