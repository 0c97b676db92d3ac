// Arguments of the sampler on a GPU.
#pragma once

#include <cstdint>

#include "cuda/target.h"

namespace eapo {

struct SampleRowsArgs {
  static constexpr int kTile = 4096;  // vocabulary entries of a tile
  static constexpr int kMaxTiles = 1024;

  cuda::Storage storage;  // of the logits
  const void* logits;     // [num_rows, vocab], rows row_stride elements apart
  int64_t num_rows;
  int64_t row_stride;
  int32_t vocab;
  int32_t samples;
  const int32_t* rows;        // [samples] row of logits of each
  const float* uniforms;      // [samples] in [0, 1)
  const float* temperatures;  // [samples] 0: the largest logit
  const int32_t* top_ks;      // [samples] <= 0: off
  const float* top_ps;        // [samples] >= 1: off
  const float* min_ps;        // [samples] <= 0: off
  int32_t bans;
  const int32_t* ban_samples;  // [bans]
  const int32_t* ban_ids;      // [bans]
  int32_t tiles;               // of the vocabulary, at most kMaxTiles
  float* tops;                 // [samples, tiles] filled by the first kernel for the second
  float* sums;                 // [samples, tiles]
  int64_t* tokens;             // [samples] -1 without a distribution
  float* logprobs;             // [samples]
  float* kept;                 // [samples]
};

}  // namespace eapo
