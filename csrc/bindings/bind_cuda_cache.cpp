#include "bindings/cuda_bindings.h"
#include "kv_write/launch.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1;

void kv_write(py::handle k_, py::handle v_, py::handle k_cache_, py::handle v_cache_,
              py::handle slots_, Device device) {
  const TensorView k(k_, "k", device), v(v_, "v", device), k_cache(k_cache_, "k_cache", device),
      v_cache(v_cache_, "v_cache", device), slots(slots_, "slots", device);
  k_cache.expect_shape({kAny, kAny, kAny, kAny}).expect_contiguous();
  const int64_t heads = k_cache.size(2), dim = k_cache.size(3);
  v_cache.expect_same_dtype(k_cache).expect_contiguous().expect_shape(
      {k_cache.size(0), k_cache.size(1), heads, dim});
  slots.expect<int64_t>().expect_shape({kAny}).expect_contiguous();
  const int64_t tokens = slots.size(0), item = k_cache.item_bytes();
  k.expect_same_dtype(k_cache).expect_shape({tokens, heads, dim}).expect_packed_rows();
  v.expect_same_dtype(k_cache).expect_shape({tokens, heads, dim}).expect_packed_rows();
  const KvWriteArgs args{
      .tokens = tokens,
      .row_bytes = heads * dim * item,
      .k = k.data(),
      .v = v.data(),
      .k_stride = k.stride(0) * item,
      .v_stride = v.stride(0) * item,
      .k_cache = k_cache.data(),
      .v_cache = v_cache.data(),
      .slots = slots.as<int64_t>(),
  };
  check_launch("kv_write", cuda::kv_write(args, target_of(k_cache)));
}

// Caches with blocks of one size share a launch, up to its limit.
void copy_blocks(const py::list& caches, py::handle copies_, Device device) {
  const TensorView copies(copies_, "copies", device);
  copies.expect<int32_t>().expect_shape({kAny, 2}).expect_contiguous();
  CopyBlocksArgs args{};
  args.copies = copies.as<int32_t>();
  args.pairs = copies.size(0);
  const auto flush = [&] {
    check_launch("copy_blocks", cuda::copy_blocks(args, target_of(copies)));
    args.count = 0;
  };
  for (py::handle object : caches) {
    const TensorView cache(object, "caches", device);
    cache.expect_contiguous();
    require(cache.ndim() > 1 && cache.size(0) > 0, "caches: want [blocks, ...], got shape ",
            cache.shape_text());
    const int64_t bytes = cache.numel() / cache.size(0) * cache.item_bytes();
    if (args.count == CopyBlocksArgs::kMaxCaches || (args.count > 0 && bytes != args.block_bytes))
      flush();
    args.block_bytes = bytes;
    args.caches[args.count++] = cache.data();
  }
  flush();
}

}  // namespace

void bind_cuda_cache(py::module_& m, Device device) {
  m.def(
      "kv_write",
      [device](py::handle k, py::handle v, py::handle k_cache, py::handle v_cache,
               py::handle slots) { kv_write(k, v, k_cache, v_cache, slots, device); },
      py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"));
  m.def(
      "copy_blocks",
      [device](const py::list& caches, py::handle copies) { copy_blocks(caches, copies, device); },
      py::arg("caches"), py::arg("copies"));
}

}  // namespace eapo
