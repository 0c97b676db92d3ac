#include <algorithm>
#include <tuple>

#include "scheduler.h"

namespace eapo {

// Frees blocks until `row` can hold `end` tokens; returns whether it can. If not, nobody gives up
// anything.
bool Scheduler::reclaim(const Sequence& row, const Prefix& prefix, int end, Victims victims) {
  const int missing = kv_.shortfall(row, prefix, end);
  if (missing <= 0) return true;
  if (!find_cuts(row, prefix, missing, victims)) return false;
  carry_out_cuts();
  return true;
}

// Blocks of parked rows that nobody else owns, counted up to `wanted`. The count goes on from one
// call to the next of a plan: cuts come from its beginning.
int Scheduler::parked_supply(int wanted, bool kept) {
  if (supply_.kept != kept) supply_ = {.kept = kept};
  auto next = supply_.last == nullptr ? parked_.begin() : parked_.upper_bound(supply_.last);
  for (; next != parked_.end() && supply_.blocks < wanted; ++next) {
    if (!kept && keeps(**next)) break;
    supply_.last = *next;
    supply_.blocks += kv_.blocks_alone(**next);
  }
  return supply_.blocks;
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
    if (cuts_.enough() || (!kept && keeps(*row))) break;
    cuts_.add(*row);
  }
  cuts_.deepen();
  for (Sequence* const row : parked_sharing_) {
    if (cuts_.enough() || (!kept && keeps(*row))) break;
    cuts_.add_all(*row);
  }
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
    if (row.place == Place::kParked) {
      const int given = static_cast<int>(row.blocks.size()) - cut.keep;
      supply_.blocks = std::max(0, supply_.blocks - given);
    }
    kv_.cut(row, cut.keep, row.state == State::kParked || row.state == State::kInjected);
    if (row.in_batch()) preempt(row);
    if (row.place == Place::kParked) {
      remove_parked(row);
      file_parked(row);
    }
  }
}

// Rows that own no block alone stand aside, lest every search begin with thousands of them. Some
// may come to own one while they do; they still give before any running row does.
void Scheduler::file_parked(Sequence& row) {
  if (row.blocks.empty()) return;
  (kv_.blocks_alone(row) > 0 ? parked_ : parked_sharing_).insert(&row);
}

void Scheduler::remove_parked(Sequence& row) {
  if (parked_.erase(&row) == 0) parked_sharing_.erase(&row);
}

}  // namespace eapo
