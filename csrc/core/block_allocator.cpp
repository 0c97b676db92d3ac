#include "block_allocator.h"

#include <numeric>

#include "error.h"

namespace eapo {

BlockAllocator::BlockAllocator(int num_blocks, int block_size)
    : block_size_(block_size), num_free_(num_blocks), free_head_(0) {
  require(num_blocks >= 1, "num_blocks must be >= 1, got ", num_blocks);
  require(block_size >= 1, "block_size must be >= 1, got ", block_size);
  refs_.assign(num_blocks, 0);
  next_free_.resize(num_blocks);
  std::iota(next_free_.begin(), next_free_.end(), 1);
  next_free_.back() = kNone;
}

BlockId BlockAllocator::allocate() {
  if (free_head_ == kNone) {
    throw OutOfBlocks(join("all ", num_blocks(), " blocks are in use; release some first"));
  }
  const BlockId block = free_head_;
  free_head_ = next_free_[block];
  refs_[block] = 1;
  --num_free_;
  return block;
}

void BlockAllocator::share(BlockId block) {
  require_used(block, "share");
  ++refs_[block];
}

void BlockAllocator::release(BlockId block) {
  require_used(block, "release");
  if (--refs_[block] > 0) return;
  next_free_[block] = free_head_;
  free_head_ = block;
  ++num_free_;
}

int BlockAllocator::ref_count(BlockId block) const {
  require_known(block);
  return refs_[block];
}

void BlockAllocator::check() const {
  int walked = 0;
  for (BlockId block = free_head_; block != kNone; block = next_free_[block]) {
    ensure(refs_[block] == 0, "free block ", block, " has ", refs_[block], " owners");
    ensure(++walked <= num_blocks(), "the free list has a cycle");
  }
  ensure(walked == num_free_, "the free list has ", walked, " blocks, not ", num_free_);
}

void BlockAllocator::require_known(BlockId block) const {
  require(block >= 0 && block < num_blocks(), "block ", block, " is not in [0, ", num_blocks(),
          ")");
}

void BlockAllocator::require_used(BlockId block, const char* action) const {
  require_known(block);
  require(refs_[block] > 0, "cannot ", action, " block ", block, ": it is free");
}

}  // namespace eapo
