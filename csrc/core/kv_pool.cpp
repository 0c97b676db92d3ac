#include "kv_pool.h"

#include <algorithm>
#include <numeric>

#include "error.h"

namespace eapo {

KvPool::KvPool(int num_blocks, int block_size, int host_blocks)
    : allocator_(num_blocks, block_size), index_(num_blocks, block_size) {
  require(host_blocks >= 0, "host_blocks must be >= 0, got ", host_blocks);
  host_used_.assign(host_blocks, 0);
  host_free_.resize(host_blocks);
  std::iota(host_free_.rbegin(), host_free_.rend(), 0);
}

BlockId KvPool::allocate() {
  const BlockId block = allocator_.allocate();
  if (index_.contains(block)) {
    evictions_ += index_.epoch(block) == epoch_;
    index_.remove(block);
  }
  return block;
}

void KvPool::take(BlockId block) {
  if (allocator_.ref_count(block) == 0) {
    allocator_.reuse(block);
  } else {
    allocator_.share(block);
  }
}

void KvPool::release(BlockId block) { allocator_.release(block, index_.contains(block)); }

BlockId KvPool::find(BlockId parent, std::span<const TokenId> tokens) const {
  return index_.find(parent, tokens, epoch_);
}

BlockId KvPool::publish(BlockId block, BlockId parent, std::span<const TokenId> tokens) {
  return index_.find_or_add(block, parent, tokens, epoch_);
}

std::optional<BlockId> KvPool::allocate_host() {
  if (host_free_.empty()) return std::nullopt;
  const BlockId block = host_free_.back();
  host_free_.pop_back();
  host_used_[block] = 1;
  return block;
}

void KvPool::release_host(BlockId block) {
  ensure(host_used_[block] != 0, "host block ", block, " is free already");
  host_used_[block] = 0;
  host_free_.push_back(block);
}

void KvPool::check() const {
  allocator_.check();
  std::vector<int> rank(num_blocks(), -1);  // in the free list
  int next_rank = 0;
  for (const BlockId block : allocator_.free_blocks()) rank[block] = next_rank++;
  int published = 0;
  for (BlockId block = 0; block < num_blocks(); ++block) {
    if (!index_.contains(block)) continue;
    ++published;
    const BlockId parent = index_.parent(block);
    ensure(index_.find(parent, index_.tokens(block), index_.epoch(block)) == block,
           "published block ", block, " cannot be found");
    if (parent == kNoBlock) continue;
    ensure(index_.contains(parent) && index_.epoch(parent) == index_.epoch(block), "block ", block,
           " is published, but its parent ", parent, " is not");
    ensure(rank[parent] < 0 || (rank[block] >= 0 && rank[block] < rank[parent]), "block ", parent,
           " would be handed out before its child ", block);
  }
  ensure(published == index_.size(), published, " blocks are published, not ", index_.size());
  const auto used = std::accumulate(host_used_.begin(), host_used_.end(), 0);
  ensure(used + num_host_free() == host_blocks(), used, " host blocks in use and ",
         num_host_free(), " free are not ", host_blocks());
}

}  // namespace eapo
