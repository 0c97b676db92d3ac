#include <algorithm>

#include "scheduler.h"

namespace eapo {

void Scheduler::begin_step() {
  step_ = StepPlan{};
  budget_ = config_.max_step_tokens;
  supply_ = {};
  parked_exhausted_ = false;
  victim_groups_.clear();
  ++plans_;
}

void Scheduler::emit_step() {
  const auto decodes = [](const Sequence* row) { return row->planned == 1 && row->group->forked; };
  const auto others = std::ranges::stable_partition(planned_, decodes).begin();
  std::ranges::sort(planned_.begin(), others, ById{});
  const auto tokens = static_cast<std::size_t>(config_.max_step_tokens - budget_);
  for (auto* array : {&step_.input_ids, &step_.positions, &step_.slots}) array->reserve(tokens);
  step_.cu_q.push_back(0);
  for (Sequence* const row : planned_) emit(*row);
  emit_block_tables();
  emit_shared_spans();
  KvTables::Moves moves = kv_.end_plan();
  step_.swap_out = std::move(moves.swap_out);
  step_.swap_in = std::move(moves.swap_in);
  step_.copies = std::move(moves.copies);
}

void Scheduler::emit(Sequence& row) {
  const bool decodes = row.group->forked && row.pending() == 1;
  (decodes ? decode_tokens_ : prefill_tokens_) += row.planned;
  const int end = row.computed + row.planned;
  emit_tokens(row);
  step_.seqs.push_back(row.id);
  step_.cu_q.push_back(step_.cu_q.back() + row.planned);
  step_.kv_lens.push_back(end);
  step_.max_q_len = std::max(step_.max_q_len, row.planned);
  step_.max_kv_len = std::max(step_.max_kv_len, end);
  if (end == row.length()) emit_samples(row);
}

void Scheduler::emit_tokens(const Sequence& row) {
  const int size = kv_.pool().block_size();
  for (int at = row.computed; at < row.computed + row.planned; ++at) {
    step_.input_ids.push_back(row.tokens[at]);
    step_.positions.push_back(at);
    step_.slots.push_back(std::int64_t{row.blocks[at / size]} * size + at % size);
  }
}

// All first tokens of a group come from the one row of logits behind its prompt.
void Scheduler::emit_samples(Sequence& row) {
  const auto logits_row = static_cast<int>(step_.logits_rows.size());
  step_.logits_rows.push_back(static_cast<std::int64_t>(step_.input_ids.size()) - 1);
  if (row.group->forked) return emit_sample(row, logits_row);
  for (Sequence* const member : row.group->members) emit_sample(*member, logits_row);
}

void Scheduler::emit_sample(Sequence& row, int logits_row) {
  const SamplingSpec& sampling = row.group->sampling;
  const std::vector<TokenId>& banned = row.ban_next();
  step_.ban_rows.insert(step_.ban_rows.end(), banned.size(),
                        static_cast<std::int32_t>(samples_.size()));
  step_.ban_ids.insert(step_.ban_ids.end(), banned.begin(), banned.end());
  step_.sample_rows.push_back(logits_row);
  step_.sample_seqs.push_back(row.id);
  step_.uniforms.push_back(row.uniform());
  step_.temperatures.push_back(sampling.temperature_at(row.policy_tokens));
  step_.top_ks.push_back(sampling.top_k);
  step_.top_ps.push_back(sampling.top_p);
  step_.min_ps.push_back(sampling.min_p);
  samples_.push_back(&row);
}

void Scheduler::emit_block_tables() {
  std::size_t width = 0;
  for (const Sequence* row : planned_) width = std::max(width, row->blocks.size());
  step_.table_width = static_cast<int>(width);
  step_.block_tables.assign(planned_.size() * width, 0);
  auto out = step_.block_tables.begin();
  for (const Sequence* row : planned_) {
    std::ranges::copy(row->blocks, out);
    out += static_cast<std::ptrdiff_t>(width);
  }
}

// Of neighbours that decode for one group, as many as begin with the same full blocks. Blocks with
// several owners are never written to, so the step's own tokens are behind them.
void Scheduler::emit_shared_spans() {
  const auto full = [&](const Sequence& row) {
    return static_cast<std::size_t>(row.computed / kv_.pool().block_size());
  };
  for (std::size_t first = 0, next; first < planned_.size(); first = next) {
    const Sequence& row = *planned_[first];
    next = first + 1;
    if (row.planned > 1 || row.prompt_length < kv_.pool().block_size()) continue;
    std::size_t common = full(row);
    for (; next < planned_.size(); ++next) {
      const Sequence& other = *planned_[next];
      if (other.group != row.group || other.planned > 1) break;
      const auto limit = static_cast<std::ptrdiff_t>(std::min(common, full(other)));
      const auto differs = std::mismatch(row.blocks.begin(), row.blocks.begin() + limit,
                                         other.blocks.begin()).first;
      if (differs == row.blocks.begin()) break;
      common = static_cast<std::size_t>(differs - row.blocks.begin());
    }
    if (next == first + 1) continue;
    step_.shared_spans.push_back(static_cast<std::int32_t>(first));
    step_.shared_spans.push_back(static_cast<std::int32_t>(next - first));
    step_.shared_lens.push_back(static_cast<std::int32_t>(common) * kv_.pool().block_size());
  }
}

}  // namespace eapo
