#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/advantage_args.h"
#include "bindings/bindings.h"
#include "bindings/storage.h"
#include "bindings/tensor_view.h"
#include "core/error.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1;

// Every element must be in [0, limit).
template <typename T>
void check_indices(const TensorView& tensor, int64_t limit, const char* what) {
  const T* values = tensor.as<T>();
  for (int64_t i = 0; i < tensor.numel(); ++i)
    require(values[i] >= 0 && values[i] < limit, tensor.name(), "[", i, "] is ", values[i],
            ", but there are ", limit, " ", what);
}

// Bans grouped by sample: starts [N + 1] and the ids of each sample, ascending.
std::pair<std::vector<int32_t>, std::vector<int32_t>> grouped_bans(const TensorView& rows,
                                                                   const TensorView& ids,
                                                                   int64_t samples) {
  std::vector<int32_t> starts(static_cast<size_t>(samples) + 1, 0);
  std::vector<int32_t> grouped(static_cast<size_t>(rows.numel()));
  for (int64_t i = 0; i < rows.numel(); ++i) ++starts[rows.as<int32_t>()[i] + 1];
  for (int64_t n = 0; n < samples; ++n) starts[n + 1] += starts[n];
  std::vector<int32_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < rows.numel(); ++i)
    grouped[next[rows.as<int32_t>()[i]]++] = ids.as<int32_t>()[i];
  for (int64_t n = 0; n < samples; ++n)
    std::sort(grouped.begin() + starts[n], grouped.begin() + starts[n + 1]);
  return {std::move(starts), std::move(grouped)};
}

void check_draws(const cpu::SampleArgs& args) {
  for (int64_t n = 0; n < args.samples; ++n) {
    require(args.temperatures[n] >= 0 && std::isfinite(args.temperatures[n]), "temperatures[", n,
            "] is ", args.temperatures[n], ", want a finite number >= 0 (0 is greedy)");
    require(args.uniforms[n] >= 0 && args.uniforms[n] < 1, "uniforms[", n, "] is ",
            args.uniforms[n], ", want a number in [0, 1)");
  }
}

void sample(py::handle logits_, py::handle sample_rows_, py::handle temperatures_,
            py::handle top_ks_, py::handle top_ps_, py::handle min_ps_, py::handle uniforms_,
            py::handle ban_rows_, py::handle ban_ids_, py::handle out_tokens_,
            py::handle out_logprobs_, py::handle out_kept_) {
  const TensorView logits(logits_, "logits"), sample_rows(sample_rows_, "sample_rows"),
      temperatures(temperatures_, "temperatures"), top_ks(top_ks_, "top_ks"),
      top_ps(top_ps_, "top_ps"), min_ps(min_ps_, "min_ps"), uniforms(uniforms_, "uniforms"),
      ban_rows(ban_rows_, "ban_rows"), ban_ids(ban_ids_, "ban_ids"),
      out_tokens(out_tokens_, "out_tokens"), out_logprobs(out_logprobs_, "out_logprobs"),
      out_kept(out_kept_, "out_kept");
  logits.expect_float32_or_bfloat16().expect_shape({kAny, kAny}).expect_packed_rows();
  sample_rows.expect<int32_t>().expect_shape({kAny}).expect_contiguous();
  ban_rows.expect<int32_t>().expect_shape({kAny}).expect_contiguous();
  const int64_t samples = sample_rows.size(0);
  ban_ids.expect<int32_t>().expect_shape({ban_rows.size(0)}).expect_contiguous();
  check_indices<int32_t>(sample_rows, logits.size(0), "rows of logits");
  check_indices<int32_t>(ban_rows, samples, "samples");
  check_indices<int32_t>(ban_ids, logits.size(1), "tokens");
  const auto [ban_starts, bans] = grouped_bans(ban_rows, ban_ids, samples);
  vector_of<int64_t>(out_tokens, samples);
  vector_of<float>(out_logprobs, samples);
  vector_of<float>(out_kept, samples);
  const cpu::SampleArgs args{
      .logits = logits.data(),
      .storage = storage_of(logits),
      .rows = logits.size(0),
      .vocab = logits.size(1),
      .row_stride = logits.stride(0),
      .samples = samples,
      .sample_rows = sample_rows.as<int32_t>(),
      .temperatures = vector_of<float>(temperatures, samples),
      .top_ks = vector_of<int32_t>(top_ks, samples),
      .top_ps = vector_of<float>(top_ps, samples),
      .min_ps = vector_of<float>(min_ps, samples),
      .uniforms = vector_of<float>(uniforms, samples),
      .ban_starts = ban_starts.data(),
      .ban_ids = bans.data(),
      .out_tokens = out_tokens.as<int64_t>(),
      .out_logprobs = out_logprobs.as<float>(),
      .out_kept = out_kept.as<float>(),
  };
  check_draws(args);
  const py::gil_scoped_release unlocked;
  cpu::kernels().sample(args);
}

// Whether every value is in [0, limit); an unsigned comparison that vectorises.
bool in_range(const int32_t* values, int64_t count, int64_t limit) {
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) bad |= static_cast<uint32_t>(values[i]) >= limit;
  return !bad;
}

// cu_q rises from 0 to T, no segment with keys asks for more queries than those, and every block is
// in range. A segment without keys is padding.
void check_segments(const cpu::AttentionArgs& args, int64_t table_width) {
  require(args.cu_q[0] == 0 && args.cu_q[args.segments] == args.tokens, "cu_q must run from 0 to ",
          args.tokens, " (the rows of q), got ", args.cu_q[0], " to ", args.cu_q[args.segments]);
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t queries = int64_t{args.cu_q[s + 1]} - args.cu_q[s], keys = args.kv_lens[s];
    require(queries >= 0 && keys >= 0 && (queries <= keys || keys == 0), "segment ", s, " has ",
            queries, " query rows (cu_q) and ", keys,
            " keys (kv_lens), want 0 <= rows <= keys, or no keys for rows of padding");
    const int64_t used = (keys + args.block_size - 1) / args.block_size;
    require(used <= table_width, "segment ", s, " needs ", used, " blocks for ", keys,
            " keys, but block_tables has ", table_width, " columns");
    const int32_t* blocks = args.block_tables + s * args.table_stride;
    if (in_range(blocks, used, args.blocks)) continue;
    int64_t b = 0;
    while (in_range(blocks + b, 1, args.blocks)) ++b;
    require(false, "block_tables[", s, ", ", b, "] is ", blocks[b], ", but the cache has ",
            args.blocks, " blocks");
  }
}

void check_slots(const cpu::AttentionArgs& args) {
  const int64_t limit = args.blocks * args.block_size;
  for (int64_t i = 0; i < args.tokens; ++i)
    require(args.slots[i] < limit, "slots[", i, "] is ", args.slots[i], ", but there are ", limit,
            " slots in the cache (negative: not written)");
}

// Spans ascend, and their segments have one query row, enough keys and the same first blocks.
void check_shared(const cpu::AttentionArgs& args) {
  int64_t free = 0;
  for (int64_t p = 0; p < args.spans; ++p) {
    const int64_t first = args.shared_spans[2 * p], count = args.shared_spans[2 * p + 1];
    require(first >= free && count > 0 && first + count <= args.segments, "shared spans[", p,
            "] is (", first, ", ", count, "), want ascending runs of the ", args.segments,
            " segments that do not overlap");
    free = first + count;
    const int64_t keys = args.shared_lens[p];
    require(keys >= 0 && keys % args.block_size == 0, "shared lens[", p, "] is ", keys,
            ", want a multiple of the block size ", args.block_size);
    const int32_t* blocks = args.block_tables + first * args.table_stride;
    for (int64_t s = first; s < free; ++s) {
      require(args.cu_q[s + 1] - args.cu_q[s] == 1 && args.kv_lens[s] >= keys, "segment ", s,
              " of shared spans[", p, "] has ", args.cu_q[s + 1] - args.cu_q[s], " query rows and ",
              args.kv_lens[s], " keys, want one row and at least the ", keys, " shared keys");
      require(std::equal(blocks, blocks + keys / args.block_size,
                         args.block_tables + s * args.table_stride),
              "segment ", s, " of shared spans[", p, "] does not begin with the ",
              keys / args.block_size, " blocks of segment ", first);
    }
  }
}

// The sinks as fp32; empty when there are none.
std::vector<float> sink_logits(py::handle object, const TensorView& q) {
  if (object.is_none()) return {};
  const TensorView sinks(object, "sinks");
  if (!sinks.is_float32()) sinks.expect_same_dtype(q);
  sinks.expect_shape({q.size(1)}).expect_contiguous();
  if (sinks.is_float32()) return {sinks.as<float>(), sinks.as<float>() + sinks.numel()};
  std::vector<float> values;
  for (int64_t h = 0; h < sinks.numel(); ++h)
    values.push_back(std::bit_cast<float>(uint32_t{sinks.as<uint16_t>()[h]} << 16));
  return values;
}

void paged_attention(py::handle q_, py::handle k_, py::handle v_, py::handle k_cache_,
                     py::handle v_cache_, py::handle slots_, py::handle cu_q_, py::handle kv_lens_,
                     py::handle block_tables_, float scale, float softcap, int64_t window,
                     py::handle sinks_, py::handle shared_spans_, py::handle shared_lens_,
                     py::handle out_) {
  const TensorView q(q_, "q"), k(k_, "k"), v(v_, "v"), k_cache(k_cache_, "k_cache"),
      v_cache(v_cache_, "v_cache"), slots(slots_, "slots"), cu_q(cu_q_, "cu_q"),
      kv_lens(kv_lens_, "kv_lens"), block_tables(block_tables_, "block_tables"), out(out_, "out");
  q.expect_float32_or_bfloat16().expect_shape({kAny, kAny, kAny}).expect_packed_columns();
  k_cache.expect_same_dtype(q).expect_shape({kAny, kAny, kAny, q.size(2)}).expect_contiguous();
  const int64_t tokens = q.size(0), heads = k_cache.size(2), dim = q.size(2);
  v_cache.expect_same_dtype(q).expect_contiguous().expect_shape(
      {k_cache.size(0), k_cache.size(1), heads, dim});
  k.expect_same_dtype(q).expect_shape({tokens, heads, dim}).expect_packed_columns();
  v.expect_same_dtype(q).expect_shape({tokens, heads, dim}).expect_packed_columns();
  out.expect_same_dtype(q).expect_shape({tokens, q.size(1), dim}).expect_contiguous();
  require(heads > 0 && q.size(1) % heads == 0, "q has ", q.size(1),
          " heads, want a multiple of the ", heads, " heads of k_cache");
  require(softcap >= 0, "softcap is ", softcap, ", want >= 0 (0 is off)");
  require(window >= 0, "window is ", window, ", want >= 0 (0 is off)");
  kv_lens.expect<int32_t>().expect_shape({kAny}).expect_contiguous();
  const int64_t segments = kv_lens.size(0);
  block_tables.expect<int32_t>().expect_shape({segments, kAny}).expect_packed_rows();
  const std::vector<float> sinks = sink_logits(sinks_, q);
  cpu::AttentionArgs args{
      .storage = storage_of(q),
      .tokens = tokens,
      .segments = segments,
      .q_heads = q.size(1),
      .kv_heads = heads,
      .dim = dim,
      .q = q.data(),
      .k = k.data(),
      .v = v.data(),
      .q_stride = q.stride(0),
      .k_stride = k.stride(0),
      .v_stride = v.stride(0),
      .q_head_stride = q.stride(1),
      .k_head_stride = k.stride(1),
      .v_head_stride = v.stride(1),
      .k_cache = k_cache.data(),
      .v_cache = v_cache.data(),
      .blocks = k_cache.size(0),
      .block_size = k_cache.size(1),
      .slots = vector_of<int64_t>(slots, tokens),
      .cu_q = vector_of<int32_t>(cu_q, segments + 1),
      .kv_lens = kv_lens.as<int32_t>(),
      .block_tables = block_tables.as<int32_t>(),
      .table_stride = block_tables.stride(0),
      .scale = scale,
      .softcap = softcap,
      .window = window,
      .sinks = sinks.empty() ? nullptr : sinks.data(),
      .spans = 0,
      .shared_spans = nullptr,
      .shared_lens = nullptr,
      .out = out.data(),
  };
  check_slots(args);
  check_segments(args, block_tables.size(1));
  if (!shared_spans_.is_none()) {
    const TensorView spans(shared_spans_, "shared spans"), lens(shared_lens_, "shared lens");
    spans.expect<int32_t>().expect_shape({kAny, 2}).expect_contiguous();
    args.spans = spans.size(0);
    args.shared_spans = spans.as<int32_t>();
    args.shared_lens = vector_of<int32_t>(lens, args.spans);
    while (args.spans > 0 && args.shared_spans[2 * args.spans - 1] == 0) --args.spans;  // padding
    check_shared(args);
  }
  const py::gil_scoped_release unlocked;
  cpu::kernels().paged_attention(args);
}

// Copying pair after pair must give the same as reading every source before writing any target.
void check_copies(const TensorView& copies) {
  std::unordered_set<int32_t> targets;
  for (int64_t i = 0; i < copies.size(0); ++i) {
    const int32_t source = copies.as<int32_t>()[2 * i], target = copies.as<int32_t>()[2 * i + 1];
    require(!targets.contains(source), "copies[", i, "]: source block ", source,
            " is the target of an earlier pair");
    require(targets.insert(target).second, "copies[", i, "]: target block ", target,
            " is the target of an earlier pair");
  }
}

void copy_blocks(py::handle cache_, py::handle copies_) {
  const TensorView cache(cache_, "cache"), copies(copies_, "copies");
  cache.expect_float32_or_bfloat16().expect_contiguous();
  copies.expect<int32_t>().expect_shape({kAny, 2}).expect_contiguous();
  require(cache.ndim() > 1, "cache: want [blocks, ...], got shape ", cache.shape_text());
  check_indices<int32_t>(copies, cache.size(0), "blocks");
  check_copies(copies);
  if (copies.size(0) == 0) return;
  const int64_t bytes = cache.numel() / cache.size(0) * (cache.is_bfloat16() ? 2 : 4);
  const py::gil_scoped_release unlocked;
  cpu::copy_blocks(cache.data(), bytes, copies.as<int32_t>(), copies.size(0));
}

void group_advantages(py::handle rewards, py::handle group_ids, const std::string& center,
                      const std::string& scale, py::handle lengths, double eps, int64_t ddof,
                      py::handle valid, py::handle out) {
  const AdvantageArgs args = advantage_args({rewards, "rewards"}, group_ids, center, scale, lengths,
                                            eps, ddof, valid, out, Device::kCpu);
  const py::gil_scoped_release unlocked;
  cpu::group_advantages(args);
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("isa", [] { return cpu::kernels().isa; });
  m.def("supported_isas", &cpu::supported_isas);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));
  m.def("num_threads", &cpu::num_threads);
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("count"));
  m.def(
      "share_openmp",
      [](std::uintptr_t address) {
        cpu::share_openmp(reinterpret_cast<cpu::OpenMpParallel>(address));
      },
      py::arg("gomp_parallel"));
  m.def("shares_openmp", &cpu::shares_openmp);
  m.def("sample", &sample, py::arg("logits"), py::arg("sample_rows"), py::arg("temperatures"),
        py::arg("top_ks"), py::arg("top_ps"), py::arg("min_ps"), py::arg("uniforms"),
        py::arg("ban_rows"), py::arg("ban_ids"), py::arg("out_tokens"), py::arg("out_logprobs"),
        py::arg("out_kept"));
  m.def("paged_attention", &paged_attention, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"), py::arg("cu_q"),
        py::arg("kv_lens"), py::arg("block_tables"), py::arg("scale"), py::arg("softcap"),
        py::arg("window"), py::arg("sinks"), py::arg("shared_spans"), py::arg("shared_lens"),
        py::arg("out"));
  m.def("copy_blocks", &copy_blocks, py::arg("cache"), py::arg("copies"));
  m.def("group_advantages", &group_advantages, py::arg("rewards"), py::arg("group_ids"),
        py::arg("center"), py::arg("scale"), py::arg("lengths"), py::arg("eps"), py::arg("ddof"),
        py::arg("valid"), py::arg("out"));
}

}  // namespace eapo
