#include <map>
#include <random>

#include "check.h"
#include "core/block_allocator.h"
#include "core/error.h"

using namespace eapo;

namespace {

constexpr int kNumBlocks = 23;

void operate(BlockAllocator& pool, std::map<BlockId, int>& refs, std::mt19937& random) {
  const auto choice = random() % 5;
  if (choice < 2 && pool.num_free() > 0) {
    const BlockId block = pool.allocate();
    EXPECT(refs.emplace(block, 1).second);
  } else if (choice < 2) {
    THROWS(OutOfBlocks, "all 23 blocks are in use", pool.allocate());
  } else if (!refs.empty()) {
    const auto entry = std::next(refs.begin(), random() % refs.size());
    entry->second += choice == 2 ? 1 : -1;
    choice == 2 ? pool.share(entry->first) : pool.release(entry->first);
    if (entry->second == 0) refs.erase(entry);
  }
}

void equals_a_shadow_model() {
  BlockAllocator pool(kNumBlocks, 16);
  std::map<BlockId, int> refs;
  std::mt19937 random(5);
  for (int i = 0; i < 100'000; ++i) {
    operate(pool, refs, random);
    EXPECT(pool.num_free() == kNumBlocks - static_cast<int>(refs.size()));
  }
  for (BlockId block = 0; block < kNumBlocks; ++block) {
    EXPECT(pool.ref_count(block) == (refs.contains(block) ? refs[block] : 0));
  }
  pool.check();
}

void refuses_misuse() {
  BlockAllocator pool(3, 16);
  THROWS(InvalidArgument, "cannot release block 1: it is free", pool.release(1));
  THROWS(InvalidArgument, "cannot share block 1: it is free", pool.share(1));
  THROWS(InvalidArgument, "block 3 is not in [0, 3)", pool.ref_count(3));
  THROWS(InvalidArgument, "num_blocks must be >= 1", BlockAllocator(0, 16));
  THROWS(InvalidArgument, "block_size must be >= 1", BlockAllocator(3, -1));
}

}  // namespace

int main() { return eapo_test::run(equals_a_shadow_model, refuses_misuse); }
