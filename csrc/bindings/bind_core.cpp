#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/block_allocator.h"
#include "core/error.h"
#include "core/keyed_draw.h"
#include "core/kv_pool.h"
#include "core/philox.h"
#include "core/scheduler.h"
#include "core/tag_matcher.h"
#include "core/vocabulary.h"

namespace py = pybind11;
using namespace py::literals;

namespace eapo {

namespace {

template <class T>
using Vector = py::array_t<T, py::array::c_style>;

template <class T>
py::array copy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class T>
std::span<const T> view(const Vector<T>& array, const char* name) {
  require(array.ndim() == 1, name, " must have 1 dimension, got ", array.ndim());
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// Any integer that 64 bits hold, signed or unsigned.
std::uint64_t to_u64(const py::int_& value, const char* name) {
  int overflow = 0;
  const long long narrow = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow == 0) return static_cast<std::uint64_t>(narrow);
  const std::uint64_t wide = PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    const auto text = py::str(value).cast<std::string>();
    throw InvalidArgument(join(name, " must fit 64 bits, got ", text));
  }
  return wide;
}

std::int64_t to_i64(const py::int_& value, const char* name) {
  return static_cast<std::int64_t>(to_u64(value, name));
}

std::vector<std::string> to_strings(const std::vector<py::bytes>& list) {
  return {list.begin(), list.end()};
}

void bind_random(py::module_& m) {
  m.def("philox4x32", [](PhiloxCounter counter, PhiloxKey key) {
    return py::tuple(py::cast(philox4x32(counter, key)));
  }, "counter"_a, "key"_a);
  m.def("keyed_uniform",
        [](const py::int_& seed, const std::string& purpose, const std::vector<py::int_>& indices) {
          std::vector<std::int64_t> words;
          words.reserve(indices.size());
          for (const py::int_& index : indices) words.push_back(to_i64(index, "an index"));
          return KeyedDraw(to_u64(seed, "seed"), purpose, words).uniform();
        },
        "seed"_a, "purpose"_a, "indices"_a);
}

void bind_allocator(py::module_& m) {
  py::register_exception<OutOfBlocks>(m, "OutOfBlocks", PyExc_RuntimeError);
  py::class_<BlockAllocator>(m, "BlockAllocator")
      .def(py::init<int, int>(), "num_blocks"_a, "block_size"_a)
      .def("allocate", &BlockAllocator::allocate)
      .def("reuse", &BlockAllocator::reuse, "block"_a)
      .def("share", &BlockAllocator::share, "block"_a)
      .def("release", &BlockAllocator::release, "block"_a, "keep"_a = false)
      .def("ref_count", &BlockAllocator::ref_count, "block"_a)
      .def("check", &BlockAllocator::check)
      .def_property_readonly("num_free", &BlockAllocator::num_free)
      .def_property_readonly("num_blocks", &BlockAllocator::num_blocks)
      .def_property_readonly("block_size", &BlockAllocator::block_size);
}

void bind_pool(py::module_& m) {
  py::class_<KvPool, std::shared_ptr<KvPool>>(m, "KvPool")
      .def(py::init<int, int, int>(), "num_blocks"_a, "block_size"_a, "host_blocks"_a = 0)
      .def("advance_epoch", &KvPool::advance_epoch)
      .def("check", &KvPool::check)
      .def_property_readonly("epoch", &KvPool::epoch)
      .def_property_readonly("num_blocks", &KvPool::num_blocks)
      .def_property_readonly("block_size", &KvPool::block_size)
      .def_property_readonly("num_free", &KvPool::num_free)
      .def_property_readonly("num_cached", &KvPool::num_published)
      .def_property_readonly("host_blocks", &KvPool::host_blocks)
      .def_property_readonly("num_host_free", &KvPool::num_host_free);
}

// Shared with schedulers and matchers, which never change it.
void bind_vocabulary(py::module_& m) {
  py::class_<Vocabulary, std::shared_ptr<Vocabulary>>(m, "Vocabulary")
      .def(py::init([](const std::vector<py::bytes>& token_bytes) {
             return std::make_shared<Vocabulary>(to_strings(token_bytes));
           }),
           "token_bytes"_a)
      .def("__len__", &Vocabulary::size);
}

void bind_matcher(py::module_& m) {
  py::class_<TagMatcher>(m, "TagMatcher")
      .def(py::init([](const std::vector<py::bytes>& patterns,
                       const std::shared_ptr<Vocabulary>& vocabulary) {
             return TagMatcher(to_strings(patterns), vocabulary);
           }),
           "patterns"_a, py::arg("vocabulary").none(false))
      .def_property_readonly("root", [](const TagMatcher&) { return TagMatcher::kRoot; })
      .def("advance",
           [](const TagMatcher& matcher, TagMatcher::Node state, TokenId token) {
             const auto step = matcher.advance(state, token);
             return py::make_tuple(step.state, step.pattern, step.overshoot);
           },
           "state"_a, "token"_a)
      .def("completing_tokens", &TagMatcher::completing_tokens, "state"_a);
}

// The arrays of a StepPlan look into it and keep it alive; nothing is copied.
template <class T>
py::array look(const py::object& owner, const std::vector<T>& values,
               std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape), values.data(), owner);
}

template <class T>
auto flat(std::vector<T> StepPlan::*field) {
  return [field](const py::object& self) {
    const auto& values = self.cast<const StepPlan&>().*field;
    return look(self, values, {static_cast<py::ssize_t>(values.size())});
  };
}

py::array block_tables(const py::object& self) {
  const auto& plan = self.cast<const StepPlan&>();
  return look(self, plan.block_tables, {plan.num_rows(), plan.table_width});
}

template <class T>
auto pairs(std::vector<T> StepPlan::*field) {
  return [field](const py::object& self) {
    const auto& values = self.cast<const StepPlan&>().*field;
    return look(self, values, {static_cast<py::ssize_t>(values.size() / 2), 2});
  };
}

void bind_plan(py::module_& m) {
  py::class_<StepPlan>(m, "StepPlan")
      .def_property_readonly("input_ids", flat(&StepPlan::input_ids))
      .def_property_readonly("positions", flat(&StepPlan::positions))
      .def_property_readonly("slots", flat(&StepPlan::slots))
      .def_property_readonly("seqs", flat(&StepPlan::seqs))
      .def_property_readonly("cu_q", flat(&StepPlan::cu_q))
      .def_property_readonly("kv_lens", flat(&StepPlan::kv_lens))
      .def_property_readonly("block_tables", block_tables)
      .def_property_readonly("swap_out", pairs(&StepPlan::swap_out))
      .def_property_readonly("swap_in", pairs(&StepPlan::swap_in))
      .def_property_readonly("copies", pairs(&StepPlan::copies))
      .def_property_readonly("shared_spans", pairs(&StepPlan::shared_spans))
      .def_property_readonly("shared_lens", flat(&StepPlan::shared_lens))
      .def_readonly("max_q_len", &StepPlan::max_q_len)
      .def_readonly("max_kv_len", &StepPlan::max_kv_len)
      .def_property_readonly("logits_rows", flat(&StepPlan::logits_rows))
      .def_property_readonly("sample_rows", flat(&StepPlan::sample_rows))
      .def_property_readonly("sample_seqs", flat(&StepPlan::sample_seqs))
      .def_property_readonly("uniforms", flat(&StepPlan::uniforms))
      .def_property_readonly("temperatures", flat(&StepPlan::temperatures))
      .def_property_readonly("top_ks", flat(&StepPlan::top_ks))
      .def_property_readonly("top_ps", flat(&StepPlan::top_ps))
      .def_property_readonly("min_ps", flat(&StepPlan::min_ps))
      .def_property_readonly("ban_rows", flat(&StepPlan::ban_rows))
      .def_property_readonly("ban_ids", flat(&StepPlan::ban_ids));
}

const char* kind_name(const Event& event) {
  return event.kind == Event::Kind::kFinished ? "finished" : "parked";
}

void bind_event(py::module_& m) {
  py::class_<Event>(m, "Event")
      .def_readonly("seq", &Event::seq)
      .def_property_readonly("kind", &kind_name)
      .def_readonly("pattern", &Event::pattern)
      .def_readonly("overshoot", &Event::overshoot)
      .def("__repr__", [](const Event& event) {
        return join("Event(seq=", event.seq, ", kind='", kind_name(event), "', pattern=",
                    event.pattern, ", overshoot=", event.overshoot, ")");
      });
}

int add_rules(Scheduler& scheduler, std::vector<TokenId> stop_token_ids,
              const std::vector<py::bytes>& stop_patterns,
              const std::vector<py::bytes>& park_patterns, std::vector<TokenId> banned_token_ids,
              const std::vector<py::bytes>& banned_patterns) {
  return scheduler.add_rules({std::move(stop_token_ids), to_strings(stop_patterns),
                              to_strings(park_patterns), std::move(banned_token_ids),
                              to_strings(banned_patterns)});
}

std::vector<SeqId> add_group(Scheduler& scheduler, const std::vector<TokenId>& prompt, int n,
                             int rules, int max_tokens, float temperature, int top_k, float top_p,
                             float min_p, const py::int_& seed, const py::int_& step,
                             const py::int_& prompt_id, std::vector<float> temperature_schedule) {
  return scheduler.add_group(prompt, n, rules,
                             {.max_tokens = max_tokens,
                              .temperature = temperature,
                              .top_k = top_k,
                              .top_p = top_p,
                              .min_p = min_p,
                              .seed = to_u64(seed, "seed"),
                              .step = to_i64(step, "step"),
                              .prompt_id = to_i64(prompt_id, "prompt_id"),
                              .temperature_schedule = std::move(temperature_schedule)});
}

std::vector<Event> commit(Scheduler& scheduler, const Vector<std::int64_t>& tokens,
                          const Vector<float>& logprobs, const Vector<float>& kept_mass) {
  const auto ids = view(tokens, "tokens");
  const auto scores = view(logprobs, "logprobs"), kept = view(kept_mass, "kept_mass");
  const py::gil_scoped_release unlocked;
  return scheduler.commit(ids, scores, kept);
}

py::dict bans(const Sequence& row) {
  std::vector<std::int32_t> positions;
  std::vector<TokenId> ids;
  for (const BanRun& run : row.ban_runs) {
    for (int at = run.begin; at < run.begin + run.count; ++at) {
      positions.insert(positions.end(), run.ids->size(), at);
      ids.insert(ids.end(), run.ids->begin(), run.ids->end());
    }
  }
  return py::dict("ban_positions"_a = copy(positions), "ban_ids"_a = copy(ids));
}

py::dict tokens(const Scheduler& scheduler, SeqId seq) {
  const Sequence& row = scheduler.sequence(seq);
  const std::vector<std::int64_t> ids(row.tokens.begin() + row.prompt_length, row.tokens.end());
  py::dict result = bans(row);
  result["token_ids"] = copy(ids);
  result["logprobs"] = copy(row.logprobs);
  result["kept_mass"] = copy(row.kept_mass);
  result["mask"] = copy(row.mask);
  result["finish_reason"] = row.finish_reason;
  return result;
}

py::dict stats(const Scheduler& scheduler) {
  const SchedulerStats now = scheduler.stats();
  return py::dict(
      "free_blocks"_a = now.free_blocks, "free_host_blocks"_a = now.free_host_blocks,
      "running"_a = now.running, "waiting"_a = now.waiting, "parked"_a = now.parked,
      "preemptions"_a = now.preemptions, "prefill_tokens"_a = now.prefill_tokens,
      "decode_tokens"_a = now.decode_tokens, "prefix_hit_tokens"_a = now.blocks.hit_tokens,
      "shared_blocks"_a = now.blocks.shared_blocks, "copied_blocks"_a = now.blocks.copied_blocks,
      "evicted_blocks"_a = now.evicted_blocks,
      "swapped_out_blocks"_a = now.blocks.swapped_out_blocks,
      "swapped_in_blocks"_a = now.blocks.swapped_in_blocks);
}

void bind_scheduler(py::module_& m) {
  py::class_<Scheduler>(m, "Scheduler")
      .def(py::init([](std::shared_ptr<KvPool> pool, const std::shared_ptr<Vocabulary>& vocabulary,
                       int max_batch, int max_step_tokens, int max_context, bool prefix_cache) {
             const SchedulerConfig config{max_batch, max_step_tokens, max_context, prefix_cache};
             return std::make_unique<Scheduler>(std::move(pool), vocabulary, config);
           }),
           py::arg("pool").none(false), py::arg("vocabulary").none(false), "max_batch"_a,
           "max_step_tokens"_a, "max_context"_a, "prefix_cache"_a = true)
      .def("add_rules", &add_rules, "stop_token_ids"_a = py::tuple(),
           "stop_patterns"_a = py::tuple(), "park_patterns"_a = py::tuple(),
           "banned_token_ids"_a = py::tuple(), "banned_patterns"_a = py::tuple())
      .def("add_group", &add_group, "prompt"_a, "n"_a, "rules"_a, "max_tokens"_a,
           "temperature"_a = 1.0F, "top_k"_a = 0, "top_p"_a = 1.0F, "min_p"_a = 0.0F, "seed"_a = 0,
           "step"_a = 0, "prompt_id"_a = 0, "temperature_schedule"_a = py::tuple())
      .def("plan", &Scheduler::plan, py::call_guard<py::gil_scoped_release>())
      .def("commit", &commit, "tokens"_a, "logprobs"_a, "kept_mass"_a)
      .def("inject",
           [](Scheduler& scheduler, SeqId seq, const std::vector<TokenId>& ids) {
             return scheduler.inject(seq, ids);
           },
           "seq"_a, "ids"_a)
      .def("finish", &Scheduler::finish, "seq"_a, "reason"_a)
      .def("set_rules", &Scheduler::set_rules, "seq"_a, "rules"_a)
      .def("expect_wait", &Scheduler::expect_wait, "seq"_a, "seconds"_a)
      .def("set_prefill_rate", &Scheduler::set_prefill_rate, "tokens_per_second"_a)
      .def("tokens", &tokens, "seq"_a)
      .def("release", &Scheduler::release, "seq"_a)
      .def("clear", &Scheduler::clear)
      .def("stats", &stats)
      .def("check", &Scheduler::check);
}

}  // namespace

void bind_core(py::module_& m) {
  bind_random(m);
  bind_allocator(m);
  bind_pool(m);
  bind_vocabulary(m);
  bind_matcher(m);
  bind_plan(m);
  bind_event(m);
  bind_scheduler(m);
}

}  // namespace eapo
