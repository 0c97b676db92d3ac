#pragma once

#include <cstdint>
#include <vector>

#include "block_allocator.h"
#include "sequence.h"

namespace eapo {

// Moves KV blocks between rows. Only the block that a row writes next can be both partial and
// shared (after a fork), so copy-on-write looks at the last block alone.
class KvPool {
 public:
  KvPool(int num_blocks, int block_size) : allocator_(num_blocks, block_size) {}

  int block_size() const { return allocator_.block_size(); }
  int num_blocks() const { return allocator_.num_blocks(); }
  int num_free() const { return allocator_.num_free(); }
  std::int64_t capacity() const { return std::int64_t{num_blocks()} * block_size(); }
  int blocks_for(int tokens) const { return (tokens + block_size() - 1) / block_size(); }

  // Blocks to allocate (a copy included) before the row can hold `end` tokens.
  int blocks_needed(const Sequence& row, int end) const;
  int shortfall(const Sequence& row, int end) const { return blocks_needed(row, end) - num_free(); }

  // The largest `end` that the free blocks allow the row.
  int reachable(const Sequence& row) const;

  // Gives the row blocks for `end` tokens; a shared last block is copied: (source, destination) is
  // appended to `copies`, and the source is not handed out again before end_plan().
  void extend(Sequence& row, int end, std::vector<BlockId>& copies);
  void end_plan();

  // Drops tail blocks of `victim` until `row` can reach `end`. Blocks with other owners stop it
  // unless `shared` is set. Returns whether any block was dropped.
  bool trim(Sequence& victim, const Sequence& row, int end, bool shared);
  void drop(Sequence& row);

  // The member takes part in all blocks of the leader.
  void fork(const Sequence& leader, Sequence& member);

  // Takes full prompt blocks that the row lacks from the member that has most of them.
  void attach_prompt(Sequence& row);

  std::int64_t blocks_shared() const { return blocks_shared_; }
  std::int64_t blocks_copied() const { return blocks_copied_; }
  const BlockAllocator& allocator() const { return allocator_; }

 private:
  bool writes_shared_block(const Sequence& row) const;
  void share(BlockId block, Sequence& row);
  void release(BlockId block);

  BlockAllocator allocator_;
  std::vector<BlockId> copied_from_;  // by the copies of this plan
  std::vector<BlockId> withheld_;     // of these, the ones without an owner
  std::int64_t blocks_shared_ = 0;
  std::int64_t blocks_copied_ = 0;
};

}  // namespace eapo
