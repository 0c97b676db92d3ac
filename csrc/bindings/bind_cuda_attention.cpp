#include "bindings/cuda_bindings.h"
#include "paged_attention/launch.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1, kVector = 16, kMaxBytes = 1024;

// The kernel reads 16 bytes at a time.
void check_aligned(const TensorView& tensor, int64_t stride) {
  const auto address = reinterpret_cast<uint64_t>(tensor.data());
  require(address % kVector == 0 && stride * tensor.item_bytes() % kVector == 0, tensor.name(),
          ": its rows must start at multiples of ", kVector, " bytes (call .contiguous())");
}

void check_dim(const TensorView& q) {
  const int64_t bytes = q.size(2) * q.item_bytes();
  require(bytes % kVector == 0 && bytes <= kMaxBytes, "q: a head has ", bytes,
          " bytes, want a multiple of ", kVector, " up to ", kMaxBytes);
}

void attend_rows(py::handle q_, py::handle k_cache_, py::handle v_cache_, py::handle cu_q_,
                 py::handle kv_lens_, py::handle block_tables_, float scale, float softcap,
                 int window, py::handle sinks, int split, py::handle acc_parts_,
                 py::handle max_parts_, py::handle sum_parts_, py::handle out_, Device device) {
  const TensorView q(q_, "q", device), k_cache(k_cache_, "k_cache", device),
      v_cache(v_cache_, "v_cache", device), cu_q(cu_q_, "cu_q", device),
      kv_lens(kv_lens_, "kv_lens", device), block_tables(block_tables_, "block_tables", device),
      acc_parts(acc_parts_, "acc_parts", device), max_parts(max_parts_, "max_parts", device),
      sum_parts(sum_parts_, "sum_parts", device), out(out_, "out", device);
  q.expect_shape({kAny, kAny, kAny}).expect_packed_rows();
  const int64_t rows = q.size(0), heads = q.size(1), dim = q.size(2);
  k_cache.expect_same_dtype(q).expect_shape({kAny, kAny, kAny, dim}).expect_contiguous();
  const int64_t block_size = k_cache.size(1), kv_heads = k_cache.size(2);
  v_cache.expect_same_dtype(q).expect_contiguous().expect_shape(
      {k_cache.size(0), block_size, kv_heads, dim});
  out.expect_same_dtype(q).expect_shape({rows, heads, dim}).expect_contiguous();
  require(kv_heads > 0 && heads % kv_heads == 0, "q has ", heads, " heads, want a multiple of the ",
          kv_heads, " heads of k_cache");
  kv_lens.expect_shape({kAny});
  const int64_t segments = kv_lens.size(0);
  block_tables.expect<int32_t>().expect_shape({segments, kAny}).expect_packed_rows();
  acc_parts.expect_shape({rows, heads, kAny, dim});
  const int64_t slots = acc_parts.size(2);
  require(softcap >= 0 && window >= 0, "softcap is ", softcap, ", window ", window,
          "; want >= 0 (0 is off)");
  require(split > 0 && slots > 0, "split is ", split, ", acc_parts has ", slots,
          " slots; want more than 0");
  check_dim(q);
  check_aligned(q, q.stride(0));
  check_aligned(k_cache, dim);
  check_aligned(v_cache, dim);
  PagedRowsArgs args{
      .storage = storage_of(q),
      .rows = rows,
      .segments = segments,
      .q_heads = heads,
      .kv_heads = kv_heads,
      .dim = dim,
      .block_size = static_cast<int32_t>(block_size),
      .q = q.data(),
      .q_stride = q.stride(0),
      .k_cache = k_cache.data(),
      .v_cache = v_cache.data(),
      .cu_q = values_of<int32_t>(cu_q, {segments + 1}),
      .kv_lens = values_of<int32_t>(kv_lens, {segments}),
      .block_tables = block_tables.as<int32_t>(),
      .table_stride = block_tables.stride(0),
      .scale = scale,
      .softcap = softcap,
      .window = window,
      .sinks = nullptr,
      .split = split,
      .slots = static_cast<int32_t>(slots),
      .acc_parts = values_of<float>(acc_parts, {rows, heads, slots, dim}),
      .max_parts = values_of<float>(max_parts, {rows, heads, slots}),
      .sum_parts = values_of<float>(sum_parts, {rows, heads, slots}),
      .out = out.data(),
  };
  if (!sinks.is_none()) args.sinks = values_of<float>({sinks, "sinks", device}, {heads});
  check_launch("paged_attention", cuda::attend_rows(args, target_of(q)));
}

}  // namespace

void bind_cuda_attention(py::module_& m, Device device) {
  m.def(
      "attend_rows",
      [device](py::handle q, py::handle k_cache, py::handle v_cache, py::handle cu_q,
               py::handle kv_lens, py::handle block_tables, float scale, float softcap, int window,
               py::handle sinks, int split, py::handle acc_parts, py::handle max_parts,
               py::handle sum_parts, py::handle out) {
        attend_rows(q, k_cache, v_cache, cu_q, kv_lens, block_tables, scale, softcap, window, sinks,
                    split, acc_parts, max_parts, sum_parts, out, device);
      },
      py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("cu_q"), py::arg("kv_lens"),
      py::arg("block_tables"), py::arg("scale"), py::arg("softcap"), py::arg("window"),
      py::arg("sinks"), py::arg("split"), py::arg("acc_parts"), py::arg("max_parts"),
      py::arg("sum_parts"), py::arg("out"));
}

}  // namespace eapo
