#include "kv_pool.h"

#include <algorithm>

namespace eapo {

bool KvPool::writes_shared_block(const Sequence& row) const {
  return row.computed % block_size() != 0 && allocator_.ref_count(row.blocks.back()) > 1;
}

int KvPool::blocks_needed(const Sequence& row, int end) const {
  return blocks_for(end) - static_cast<int>(row.blocks.size()) + (writes_shared_block(row) ? 1 : 0);
}

int KvPool::reachable(const Sequence& row) const {
  const int fresh = num_free() - (writes_shared_block(row) ? 1 : 0);
  return fresh < 0 ? row.computed : (static_cast<int>(row.blocks.size()) + fresh) * block_size();
}

void KvPool::extend(Sequence& row, int end, std::vector<BlockId>& copies) {
  if (writes_shared_block(row)) {
    const BlockId source = row.blocks.back();
    row.blocks.back() = allocator_.allocate();
    copies.insert(copies.end(), {source, row.blocks.back()});
    copied_from_.push_back(source);
    allocator_.release(source);
    ++blocks_copied_;
  }
  for (int have = static_cast<int>(row.blocks.size()); have < blocks_for(end); ++have) {
    row.blocks.push_back(allocator_.allocate());
  }
}

// All copies of a step may run at once, so no block may be source and destination in one step.
void KvPool::release(BlockId block) {
  const bool last = allocator_.ref_count(block) == 1;
  if (last && std::ranges::find(copied_from_, block) != copied_from_.end()) {
    withheld_.push_back(block);
  } else {
    allocator_.release(block);
  }
}

void KvPool::end_plan() {
  for (const BlockId block : withheld_) allocator_.release(block);
  withheld_.clear();
  copied_from_.clear();
}

bool KvPool::trim(Sequence& victim, const Sequence& row, int end, bool shared) {
  const std::size_t before = victim.blocks.size();
  while (!victim.blocks.empty() && shortfall(row, end) > 0) {
    if (!shared && allocator_.ref_count(victim.blocks.back()) > 1) break;
    release(victim.blocks.back());
    victim.blocks.pop_back();
  }
  const int held = static_cast<int>(victim.blocks.size()) * block_size();
  victim.computed = std::min(victim.computed, held);
  return victim.blocks.size() < before;
}

void KvPool::drop(Sequence& row) {
  for (const BlockId block : row.blocks) release(block);
  row.blocks.clear();
  row.computed = 0;
}

void KvPool::share(BlockId block, Sequence& row) {
  allocator_.share(block);
  row.blocks.push_back(block);
  ++blocks_shared_;
}

void KvPool::fork(const Sequence& leader, Sequence& member) {
  for (const BlockId block : leader.blocks) share(block, member);
  member.computed = leader.computed;
}

void KvPool::attach_prompt(Sequence& row) {
  const int full = row.prompt_length / block_size();
  const auto prompt_blocks = [&](const Sequence* member) {
    return std::min(full, member->computed / block_size());
  };
  const bool aligned = row.computed % block_size() == 0;
  if (!row.group->forked || !aligned || prompt_blocks(&row) >= full) return;
  const auto& members = row.group->members;
  const Sequence& donor = **std::ranges::max_element(members, {}, prompt_blocks);
  for (int at = prompt_blocks(&row); at < prompt_blocks(&donor); ++at) share(donor.blocks[at], row);
  row.computed = static_cast<int>(row.blocks.size()) * block_size();
}

}  // namespace eapo
