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
  admit_resumed(true);
  admit_resumed(false);
  plan_batch_prefill(true);
  admit_prompts();
  emit_block_tables();
  kv_.end_plan();
  pending_ = true;
  return std::move(step_);
}

Sequence* Scheduler::oldest_runnable() const {
  Sequence* oldest = batch_.empty() ? nullptr : batch_.front();
  for (const auto* queue : {&ready_, &waiting_}) {
    if (queue->empty()) continue;
    Sequence* const first = *queue->begin();
    if (oldest == nullptr || first->id < oldest->id) oldest = first;
  }
  return oldest;
}

void Scheduler::plan_oldest(Sequence& row) {
  if (!row.in_batch()) {
    if (batch_full()) preempt(*batch_.back());
    kv_.attach_prompt(row);
    admit(row);
  }
  schedule(row, std::min(row.pending(), budget_ - decode_rows_besides(row)), row.id);
  ensure(row.planned > 0, "the oldest sequence ", row.id, " cannot progress: ", kv_.num_free(),
         " of ", kv_.num_blocks(), " blocks are free");
}

int Scheduler::decode_rows_besides(const Sequence& row) const {
  return static_cast<int>(std::ranges::count_if(
      batch_, [&](const Sequence* other) { return other != &row && other->pending() == 1; }));
}

// A row takes blocks from newer ones only, so the batch shrinks behind the loop's position.
void Scheduler::plan_decode_rows() {
  for (std::size_t at = 0; at < batch_.size(); ++at) {
    Sequence& row = *batch_[at];
    if (row.planned == 0 && row.pending() == 1) schedule(row, 1, row.id);
  }
}

void Scheduler::plan_batch_prefill(bool prompts) {
  for (std::size_t at = 0; at < batch_.size() && budget_ > 0; ++at) {
    Sequence& row = *batch_[at];
    if (row.planned > 0 || row.pending() == 1 || row.group->forked == prompts) continue;
    schedule(row, std::min(row.pending(), budget_), row.id);
  }
}

void Scheduler::admit_resumed(bool injected) {
  for (auto next = ready_.begin(); next != ready_.end() && budget_ > 0 && !batch_full();) {
    Sequence& row = **next++;
    if (row.injected() != injected) continue;
    if (!make_room(row)) return;
    admit(row);
    schedule(row, std::min(row.pending(), budget_), kParkedOnly);
  }
}

void Scheduler::admit_prompts() {
  while (!waiting_.empty() && budget_ > 0 && !batch_full()) {
    Sequence& row = **waiting_.begin();
    if (!make_room(row)) return;
    admit(row);
    schedule(row, std::min(row.pending(), budget_), kParkedOnly);
  }
}

// Whether a row outside the batch fits as a whole. An injected row may displace parked KV; others
// only while the batch is less than half full (idle compute costs more than lost KV), and in a
// fuller batch they leave one block for every row in it, lest admission cause preemption.
bool Scheduler::make_room(Sequence& row) {
  kv_.attach_prompt(row);
  const bool eager = row.injected() || 2 * static_cast<int>(batch_.size()) < max_batch_;
  if (eager) return reclaim(row, row.length(), kParkedOnly);
  return kv_.shortfall(row, row.length()) + static_cast<int>(batch_.size()) <= 0;
}

void Scheduler::admit(Sequence& row) {
  leave(row);
  enter(row, Place::kBatch, row.pending() > 1 ? State::kPrefill : State::kRunning);
}

// The slot is lost, the KV stays until somebody needs it.
void Scheduler::preempt(Sequence& row) {
  ++preemptions_;
  leave(row);
  enter(row, Place::kReady, State::kPreempted);
}

// Plans `count` tokens, or as many as there are blocks for; none if there is no block.
void Scheduler::schedule(Sequence& row, int count, SeqId newer_than) {
  int end = row.computed + count;
  if (!reclaim(row, end, newer_than)) end = std::min(end, kv_.reachable(row));
  if (end <= row.computed) return;
  kv_.extend(row, end, step_.copies);
  emit(row, end - row.computed);
}

// Frees blocks until `row` can reach `end`; returns whether it can.
bool Scheduler::reclaim(const Sequence& row, int end, SeqId newer_than) {
  if (kv_.shortfall(row, end) <= 0) return true;
  std::vector<Sequence*> victims(parked_.rbegin(), parked_.rend());
  const std::vector<Sequence*> newer = victims_newer_than(newer_than);
  victims.insert(victims.end(), newer.begin(), newer.end());
  for (const bool shared : {false, true}) reclaim_from(victims, row, end, shared);
  return kv_.shortfall(row, end) <= 0;
}

std::vector<Sequence*> Scheduler::victims_newer_than(SeqId id) const {
  std::vector<Sequence*> victims;
  const auto add = [&](Sequence* row) {
    if (row->id > id && row->planned == 0 && !row->blocks.empty()) victims.push_back(row);
  };
  std::ranges::for_each(batch_, add);
  std::ranges::for_each(ready_, add);
  std::ranges::sort(victims, [](const Sequence* a, const Sequence* b) { return a->id > b->id; });
  return victims;
}

void Scheduler::reclaim_from(std::span<Sequence* const> victims, const Sequence& row, int end,
                             bool shared) {
  for (Sequence* const victim : victims) {
    if (kv_.shortfall(row, end) <= 0) return;
    if (kv_.trim(*victim, row, end, shared) && victim->in_batch()) preempt(*victim);
  }
}

}  // namespace eapo
