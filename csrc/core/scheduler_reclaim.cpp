#include <algorithm>
#include <tuple>

#include "scheduler.h"

namespace eapo {

// Frees blocks until `row` can hold `end` tokens, provided that `margin` blocks more could be
// freed; returns whether it can. If not, nobody gives up anything.
bool Scheduler::reclaim(const Sequence& row, const Prefix& prefix, int end, int margin,
                        Victims victims) {
  const int missing = kv_.shortfall(row, prefix, end);
  if (missing + margin <= 0) return true;
  if (!find_cuts(row, prefix, missing + margin, victims)) return false;
  if (missing <= 0) return true;
  if (margin > 0) find_cuts(row, prefix, missing, victims);
  carry_out_cuts();
  return true;
}

// A row that would have to copy a block is served as well if the other owners let go of it.
bool Scheduler::find_cuts(const Sequence& row, const Prefix& prefix, int target, Victims victims) {
  cuts_.begin(kv_.pool(), target);
  cuts_.pin(prefix.hits);
  cuts_.pin(kv_.copy_sources());
  if (kv_.writes_shared_block(row)) cuts_.want_alone(row.blocks.back());
  if (!parked_exhausted_) {
    cut_parked(victims.kept);
    parked_exhausted_ = victims.kept && cuts_.freed() == 0;
  }
  if (!cuts_.enough() && victims.newer_than != kParkedOnly) cut_newer_than(victims.newer_than);
  return cuts_.enough();
}

void Scheduler::cut_parked(bool kept) {
  for (Sequence* const row : parked_) {
    if (cuts_.enough()) return;
    if (!kept && keeps(*row)) break;
    cuts_.add(*row);
  }
  cuts_.deepen();
}

// Holding m of K blocks for a wait costs m / K of the machine during it, computing them again takes
// m / K of the time that the whole pool takes. So keep while the wait is shorter than that.
bool Scheduler::keeps(const Sequence& parked) const {
  const auto capacity = static_cast<double>(kv_.pool().capacity());
  return prefill_rate_ == 0 || parked.expected_wait < capacity / prefill_rate_;
}

void Scheduler::cut_newer_than(SeqId id) {
  for (const Group* const group : victim_groups()) {
    for (auto at = group->members.rbegin(); at != group->members.rend(); ++at) {
      if (cuts_.enough()) return;
      Sequence& row = **at;
      const bool parked = row.place == Place::kParked;
      if (row.id > id && row.planned == 0 && !parked && !row.blocks.empty()) cuts_.add(row);
    }
  }
  cuts_.deepen();
}

// The group begun last comes first; of those begun together the one with most unfinished rows, as a
// group is of use only when it is complete.
const std::vector<Group*>& Scheduler::victim_groups() {
  if (victim_groups_.empty()) {
    victim_groups_ = groups_;
    const auto rank = [](const Group* group) {
      return std::tuple(group->begun_at, group->members.size(), group->leader()->id);
    };
    std::ranges::sort(victim_groups_, std::ranges::greater{}, rank);
  }
  return victim_groups_;
}

// KV of a row that waits for its turn is worth a place in host memory; that of a row which computes
// now would go there and back within a few steps.
void Scheduler::carry_out_cuts() {
  for (const CutPlan::Cut& cut : cuts_.cuts()) {
    Sequence& row = *cut.row;
    kv_.cut(row, cut.keep, row.state == State::kParked || row.state == State::kInjected);
    if (row.in_batch()) preempt(row);
    if (row.place == Place::kParked && row.blocks.empty()) parked_.erase(&row);
  }
}

}  // namespace eapo
