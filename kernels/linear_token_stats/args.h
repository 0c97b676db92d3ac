// Arguments of the losses' rows on a GPU.
#pragma once

#include <cstdint>

#include "cpu/policy.h"
#include "cuda/target.h"

namespace eapo {

struct RunRowsArgs {
  cuda::Storage storage;   // of the logits
  cuda::Storage out_type;  // of their gradient: the same, or bfloat16 of float32 logits
  const void* z;           // logits, rows z_stride elements apart
  int64_t z_stride;
  void* out;  // their gradient; may be where the logits are, if a row starts where its logits do
  int64_t out_stride;
  int32_t vocab;
  int64_t size;          // rows of the span at most
  bool given;            // whether z and out have a row for each of N, not for each of the span
  const int64_t* rows;   // list of rows
  const int64_t* span;   // [2] where in the list the rows start and stop
  const int64_t* targets;  // [N]; one outside the vocabulary makes its row's results NaN
  float inverse;           // 1 / temperature
  float* state;            // [N, state_stride] largest logit, mass and moment, as Triton's; or null
  int64_t state_stride;
  float* logprob;  // [N]
  float* entropy;  // [N]
  float* a;        // [N] made by the program, else given
  float* b;        // [N] likewise; null: 0
  float* losses;   // [N] made by the program
  // The token program, by row [N] and for all rows.
  const float* weights;  // share in the loss; null: no program
  const float* old_logprob;
  const float* advantages;
  const float* factor;       // null: 1
  const float* ref_logprob;  // null: no KL
  cpu::Surrogate surrogate;
  cpu::KlEstimator kl;
  float least, most, delta, beta, entropy_coef;
  bool gradient;    // whether to make it
  bool zeros;       // whether to write it where a and b are 0
  int32_t cluster;  // blocks of a row: 1, 2, 4 or 8; 0: chosen, and filled in
  int32_t part;     // 16-byte vectors of a block, filled in
};

}  // namespace eapo
