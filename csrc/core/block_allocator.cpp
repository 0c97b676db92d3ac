#include "block_allocator.h"

#include "error.h"

namespace eapo {

BlockAllocator::BlockAllocator(int num_blocks, int block_size) : block_size_(block_size) {
  require(num_blocks >= 1, "num_blocks must be >= 1, got ", num_blocks);
  require(block_size >= 1, "block_size must be >= 1, got ", block_size);
  refs_.assign(num_blocks, 0);
  previous_.assign(num_blocks + 1, ends());
  next_.assign(num_blocks + 1, ends());
  for (BlockId block = 0; block < num_blocks; ++block) link(block, previous_[ends()], ends());
}

void BlockAllocator::link(BlockId block, BlockId before, BlockId after) {
  next_[before] = previous_[after] = block;
  previous_[block] = before;
  next_[block] = after;
  ++num_free_;
}

void BlockAllocator::unlink(BlockId block) {
  next_[previous_[block]] = next_[block];
  previous_[next_[block]] = previous_[block];
  --num_free_;
}

BlockId BlockAllocator::allocate() {
  const BlockId block = next_[ends()];
  if (block == ends()) {
    throw OutOfBlocks(join("all ", num_blocks(), " blocks are in use; release some first"));
  }
  unlink(block);
  refs_[block] = 1;
  return block;
}

void BlockAllocator::reuse(BlockId block) {
  require_known(block);
  require(refs_[block] == 0, "cannot reuse block ", block, ": it has ", refs_[block], " owners");
  unlink(block);
  refs_[block] = 1;
}

void BlockAllocator::share(BlockId block) {
  require_used(block, "share");
  ++refs_[block];
}

void BlockAllocator::release(BlockId block, bool keep) {
  require_used(block, "release");
  if (--refs_[block] > 0) return;
  if (keep) {
    link(block, previous_[ends()], ends());
  } else {
    link(block, ends(), next_[ends()]);
  }
}

int BlockAllocator::ref_count(BlockId block) const {
  require_known(block);
  return refs_[block];
}

std::vector<BlockId> BlockAllocator::free_blocks() const {
  std::vector<BlockId> blocks;
  for (BlockId block = next_[ends()]; block != ends(); block = next_[block]) {
    blocks.push_back(block);
  }
  return blocks;
}

void BlockAllocator::check() const {
  int walked = 0;
  BlockId before = ends();
  for (BlockId block = next_[ends()]; block != ends(); block = next_[block]) {
    ensure(refs_[block] == 0, "free block ", block, " has ", refs_[block], " owners");
    ensure(previous_[block] == before, "the free list is broken at block ", block);
    ensure(++walked <= num_blocks(), "the free list has a cycle");
    before = block;
  }
  ensure(previous_[ends()] == before, "the free list is broken at its end");
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
