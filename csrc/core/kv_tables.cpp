#include "kv_tables.h"

#include <algorithm>
#include <span>
#include <utility>

namespace eapo {

KvTables::KvTables(std::shared_ptr<KvPool> pool, bool prefix_cache)
    : pool_(std::move(pool)), prefix_cache_(prefix_cache) {}

bool KvTables::writes_shared_block(const Sequence& row) const {
  return row.computed % pool_->block_size() != 0 && pool_->ref_count(row.blocks.back()) > 1;
}

int KvTables::blocks_alone(const Sequence& row) const {
  const auto shared = [&](BlockId block) { return pool_->ref_count(block) > 1; };
  return static_cast<int>(std::ranges::find_if(row.blocks.rbegin(), row.blocks.rend(), shared) -
                          row.blocks.rbegin());
}

// Only a row that ends at a published block, all of it of this epoch, can go on with another one.
bool KvTables::looks_up(const Sequence& row) const {
  return prefix_cache_ && row.computed == row.published * pool_->block_size() &&
         (!row.has_kv() || row.epoch == pool_->epoch());
}

Prefix KvTables::find_prefix(const Sequence& row) const {
  Prefix prefix{.tokens = row.computed};
  const int size = pool_->block_size();
  if (row.pending() > size && looks_up(row)) {
    BlockId parent = row.blocks.empty() ? kNoBlock : row.blocks.back();
    for (; prefix.tokens + size < row.length(); prefix.tokens += size) {
      parent = pool_->find(parent, std::span(row.tokens).subspan(prefix.tokens, size));
      if (parent == kNoBlock) break;
      prefix.hits.push_back(parent);
      prefix.free_hits += pool_->ref_count(parent) == 0;
    }
  }
  if (!row.host_blocks.empty() && row.host_begin * size <= prefix.tokens) {
    prefix.tokens = std::max(prefix.tokens, row.host_tokens);
  }
  return prefix;
}

int KvTables::shortfall(const Sequence& row, const Prefix& prefix, int end) const {
  const int held = static_cast<int>(row.blocks.size() + prefix.hits.size());
  const int fresh = pool_->blocks_for(end) - held + (writes_shared_block(row) ? 1 : 0);
  return fresh + prefix.free_hits - pool_->num_free();
}

int KvTables::reachable(const Sequence& row, const Prefix& prefix) const {
  const int fresh = pool_->num_free() - prefix.free_hits - (writes_shared_block(row) ? 1 : 0);
  const int held = static_cast<int>(row.blocks.size() + prefix.hits.size());
  return fresh < 0 ? row.computed : (held + fresh) * pool_->block_size();
}

int KvTables::stop(const Sequence& row, const Prefix& prefix) const {
  const int resumes = row.host_begin * pool_->block_size();
  return !row.host_blocks.empty() && resumes > prefix.tokens ? resumes : row.length();
}

void KvTables::take_hits(Sequence& row, const Prefix& prefix) {
  for (const BlockId block : prefix.hits) {
    pool_->take(block);
    row.blocks.push_back(block);
    row.computed += pool_->block_size();
    ++row.published;
    const bool swapped = !row.host_blocks.empty() &&
                         row.host_begin == static_cast<int>(row.blocks.size()) - 1;
    if (!swapped) continue;
    pool_->release_host(row.host_blocks.back());  // not read by this step: the hit serves instead
    row.host_blocks.pop_back();
    ++row.host_begin;
  }
  totals_.hit_tokens += static_cast<std::int64_t>(prefix.hits.size()) * pool_->block_size();
}

void KvTables::swap_in(Sequence& row) {
  while (!row.host_blocks.empty() && row.host_begin * pool_->block_size() == row.computed) {
    const BlockId host = row.host_blocks.back(), block = pool_->allocate();
    moves_.swap_in.insert(moves_.swap_in.end(), {host, block});
    withheld_host_.push_back(host);
    row.host_blocks.pop_back();
    ++row.host_begin;
    row.blocks.push_back(block);
    row.computed = std::min(row.host_begin * pool_->block_size(), row.host_tokens);
    ++totals_.swapped_in_blocks;
  }
}

void KvTables::extend(Sequence& row, const Prefix& prefix, int end) {
  if (!row.has_kv()) row.epoch = pool_->epoch();
  take_hits(row, prefix);
  swap_in(row);
  if (writes_shared_block(row)) {
    const BlockId source = row.blocks.back();
    row.blocks.back() = pool_->allocate();
    moves_.copies.insert(moves_.copies.end(), {source, row.blocks.back()});
    copied_from_.push_back(source);
    pool_->release(source);
    ++totals_.copied_blocks;
  }
  for (int have = static_cast<int>(row.blocks.size()); have < pool_->blocks_for(end); ++have) {
    row.blocks.push_back(pool_->allocate());
  }
}

// A row writes to blocks that it alone owns, so giving up its copy of a published block frees it.
void KvTables::publish(Sequence& row) {
  if (!prefix_cache_ || row.epoch != pool_->epoch()) return;
  const int size = pool_->block_size();
  for (; row.published < row.computed / size; ++row.published) {
    const int at = row.published;
    BlockId& own = row.blocks[at];
    const BlockId block = pool_->publish(own, at == 0 ? kNoBlock : row.blocks[at - 1],
                                         std::span(row.tokens).subspan(at * size, size));
    if (block == own) continue;
    pool_->take(block);
    pool_->release(own);
    own = block;
  }
}

bool KvTables::swap_out(Sequence& row, int index) {
  const bool adjoins = row.host_blocks.empty() || row.host_begin == index + 1;
  if (!adjoins || pool_->ref_count(row.blocks[index]) > 1) return false;
  const auto host = pool_->allocate_host();
  if (!host) return false;
  if (row.host_blocks.empty()) row.host_tokens = row.computed;
  row.host_blocks.push_back(*host);
  row.host_begin = index;
  moves_.swap_out.insert(moves_.swap_out.end(), {row.blocks[index], *host});
  ++totals_.swapped_out_blocks;
  return true;
}

void KvTables::cut(Sequence& row, int keep, bool swap) {
  for (int at = static_cast<int>(row.blocks.size()) - 1; at >= keep; --at) {
    if (swap) swap_out(row, at);
    pool_->release(row.blocks.back());
    row.blocks.pop_back();
    row.computed = std::min(row.computed, at * pool_->block_size());
  }
  row.published = std::min(row.published, keep);
}

void KvTables::drop(Sequence& row) {
  for (const BlockId host : row.host_blocks) pool_->release_host(host);
  row.host_blocks.clear();
  cut(row, 0, false);
}

KvTables::Moves KvTables::end_plan() {
  for (const BlockId host : withheld_host_) pool_->release_host(host);
  withheld_host_.clear();
  copied_from_.clear();
  return std::exchange(moves_, {});
}

void KvTables::fork(const Sequence& leader, Sequence& member) {
  for (const BlockId block : leader.blocks) pool_->take(block);
  member.blocks = leader.blocks;
  member.computed = leader.computed;
  member.published = leader.published;
  member.epoch = leader.epoch;
  totals_.shared_blocks += static_cast<std::int64_t>(member.blocks.size());
}

}  // namespace eapo
