#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "block_allocator.h"
#include "prefix_index.h"
#include "types.h"

namespace eapo {

// The KV blocks of a device, what is cached in them, and blocks of host memory to swap to. It
// outlives schedulers, which use it one after another.
//
// A full block whose KV is computed can be published: rows that begin with the same tokens find it,
// with an owner or without, until it is handed out anew. Owners of a block own its parent too and
// let go of their blocks from the tail, so of two free blocks the child is handed out first, and a
// published block's parent is always published. advance_epoch() makes all that is published so far
// unfindable.
class KvPool {
 public:
  KvPool(int num_blocks, int block_size, int host_blocks = 0);

  int num_blocks() const { return allocator_.num_blocks(); }
  int block_size() const { return allocator_.block_size(); }
  int num_free() const { return allocator_.num_free(); }
  std::int64_t capacity() const { return std::int64_t{num_blocks()} * block_size(); }
  int blocks_for(int tokens) const { return (tokens + block_size() - 1) / block_size(); }
  int ref_count(BlockId block) const { return allocator_.ref_count(block); }

  BlockId allocate();          // throws OutOfBlocks; what the block held is forgotten
  void take(BlockId block);    // one more owner, of a free block too
  void release(BlockId block); // one owner less

  // The published block of these tokens behind the published block `parent`, or kNoBlock.
  BlockId find(BlockId parent, std::span<const TokenId> tokens) const;
  // Publishes `block` unless an equal one is published: returns the block that is.
  BlockId publish(BlockId block, BlockId parent, std::span<const TokenId> tokens);
  bool published(BlockId block) const { return index_.contains(block); }
  int num_published() const { return index_.size(); }
  std::int64_t evictions() const { return evictions_; }  // findable blocks handed out anew, so far

  std::uint64_t epoch() const { return epoch_; }
  void advance_epoch() { ++epoch_; }

  int host_blocks() const { return static_cast<int>(host_used_.size()); }
  int num_host_free() const { return static_cast<int>(host_free_.size()); }
  std::optional<BlockId> allocate_host();
  void release_host(BlockId block);

  const PrefixIndex& index() const { return index_; }
  void check() const;  // throws InvalidState on a broken invariant

 private:
  BlockAllocator allocator_;
  PrefixIndex index_;
  std::uint64_t epoch_ = 0;
  std::int64_t evictions_ = 0;
  std::vector<BlockId> host_free_;
  std::vector<std::uint8_t> host_used_;
};

}  // namespace eapo
