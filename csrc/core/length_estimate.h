#pragma once

#include <algorithm>

#include "sequence.h"

namespace eapo {

// How long rows become: a moving average over finished ones of all that followed the prompt,
// replies included. It belongs to one scheduler, so that what ran before does not change a run.
class LengthEstimate {
 public:
  void add(const Sequence& finished) {
    ++count_;
    mean_ += (finished.position() - mean_) / std::min(count_, kWindow);
  }

  // Tokens that the row is expected to grow by, at least `least`, at most its remaining max_tokens.
  int expected_growth(const Sequence& row, int least) const {
    const int allowed = row.group->sampling.max_tokens;
    const int expected = count_ == 0 ? allowed / 2 : static_cast<int>(mean_);
    return std::min(std::max(expected - row.position(), least), allowed - row.policy_tokens);
  }

 private:
  static constexpr int kWindow = 32;  // rows that the average mostly sees
  int count_ = 0;
  double mean_ = 0;
};

}  // namespace eapo
