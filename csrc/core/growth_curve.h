#pragma once

#include <algorithm>
#include <vector>

namespace eapo {

// Blocks that rows will need together beside those that they hold now, as they grow in step and
// each gives back what it holds when it ends. Rows that are about to end make room for the others;
// rows that began together grow together.
class GrowthCurve {
 public:
  void clear() {
    ends_.clear();
    rows_ = pending_ = 0;
  }

  // A row that takes `pending` blocks first, grows by `growth` blocks and then gives `own` back.
  void add(int pending, int growth, int own) {
    if (growth >= static_cast<int>(ends_.size())) ends_.resize(growth + 1);
    ++ends_[growth].rows;
    ends_[growth].blocks += own;
    ++rows_;
    pending_ += pending;
  }

  int peak() const {
    int most = 0, alive = rows_, freed = 0;
    for (int growth = 0; growth < static_cast<int>(ends_.size()); ++growth) {
      most = std::max(most, growth * alive - freed);
      alive -= ends_[growth].rows;
      freed += ends_[growth].blocks;
    }
    return pending_ + most;
  }

 private:
  struct Ends {
    int rows = 0, blocks = 0;
  };
  std::vector<Ends> ends_;  // of rows, by their growth
  int rows_ = 0;
  int pending_ = 0;
};

}  // namespace eapo
