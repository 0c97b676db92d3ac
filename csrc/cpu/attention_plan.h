// Cuts a paged-attention call into work items. How it is cut depends on the number of threads; the
// arithmetic of a row does not depend on how it is cut.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace eapo::cpu {

// Keys whose softmax is taken at once, at fixed absolute positions. Longer contexts are the sum of
// their chunks in order, whoever computes them.
constexpr int64_t kKeyChunk = 512;

// A shared prefix is read in common up to a multiple of this.
constexpr int64_t kKeyAlign = 16;

constexpr int64_t kMaxMembers = 16;

// `queries` rows of each of `members` consecutive segments against `heads` kv heads.
struct AttentionItem {
  int64_t segment = 0, members = 1;  // several members have one query row each
  int64_t shared = 0;  // keys, from the first on, that are in the same blocks for all members
  int64_t query = 0, queries = 1;
  int64_t head = 0, heads = 0;
  int64_t chunk = 0, chunks = 0;
  int64_t cost = 0;
  int64_t partial = -1;  // first row of its partial results; -1: the item is all of its rows' keys
};

struct AttentionPlan {
  std::vector<AttentionItem> items;   // costliest first
  std::vector<AttentionItem> merges;  // what was cut by chunks, whole
  int64_t partial_rows = 0;
};

AttentionPlan plan_attention(const AttentionArgs& args, int threads);

}  // namespace eapo::cpu
