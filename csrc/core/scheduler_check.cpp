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
  holds(row.planned == 0 || pending_, "planned without a step");
  check_kv(row);
  if (row.done()) {
    holds(!row.has_kv() && row.place == Place::kNone, "finished, but holds blocks or a place");
    holds(!row.finish_reason.empty(), "finished without a reason");
    return;
  }
  const bool dormant = !row.group->forked && row.group->leader() != &row;
  holds(std::ranges::count(row.group->members, &row) == 1, "missing in its group");
  holds((row.place == Place::kNone) == dormant, "in no queue, or in one too early");
  holds(row.computed < row.length() && row.computed + row.planned <= row.length(),
        "computed more than it has");
  holds(row.in_batch() == (row.state == State::kPrefill || row.state == State::kRunning),
        "its state disagrees with its slot");
  holds(row.planned == 0 || row.in_batch(), "planned without a slot");
}

void Scheduler::check_kv(const Sequence& row) const {
  const auto holds = [&](bool ok, const char* what) {
    ensure(ok, "sequence ", row.id, ": ", what);
  };
  const KvPool& pool = kv_.pool();
  const int size = pool.block_size(), held = static_cast<int>(row.blocks.size());
  holds(held == pool.blocks_for(row.computed + row.planned), "blocks don't fit its KV");
  holds(row.published <= row.computed / size, "published more than it computed");
  for (int at = 0; at < row.published; ++at) {
    const BlockId block = row.blocks[at];
    holds(pool.published(block) && pool.index().epoch(block) == row.epoch &&
              pool.index().parent(block) == (at == 0 ? kNoBlock : row.blocks[at - 1]) &&
              std::ranges::equal(pool.index().tokens(block),
                                 std::span(row.tokens).subspan(at * size, size)),
          "holds a published block of other tokens");
  }
  if (row.host_blocks.empty()) return;
  const int host_end = row.host_begin + static_cast<int>(row.host_blocks.size());
  holds(row.host_begin >= held, "blocks overlap those on the host");
  holds(pool.blocks_for(row.host_tokens) == host_end && row.host_tokens < row.length(),
        "host blocks don't fit its swapped-out tokens");
}

void Scheduler::check_places() const {
  std::map<Place, std::size_t> counts;
  std::size_t parked_with_blocks = 0;
  for (const auto& [id, row] : rows_) {
    ++counts[row->place];
    const bool holds = row->place == Place::kParked && !row->blocks.empty();
    parked_with_blocks += holds;
    ensure(!holds || parked_.contains(row.get()) != parked_sharing_.contains(row.get()),
           "parked sequence ", id, " cannot give blocks");
  }
  ensure(counts[Place::kBatch] == batch_.size() && counts[Place::kReady] == ready_.size() &&
             counts[Place::kInjected] == injected_.size() &&
             counts[Place::kWaiting] == waiting_.size() &&
             counts[Place::kParked] == static_cast<std::size_t>(num_parked_) &&
             parked_with_blocks == parked_.size() + parked_sharing_.size(),
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
  const KvPool& pool = kv_.pool();
  std::vector<int> refs(pool.num_blocks(), 0);
  std::size_t on_host = 0;
  for (const auto& [id, row] : rows_) {
    for (const BlockId block : row->blocks) ++refs[block];
    on_host += row->host_blocks.size();
  }
  for (BlockId block = 0; block < pool.num_blocks(); ++block) {
    const int counted = pool.ref_count(block);
    ensure(refs[block] == counted, "block ", block, " is in ", refs[block], " tables but has ",
           counted, " references");
  }
  ensure(static_cast<int>(on_host) == pool.host_blocks() - pool.num_host_free(), on_host,
         " host blocks are in tables, ", pool.num_host_free(), " of ", pool.host_blocks(),
         " are free");
  pool.check();
}

}  // namespace eapo
