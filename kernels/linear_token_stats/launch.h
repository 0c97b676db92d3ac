#pragma once

#include "cuda/target.h"
#include "linear_token_stats/args.h"

namespace eapo::cuda {

// Statistics, token program and gradient of rows of logits. Queues its kernel and returns null, or
// what is wrong.
const char* run_rows(RunRowsArgs args, const Target& target);

// Bytes of the longest row that `run_rows` takes on this device; 0 where there is none.
int64_t longest_row(int device);

}  // namespace eapo::cuda
