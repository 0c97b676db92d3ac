// The pool against an oracle of lists and maps, and the prefix index with equal hashes.
//
//     test_kv_pool [--operations 100000] [--seeds 3]

#include <algorithm>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "core/kv_pool.h"

using namespace eapo;
using namespace eapo_test;

namespace {

constexpr int kBlockSize = 2;

using Path = std::vector<TokenId>;  // all tokens from the start of a row to the end of a block

// Rows hold chains of blocks, as the scheduler's do: they take what is found, allocate the rest,
// publish it or not, and let go from the tail.
class Fuzz {
 public:
  Fuzz(unsigned seed, int num_blocks, int host_blocks)
      : random_(seed), pool_(num_blocks, kBlockSize, host_blocks) {
    for (BlockId block = 0; block < num_blocks; ++block) free_.push_back(block);
  }

  void operate() {
    const int choice = below(100);
    if (choice < 30) {
      if (rows_.size() < 9) rows_.emplace_back();
    } else if (choice < 70 && !rows_.empty()) {
      grow(any_row());
    } else if (choice < 85 && !rows_.empty()) {
      cut(any_row());
    } else if (choice < 86) {
      if (below(5) == 0) pool_.advance_epoch();
    } else {
      use_host();
    }
    EXPECT(pool_.num_free() == static_cast<int>(free_.size()));
    EXPECT(pool_.num_published() == static_cast<int>(content_.size()));
    EXPECT(pool_.num_host_free() + static_cast<int>(host_.size()) == pool_.host_blocks());
    pool_.check();
  }

  std::int64_t hits = 0;

 private:
  struct Row {
    Path path = {};
    std::vector<BlockId> blocks = {};
    bool published = true;  // all of its blocks, in epoch `epoch`
    std::uint64_t epoch = 0;
  };
  using Key = std::pair<std::uint64_t, Path>;  // epoch, path

  int below(int bound) { return static_cast<int>(random_() % static_cast<unsigned>(bound)); }
  Row& any_row() { return rows_[below(static_cast<int>(rows_.size()))]; }

  // One block more: found, or allocated and perhaps published.
  void grow(Row& row) {
    if (row.blocks.empty()) row = {.epoch = pool_.epoch()};
    Path path = row.path;
    for (int i = 0; i < kBlockSize; ++i) path.push_back(below(2));
    const auto tokens = std::span(path).last(kBlockSize);
    const BlockId parent = row.blocks.empty() ? kNoBlock : row.blocks.back();
    const bool chained = row.published && row.epoch == pool_.epoch();
    const auto known = known_.find({row.epoch, path});
    if (chained) {
      EXPECT(pool_.find(parent, tokens) == (known == known_.end() ? kNoBlock : known->second));
    }
    if (chained && known != known_.end() && below(4) > 0) {
      take(row, path, known->second);
      ++hits;
      return;
    }
    if (free_.empty()) {
      THROWS(OutOfBlocks, "blocks are in use", pool_.allocate());
      return;
    }
    const BlockId block = allocate();
    row.path = path;
    row.blocks.push_back(block);
    row.published = chained && below(5) > 0;
    if (row.published) publish(row, parent, tokens);
  }

  void take(Row& row, const Path& path, BlockId block) {
    if (refs_[block]++ == 0) free_.remove(block);
    pool_.take(block);
    row.path = path;
    row.blocks.push_back(block);
  }

  BlockId allocate() {
    const BlockId block = free_.front();
    free_.pop_front();
    EXPECT(pool_.allocate() == block);
    if (const auto found = content_.find(block); found != content_.end()) {
      known_.erase(found->second);
      content_.erase(found);
    }
    refs_[block] = 1;
    return block;
  }

  // The row's newest block; an equal one that is published already takes its place.
  void publish(Row& row, BlockId parent, std::span<const TokenId> tokens) {
    const BlockId own = row.blocks.back();
    const auto [entry, added] = known_.try_emplace({row.epoch, row.path}, own);
    EXPECT(pool_.publish(own, parent, tokens) == entry->second);
    if (added) {
      content_[own] = entry->first;
      return;
    }
    row.blocks.pop_back();
    take(row, row.path, entry->second);
    release(own);
  }

  void release(BlockId block) {
    pool_.release(block);
    if (--refs_[block] > 0) return;
    free_.insert(content_.contains(block) ? free_.end() : free_.begin(), block);
  }

  void cut(Row& row) {
    for (int keep = below(static_cast<int>(row.blocks.size()) + 1);
         static_cast<int>(row.blocks.size()) > keep;) {
      release(row.blocks.back());
      row.blocks.pop_back();
      row.path.resize(row.path.size() - kBlockSize);
    }
    if (row.blocks.empty()) {
      std::swap(row, rows_.back());
      rows_.pop_back();
      return;
    }
    const BlockId last = row.blocks.back();
    row.published = content_.contains(last) && content_[last] == Key{row.epoch, row.path};
  }

  void use_host() {
    if (below(2) == 0) {
      const auto block = pool_.allocate_host();
      EXPECT(block.has_value() == (static_cast<int>(host_.size()) < pool_.host_blocks()));
      if (block) host_.push_back(*block);
    } else if (!host_.empty()) {
      std::swap(host_[below(static_cast<int>(host_.size()))], host_.back());
      pool_.release_host(host_.back());
      host_.pop_back();
    }
  }

  std::mt19937 random_;
  KvPool pool_;
  std::vector<Row> rows_;
  std::list<BlockId> free_;          // in the order in which they will be handed out
  std::map<BlockId, int> refs_;
  std::map<Key, BlockId> known_;     // published blocks
  std::map<BlockId, Key> content_;   // the other way round
  std::vector<BlockId> host_;
};

void equals_an_oracle(int operations, int seeds) {
  for (int seed = 0; seed < seeds; ++seed) {
    std::int64_t hits = 0;
    for (const int num_blocks : {1, 5, 17, 40}) {
      Fuzz fuzz(static_cast<unsigned>(seed), num_blocks, num_blocks / 2);
      for (int i = 0; i < operations / 4 && failures == 0; ++i) fuzz.operate();
      hits += fuzz.hits;
    }
    EXPECT(hits > operations / 50);
  }
}

// The hash of a path is a bijection of (hash of all but the last token) xor (last token), so two
// beginnings whose hashes agree above the 31 bits of a token have ends that make the whole equal.
std::pair<Path, Path> equal_hashes(std::uint64_t root) {
  std::unordered_map<std::uint64_t, Path> seen;
  for (TokenId token = 0;; ++token) {
    const Path path{token, token ^ 12345};
    const std::uint64_t hash = PrefixIndex::hash(root, path);
    const auto [entry, added] = seen.try_emplace(hash >> 31, path);
    if (added) continue;
    const Path& other = entry->second;
    const auto difference = static_cast<TokenId>(hash ^ PrefixIndex::hash(root, other));
    return {{path[0], path[1], 5}, {other[0], other[1], 5 ^ difference}};
  }
}

void equal_hashes_are_told_apart_by_tokens() {
  constexpr std::uint64_t kRoot = 0x243F6A8885A308D3;
  const auto [one, other] = equal_hashes(kRoot);
  EXPECT(one != other && other[2] >= 0);
  EXPECT(PrefixIndex::hash(kRoot, one) == PrefixIndex::hash(kRoot, other));
  PrefixIndex index(4, 3);
  index.find_or_add(2, kNoBlock, one, 0);
  EXPECT(index.find(kNoBlock, other, 0) == kNoBlock);
  index.find_or_add(3, kNoBlock, other, 0);
  EXPECT(index.find(kNoBlock, one, 0) == 2);
  EXPECT(index.find(kNoBlock, other, 0) == 3);
  index.find_or_add(0, 2, one, 0);  // equal hashes of parents do not make equal children
  EXPECT(index.find(2, one, 0) == 0);
  EXPECT(index.find(3, one, 0) == kNoBlock);
  index.remove(3);
  EXPECT(index.find(kNoBlock, one, 0) == 2);
  EXPECT(index.find(kNoBlock, other, 0) == kNoBlock);
}

void epochs_are_told_apart() {
  const Path tokens{1, 2, 3};
  PrefixIndex index(4, 3);
  index.find_or_add(1, kNoBlock, tokens, 7);
  EXPECT(index.find(kNoBlock, tokens, 7) == 1);
  EXPECT(index.find(kNoBlock, tokens, 8) == kNoBlock);
}

void refuses_misuse() {
  THROWS(InvalidArgument, "host_blocks must be >= 0, got -1", KvPool(3, 16, -1));
  KvPool pool(3, 16, 1);
  const BlockId host = *pool.allocate_host();
  EXPECT(!pool.allocate_host());
  pool.release_host(host);
  THROWS(InvalidState, "host block 0 is free already", pool.release_host(host));
}

}  // namespace

int main(int argc, char** argv) {
  const int operations = option(argc, argv, "--operations", 100'000);
  const int seeds = option(argc, argv, "--seeds", 3);
  return run([&] { equals_an_oracle(operations, seeds); }, equal_hashes_are_told_apart_by_tokens,
             epochs_are_told_apart, refuses_misuse);
}
