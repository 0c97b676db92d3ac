#include "prefix_index.h"

#include <algorithm>
#include <bit>

namespace eapo {

PrefixIndex::PrefixIndex(int num_blocks, int block_size)
    : block_size_(block_size),
      buckets_(std::bit_ceil(static_cast<std::size_t>(num_blocks)), kNoBlock),
      next_(num_blocks, kNoBlock),
      listed_(num_blocks, 0),
      hashes_(num_blocks),
      epochs_(num_blocks),
      parents_(num_blocks, kNoBlock),
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
  return hash(parent == kNoBlock ? kRoot + epoch : hashes_[parent], tokens);
}

BlockId PrefixIndex::find(BlockId parent, std::span<const TokenId> tokens,
                          std::uint64_t epoch) const {
  const std::uint64_t wanted = hash_behind(parent, tokens, epoch);
  BlockId block = buckets_[wanted & (buckets_.size() - 1)];
  for (; block != kNoBlock; block = next_[block]) {
    const bool same = hashes_[block] == wanted && parents_[block] == parent &&
                      epochs_[block] == epoch && std::ranges::equal(this->tokens(block), tokens);
    if (same) break;
  }
  return block;
}

void PrefixIndex::add(BlockId block, BlockId parent, std::span<const TokenId> tokens,
                      std::uint64_t epoch) {
  hashes_[block] = hash_behind(parent, tokens, epoch);
  parents_[block] = parent;
  epochs_[block] = epoch;
  std::ranges::copy(tokens, tokens_.begin() + std::ptrdiff_t{block} * block_size_);
  BlockId& first = bucket(hashes_[block]);
  next_[block] = first;
  first = block;
  listed_[block] = 1;
  ++size_;
}

void PrefixIndex::remove(BlockId block) {
  BlockId* link = &bucket(hashes_[block]);
  while (*link != block) link = &next_[*link];
  *link = next_[block];
  listed_[block] = 0;
  --size_;
}

std::span<const TokenId> PrefixIndex::tokens(BlockId block) const {
  return std::span(tokens_).subspan(static_cast<std::size_t>(block) * block_size_, block_size_);
}

}  // namespace eapo
