#pragma once

#include "group_advantages/args.h"

namespace eapo::cuda {

// Queues the kernel on `stream` (a cudaStream_t) of the device that holds the pointers. Returns
// null, or what CUDA says went wrong.
const char* group_advantages(const AdvantageArgs& args, int device, void* stream);

}  // namespace eapo::cuda
