#pragma once

#include <vector>

#include "types.h"

namespace eapo {

// Reference-counted pool of KV blocks. Free blocks form a last-in-first-out list threaded through
// the blocks themselves, so every operation is O(1) and nothing is allocated after construction.
class BlockAllocator {
 public:
  BlockAllocator(int num_blocks, int block_size);

  BlockId allocate();            // throws OutOfBlocks
  void share(BlockId block);     // one more owner
  void release(BlockId block);   // one owner less; the last one frees it
  int ref_count(BlockId block) const;

  int num_free() const { return num_free_; }
  int num_blocks() const { return static_cast<int>(refs_.size()); }
  int block_size() const { return block_size_; }

  // Walks the free list; throws InvalidState if it disagrees with the reference counts.
  void check() const;

 private:
  static constexpr BlockId kNone = -1;
  void require_used(BlockId block, const char* action) const;
  void require_known(BlockId block) const;

  int block_size_;
  int num_free_;
  BlockId free_head_;
  std::vector<int> refs_;
  std::vector<BlockId> next_free_;
};

}  // namespace eapo
