#pragma once

#include <vector>

#include "types.h"

namespace eapo {

// Reference-counted KV blocks whose free list is the eviction list.
//
// Blocks without an owner form a doubly linked list in the order in which they will be handed out:
// first those whose content nobody wants, then the least recently freed. A free block keeps its
// content until allocate() returns it; until then reuse() takes it out of the middle of the list.
// Every operation is O(1) and nothing is allocated after construction.
class BlockAllocator {
 public:
  BlockAllocator(int num_blocks, int block_size);

  BlockId allocate();         // throws OutOfBlocks
  void reuse(BlockId block);  // a free block gets an owner, its content is kept
  void share(BlockId block);  // one more owner
  // One owner less. The last one frees the block: with `keep` it is handed out after all others
  // that are free now, without `keep` before them.
  void release(BlockId block, bool keep = false);
  int ref_count(BlockId block) const;

  int num_free() const { return num_free_; }
  int num_blocks() const { return static_cast<int>(refs_.size()); }
  int block_size() const { return block_size_; }

  // The free blocks in the order in which they will be handed out.
  std::vector<BlockId> free_blocks() const;

  // Throws InvalidState if the free list disagrees with itself or with the reference counts.
  void check() const;

 private:
  BlockId ends() const { return num_blocks(); }  // the link before the first and after the last
  void link(BlockId block, BlockId before, BlockId after);
  void unlink(BlockId block);
  void require_used(BlockId block, const char* action) const;
  void require_known(BlockId block) const;

  int block_size_;
  int num_free_ = 0;
  std::vector<int> refs_;
  std::vector<BlockId> previous_;  // of the free list; the last entry closes the ring
  std::vector<BlockId> next_;
};

}  // namespace eapo
