#include <algorithm>
#include <utility>

#include "error.h"
#include "scheduler.h"

namespace eapo {

std::optional<StepPlan> Scheduler::plan() {
  ensure(!pending_, "plan() was called twice; commit() the first step before");
  Sequence* const oldest = oldest_runnable();
  if (oldest == nullptr) return std::nullopt;
  begin_step();
  plan_oldest(*oldest);
  plan_decode_rows();
  plan_batch_prefill(false);
  const bool room = admit_from(injected_) && admit_from(ready_);
  plan_batch_prefill(true);
  if (room) admit_from(waiting_);
  emit_step();
  pending_ = true;
  return std::move(step_);
}

Sequence* Scheduler::oldest_runnable() const {
  Sequence* oldest = batch_.empty() ? nullptr : batch_.front();
  for (const Queue* queue : {&injected_, &ready_, &waiting_}) {
    if (queue->empty()) continue;
    Sequence* const first = *queue->begin();
    if (oldest == nullptr || first->id < oldest->id) oldest = first;
  }
  return oldest;
}

void Scheduler::plan_oldest(Sequence& row) {
  if (!row.in_batch()) {
    if (batch_full()) preempt(*batch_.back());
    admit(row);
  }
  schedule(row, kv_.find_prefix(row), budget_ - decode_rows_besides(row), {row.id, true});
  ensure(row.planned > 0, "the oldest sequence ", row.id, " cannot progress: ",
         kv_.pool().num_free(), " of ", kv_.pool().num_blocks(), " blocks are free");
}

int Scheduler::decode_rows_besides(const Sequence& row) const {
  return static_cast<int>(std::ranges::count_if(
      batch_, [&](const Sequence* other) { return other != &row && other->pending() == 1; }));
}

// A row takes blocks from newer ones only, so the batch shrinks behind the loop's position.
void Scheduler::plan_decode_rows() {
  for (std::size_t at = 0; at < batch_.size(); ++at) {
    Sequence& row = *batch_[at];
    if (row.planned > 0 || row.pending() > 1) continue;
    schedule(row, Prefix{.tokens = row.computed}, 1, {row.id, true});
  }
}

void Scheduler::plan_batch_prefill(bool prompts) {
  for (std::size_t at = 0; at < batch_.size() && budget_ > 0; ++at) {
    Sequence& row = *batch_[at];
    if (row.planned > 0 || row.pending() == 1 || row.group->forked == prompts) continue;
    schedule(row, kv_.find_prefix(row), budget_, {row.id, true});
  }
}

// Plans up to `tokens` tokens behind the prefix, fewer if blocks are short; none if there is no
// block, and then the prefix is not taken either.
void Scheduler::schedule(Sequence& row, const Prefix& prefix, int tokens, Victims victims) {
  int end = std::min(prefix.tokens + tokens, kv_.stop(row, prefix));
  if (!reclaim(row, prefix, end, victims)) end = std::min(end, kv_.reachable(row, prefix));
  if (end <= prefix.tokens) return;
  kv_.extend(row, prefix, end);
  row.planned = end - row.computed;
  budget_ -= row.planned;
  planned_.push_back(&row);
}

// Admits rows until one finds no room; returns whether all found it, as far as slots and budget go.
bool Scheduler::admit_from(Queue& queue) {
  if (queue.empty() || budget_ == 0 || batch_full()) return true;
  growth_.clear();
  for (const Sequence* row : batch_) add_growth(*row);
  while (!queue.empty() && budget_ > 0 && !batch_full()) {
    Sequence& row = **queue.begin();
    const Prefix prefix = kv_.find_prefix(row);
    if (!make_room(row, prefix)) return false;
    admit(row);
    schedule(row, prefix, budget_, {kParkedOnly, false});
  }
  return true;
}

// Makes a row outside the batch fit as a whole, if it can. An injected row may displace parked KV;
// others may displace what should be kept only while the batch is less than a quarter full (idle
// compute costs more than lost KV), and need room for what they and the batch are expected to grow by, lest
// admission cause preemption.
bool Scheduler::make_room(const Sequence& row, const Prefix& prefix) {
  const bool injected = row.place == Place::kInjected;
  const bool kept = injected || 4 * static_cast<int>(batch_.size()) < max_batch_;
  add_growth(row);
  if (!injected) {
    const int wanted = kv_.shortfall(row, prefix, row.length()) + growth_.peak();
    if (wanted > 0 && parked_supply(wanted, kept) < wanted) return false;
  }
  return reclaim(row, prefix, row.length(), {kParkedOnly, kept});
}

// What is shared with siblings stays when the row ends.
void Scheduler::add_growth(const Sequence& row) {
  const KvPool& pool = kv_.pool();
  const int now = pool.blocks_for(row.length());
  const int growth = lengths_.expected_growth(row, pool.block_size());
  const int then = pool.blocks_for(std::min(row.length() + growth, max_context_));
  const bool alone = row.group->members.size() == 1;
  const int shared = alone ? 0 : row.prompt_length / pool.block_size();
  const int pending = row.in_batch() ? now - static_cast<int>(row.blocks.size()) : 0;
  growth_.add(pending, then - now, then - shared);
}

void Scheduler::admit(Sequence& row) {
  if (row.group->begun_at < 0) {
    row.group->begun_at = plans_;
    groups_.push_back(row.group.get());
  }
  leave(row);
  enter(row, Place::kBatch, row.pending() > 1 ? State::kPrefill : State::kRunning);
}

// The slot is lost, the KV stays until somebody needs it.
void Scheduler::preempt(Sequence& row) {
  ++preemptions_;
  leave(row);
  enter(row, Place::kReady, State::kPreempted);
}

}  // namespace eapo
