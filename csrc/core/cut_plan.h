#pragma once

#include <span>
#include <vector>

#include "kv_pool.h"
#include "sequence.h"

namespace eapo {

// Works out which tail blocks rows would have to give up so that enough become free. It changes
// nothing; whoever is satisfied with enough() carries out cuts().
class CutPlan {
 public:
  struct Cut {
    Sequence* row;
    int keep;  // leading blocks that the row keeps
  };

  void begin(const KvPool& pool, int target);            // `target` blocks must become free
  void pin(std::span<const BlockId> blocks);             // these don't count, whoever gives them up
  void want_alone(BlockId block);                        // its owners besides one count as all
  bool enough() const { return freed_ >= target_; }
  int freed() const { return freed_; }

  // Blocks at the row's end that nobody else owns.
  void add(Sequence& row);

  // All that the row owns, or the rows added so far: a block with several owners becomes free once
  // all of them have given it up.
  void add_all(Sequence& row);
  void deepen();

  // Rows that give up something, in the order of add(). A row gives up no block that would not
  // become free and stands before all of its that would.
  std::span<const Cut> cuts();

 private:
  int owners_left(BlockId block) const { return pool_->ref_count(block) - given_[block]; }
  void give(BlockId block);
  void deepen(Cut& cut);

  const KvPool* pool_ = nullptr;
  int target_ = 0;
  int freed_ = 0;
  std::vector<Cut> cuts_;
  std::vector<int> given_;        // owners that gave a block up; pinned: -1 at first, alone: 1
  std::vector<BlockId> touched_;  // blocks whose entry of given_ is not 0
};

}  // namespace eapo
