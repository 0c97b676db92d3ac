#include <algorithm>

#include "scheduler.h"

namespace eapo {

void Scheduler::begin_step() {
  step_ = StepPlan{};
  budget_ = config_.max_step_tokens;
  const auto tokens = static_cast<std::size_t>(std::min(budget_, 4096));
  for (auto* array : {&step_.input_ids, &step_.positions, &step_.slots}) array->reserve(tokens);
  step_.cu_q.push_back(0);
}

void Scheduler::emit(Sequence& row, int count) {
  const bool decodes = row.group->forked && row.pending() == 1;
  (decodes ? decode_tokens_ : prefill_tokens_) += count;
  row.planned = count;
  budget_ -= count;
  planned_.push_back(&row);
  emit_tokens(row, count);
  step_.seqs.push_back(row.id);
  step_.cu_q.push_back(step_.cu_q.back() + count);
  step_.kv_lens.push_back(row.computed + count);
  if (count == row.pending()) emit_samples(row);
}

void Scheduler::emit_tokens(const Sequence& row, int count) {
  const int size = kv_.block_size();
  for (int at = row.computed; at < row.computed + count; ++at) {
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
  step_.temperatures.push_back(sampling.temperature);
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

}  // namespace eapo
