#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "types.h"

namespace eapo {

// Finds the block that holds the KV of given tokens behind a given block.
//
// A block's hash chains its parent's (the epoch of the weights for a first block) with its tokens.
// It only leads to candidates: a block is found if its epoch, its parent block and all its tokens
// are the wanted ones, so what is found is exact as long as a block stays in the index while its
// children do. KvPool sees to that.
class PrefixIndex {
 public:
  PrefixIndex(int num_blocks, int block_size);

  // The block of these `block_size` tokens behind `parent` (kNoBlock: at the start of a row), or
  // kNoBlock. The parent is in the index.
  BlockId find(BlockId parent, std::span<const TokenId> tokens, std::uint64_t epoch) const;

  // What find() finds; where it finds nothing, `block` is taken in and returned.
  BlockId find_or_add(BlockId block, BlockId parent, std::span<const TokenId> tokens,
                      std::uint64_t epoch);
  void remove(BlockId block);

  bool contains(BlockId block) const { return entries_[block].listed; }
  BlockId parent(BlockId block) const { return entries_[block].parent; }
  std::uint64_t epoch(BlockId block) const { return entries_[block].epoch; }
  std::span<const TokenId> tokens(BlockId block) const;
  int size() const { return size_; }

  // 64 bits that tell `tokens` behind a parent of hash `parent` from most others.
  static std::uint64_t hash(std::uint64_t parent, std::span<const TokenId> tokens);

 private:
  struct Entry {
    std::uint64_t hash = 0;
    std::uint64_t epoch = 0;
    BlockId parent = kNoBlock;
    BlockId next = kNoBlock;  // in the bucket
    bool listed = false;
  };

  std::uint64_t hash_behind(BlockId parent, std::span<const TokenId> tokens,
                            std::uint64_t epoch) const;
  BlockId find_hash(std::uint64_t hash, BlockId parent, std::span<const TokenId> tokens,
                    std::uint64_t epoch) const;
  std::size_t bucket(std::uint64_t hash) const { return hash & (buckets_.size() - 1); }

  int block_size_;
  int size_ = 0;
  std::vector<BlockId> buckets_;  // first block of each; a power of two of them
  std::vector<Entry> entries_;    // [num_blocks]
  std::vector<TokenId> tokens_;   // [num_blocks, block_size]
};

}  // namespace eapo
