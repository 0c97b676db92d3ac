#pragma once

#include "cuda/target.h"
#include "sample/args.h"

namespace eapo::cuda {

// Draws a token for every sample. Queues its kernels and returns null, or what CUDA says went
// wrong.
const char* sample_rows(const SampleRowsArgs& args, const Target& target);

}  // namespace eapo::cuda
