#pragma once

#include "cuda/target.h"
#include "paged_attention/args.h"

namespace eapo::cuda {

// Attends every query row to its keys, which are in the cache already. Queues its kernels and
// returns null, or what CUDA says went wrong.
const char* attend_rows(const PagedRowsArgs& args, const Target& target);

}  // namespace eapo::cuda
