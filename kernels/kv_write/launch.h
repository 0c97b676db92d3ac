#pragma once

#include "cuda/target.h"
#include "kv_write/args.h"

namespace eapo::cuda {

// Each queues its kernel and returns null, or what CUDA says went wrong.
const char* kv_write(const KvWriteArgs& args, const Target& target);
const char* copy_blocks(const CopyBlocksArgs& args, const Target& target);

}  // namespace eapo::cuda
