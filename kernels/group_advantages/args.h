// Arguments of group-relative advantages, the same for the CPU and the CUDA kernel.
#pragma once

#include <cstdint>

namespace eapo {

struct AdvantageArgs {
  enum class Center { kNone, kMean, kLeaveOneOut, kLength };
  enum class Scale { kNone, kGroupStd, kBatchStd };

  int64_t rollouts;          // S
  const float* rewards;      // [S]
  const int64_t* group_ids;  // [S] any values; equal means same group
  const int64_t* lengths;    // [S] policy tokens, only for Center::kLength
  const bool* valid;         // [S] or null: all
  Center center;
  Scale scale;
  double eps;
  int64_t ddof;
  float* out;  // [S], 0 where not valid
};

}  // namespace eapo
