#include <algorithm>
#include <map>
#include <numeric>

#include "error.h"
#include "scheduler.h"

namespace eapo {

void Scheduler::check() const {
  for (const auto& [id, row] : rows_) check_row(*row);
  check_places();
  check_blocks();
}

void Scheduler::check_row(const Sequence& row) const {
  const auto holds = [&](bool ok, const char* what) {
    ensure(ok, "sequence ", row.id, ": ", what);
  };
  const auto after_prompt = static_cast<std::size_t>(row.position());
  holds(row.length() <= max_context_, "longer than the context");
  holds(row.mask.size() == after_prompt && row.logprobs.size() == after_prompt &&
            row.kept_mass.size() == after_prompt,
        "per-token records of different lengths");
  holds(std::accumulate(row.mask.begin(), row.mask.end(), 0) == row.policy_tokens,
        "policy tokens miscounted");
  holds(row.policy_tokens <= row.group->sampling.max_tokens, "more policy tokens than allowed");
  const int end = row.computed + row.planned;
  holds(static_cast<int>(row.blocks.size()) == kv_.blocks_for(end), "blocks don't fit its KV");
  holds(row.planned == 0 || pending_, "planned without a step");
  if (row.done()) {
    holds(row.blocks.empty() && row.place == Place::kNone, "finished, but holds blocks or a place");
    holds(!row.finish_reason.empty(), "finished without a reason");
    return;
  }
  const bool dormant = !row.group->forked && row.group->leader() != &row;
  holds(std::ranges::count(row.group->members, &row) == 1, "missing in its group");
  holds((row.place == Place::kNone) == dormant, "in no queue, or in one too early");
  holds(row.computed < row.length() && end <= row.length(), "computed more than it has");
  holds(row.in_batch() == (row.state == State::kPrefill || row.state == State::kRunning),
        "its state disagrees with its slot");
  holds(row.planned == 0 || row.in_batch(), "planned without a slot");
}

void Scheduler::check_places() const {
  std::map<Place, std::size_t> counts;
  for (const auto& [id, row] : rows_) ++counts[row->place];
  ensure(counts[Place::kBatch] == batch_.size() && counts[Place::kReady] == ready_.size() &&
             counts[Place::kWaiting] == waiting_.size() && counts[Place::kParked] == parked_.size(),
         "queues hold other rows than those that say so");
  ensure(static_cast<int>(batch_.size()) <= max_batch_, batch_.size(), " rows in a batch of ",
         max_batch_);
  ensure(std::ranges::is_sorted(batch_, ById{}), "the batch is not in order of age");
  const auto unfinished =
      std::ranges::count_if(rows_, [](const auto& entry) { return !entry.second->done(); });
  ensure(unfinished == unfinished_, unfinished, " rows are unfinished, the counter says ",
         unfinished_);
}

void Scheduler::check_blocks() const {
  std::vector<int> refs(kv_.num_blocks(), 0);
  for (const auto& [id, row] : rows_) {
    for (const BlockId block : row->blocks) ++refs[block];
  }
  for (BlockId block = 0; block < kv_.num_blocks(); ++block) {
    const int counted = kv_.allocator().ref_count(block);
    ensure(refs[block] == counted, "block ", block, " is in ", refs[block], " tables but has ",
           counted, " references");
  }
  kv_.allocator().check();
}

}  // namespace eapo
