#include "prefix_index.h"

#include <algorithm>
#include <bit>

namespace eapo {

PrefixIndex::PrefixIndex(int num_blocks, int block_size)
    : block_size_(block_size),
      buckets_(std::bit_ceil(static_cast<std::size_t>(num_blocks)), kNoBlock),
      entries_(num_blocks),
      tokens_(static_cast<std::size_t>(num_blocks) * block_size) {}

std::uint64_t PrefixIndex::hash(std::uint64_t parent, std::span<const TokenId> tokens) {
  std::uint64_t state = parent;
  for (const TokenId token : tokens) {
    state = (state ^ static_cast<std::uint32_t>(token)) * 0x9E3779B97F4A7C15;
    state ^= state >> 32;
  }
  return state;
}

std::uint64_t PrefixIndex::hash_behind(BlockId parent, std::span<const TokenId> tokens,
                                       std::uint64_t epoch) const {
  constexpr std::uint64_t kRoot = 0x243F6A8885A308D3;  // digits of pi
  return hash(parent == kNoBlock ? kRoot + epoch : entries_[parent].hash, tokens);
}

BlockId PrefixIndex::find(BlockId parent, std::span<const TokenId> tokens,
                          std::uint64_t epoch) const {
  return find_hash(hash_behind(parent, tokens, epoch), parent, tokens, epoch);
}

BlockId PrefixIndex::find_hash(std::uint64_t hash, BlockId parent, std::span<const TokenId> tokens,
                               std::uint64_t epoch) const {
  BlockId block = buckets_[bucket(hash)];
  for (; block != kNoBlock; block = entries_[block].next) {
    const Entry& entry = entries_[block];
    const bool same = entry.hash == hash && entry.parent == parent && entry.epoch == epoch &&
                      std::ranges::equal(this->tokens(block), tokens);
    if (same) break;
  }
  return block;
}

BlockId PrefixIndex::find_or_add(BlockId block, BlockId parent, std::span<const TokenId> tokens,
                                 std::uint64_t epoch) {
  const std::uint64_t hash = hash_behind(parent, tokens, epoch);
  const BlockId known = find_hash(hash, parent, tokens, epoch);
  if (known != kNoBlock) return known;
  BlockId& first = buckets_[bucket(hash)];
  entries_[block] = {hash, epoch, parent, first, true};
  first = block;
  std::ranges::copy(tokens, tokens_.begin() + std::ptrdiff_t{block} * block_size_);
  ++size_;
  return block;
}

void PrefixIndex::remove(BlockId block) {
  BlockId* link = &buckets_[bucket(entries_[block].hash)];
  while (*link != block) link = &entries_[*link].next;
  *link = entries_[block].next;
  entries_[block].listed = false;
  --size_;
}

std::span<const TokenId> PrefixIndex::tokens(BlockId block) const {
  return std::span(tokens_).subspan(static_cast<std::size_t>(block) * block_size_, block_size_);
}

}  // namespace eapo
