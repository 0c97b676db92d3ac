#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace eapo {

// The inputs of one forward pass over T tokens of S rows, with logits wanted at L of the tokens and
// N >= L samples drawn from them (the first tokens of a group share one row of logits).
//
// Before the forward all blocks of `swap_out` are moved, then those of `swap_in`, then `copies`.
// Rows that decode come first, the members of a group side by side.
struct StepPlan {
  std::vector<std::int64_t> input_ids;  // [T]
  std::vector<std::int64_t> positions;  // [T] in the row, the prompt included
  std::vector<std::int64_t> slots;      // [T] block * block_size + offset

  std::vector<SeqId> seqs;                 // [S] (a group's prompt counts as its first member's)
  std::vector<std::int32_t> cu_q;          // [S + 1] row s has tokens cu_q[s] .. cu_q[s + 1]
  std::vector<std::int32_t> kv_lens;       // [S] tokens to attend to, this step's included
  std::vector<BlockId> block_tables;       // [S, table_width], 0 behind the end
  int table_width = 0;
  std::vector<BlockId> swap_out;           // [K, 2] (block, host block)
  std::vector<BlockId> swap_in;            // [K, 2] (host block, block)
  std::vector<BlockId> copies;             // [C, 2] (source, destination)

  // Runs of decoding members of a group whose tables begin alike: the first of `shared_lens` tokens
  // (full blocks, of the prompt at least one) are the same for all rows of the span.
  std::vector<std::int32_t> shared_spans;  // [P, 2] (first row, number of rows)
  std::vector<std::int32_t> shared_lens;   // [P]
  int max_q_len = 0;                       // most tokens of a row
  int max_kv_len = 0;                      // largest of kv_lens

  std::vector<std::int64_t> logits_rows;   // [L] indices into T
  std::vector<std::int32_t> sample_rows;   // [N] indices into L
  std::vector<SeqId> sample_seqs;          // [N]
  std::vector<float> uniforms;             // [N] in [0, 1)
  std::vector<float> temperatures;         // [N]
  std::vector<std::int32_t> top_ks;        // [N]
  std::vector<float> top_ps;               // [N]
  std::vector<float> min_ps;               // [N]
  std::vector<std::int32_t> ban_rows;      // [B] indices into N
  std::vector<TokenId> ban_ids;            // [B]

  int num_rows() const { return static_cast<int>(kv_lens.size()); }
};

}  // namespace eapo
