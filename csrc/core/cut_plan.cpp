#include "cut_plan.h"

namespace eapo {

void CutPlan::begin(const KvPool& pool, int target) {
  pool_ = &pool;
  target_ = target;
  freed_ = 0;
  cuts_.clear();
  given_.resize(pool.num_blocks(), 0);
  for (const BlockId block : touched_) given_[block] = 0;
  touched_.clear();
}

void CutPlan::pin(std::span<const BlockId> blocks) {
  touched_.insert(touched_.end(), blocks.begin(), blocks.end());
  for (const BlockId block : blocks) given_[block] = -1;
}

void CutPlan::want_alone(BlockId block) {
  touched_.push_back(block);
  given_[block] = 1;
}

void CutPlan::give(BlockId block) {
  touched_.push_back(block);
  ++given_[block];
  if (owners_left(block) == 0) ++freed_;
}

void CutPlan::add(Sequence& row) {
  int keep = static_cast<int>(row.blocks.size());
  for (; keep > 0 && !enough() && owners_left(row.blocks[keep - 1]) == 1; --keep) {
    give(row.blocks[keep - 1]);
  }
  cuts_.push_back({&row, keep});
}

void CutPlan::add_all(Sequence& row) {
  cuts_.push_back({&row, static_cast<int>(row.blocks.size())});
  deepen(cuts_.back());
}

void CutPlan::deepen() {
  for (Cut& cut : cuts_) deepen(cut);
}

void CutPlan::deepen(Cut& cut) {
  for (; cut.keep > 0 && !enough(); --cut.keep) give(cut.row->blocks[cut.keep - 1]);
}

std::span<const CutPlan::Cut> CutPlan::cuts() {
  const auto gives_nothing = [&](Cut& cut) {
    const auto& blocks = cut.row->blocks;
    const int size = static_cast<int>(blocks.size());
    while (cut.keep < size && owners_left(blocks[cut.keep]) > 0) ++cut.keep;
    return cut.keep == size;
  };
  std::erase_if(cuts_, gives_nothing);
  return cuts_;
}

}  // namespace eapo
