#pragma once

#include <algorithm>

#include "sequence.h"

namespace eapo {

// How long rows become: a moving average over finished ones of all that followed the prompt,
// replies included. It begins as if a few rows had taken half of their max_tokens, because the rows
// that finish first are the short ones. It belongs to one scheduler, so that what ran before does
// not change a run.
class LengthEstimate {
 public:
  void add(const Sequence& finished) {
    if (count_ == kPrior) mean_ = at_first(finished);
    ++count_;
    mean_ += (finished.position() - mean_) / std::min(count_, kWindow);
  }

  // Tokens that the row is expected to grow by, at most its remaining max_tokens. A row that is as
  // long as expected, or longer, grows on by a quarter of that, or by `least` if that is less.
  int expected_growth(const Sequence& row, int least) const {
    const auto expected = static_cast<int>(count_ == kPrior ? at_first(row) : mean_);
    const int more = std::max(1, std::min(least, expected / 4));
    const int left = row.group->sampling.max_tokens - row.policy_tokens;
    return std::min(std::max(expected - row.position(), more), left);
  }

 private:
  static constexpr int kPrior = 8;    // rows that the first expectation counts for
  static constexpr int kWindow = 32;  // rows that the average mostly sees

  static double at_first(const Sequence& row) { return 0.5 * row.group->sampling.max_tokens; }

  int count_ = kPrior;
  double mean_ = 0;
};

}  // namespace eapo
