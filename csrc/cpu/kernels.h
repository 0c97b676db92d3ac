// Arguments of the CPU kernels: borrowed pointers, sizes in elements, checked by the caller.
#pragma once

#include <cstdint>

#include "group_advantages/args.h"

namespace eapo::cpu {

// Storage type of floating-point tensors; arithmetic is fp32 for both.
enum class Storage { kFloat32, kBFloat16 };

// One draw per sample row: ban -> temperature -> top-k -> top-p -> min-p -> CDF inversion.
struct SampleArgs {
  const void* logits;  // [rows, vocab], row_stride apart
  Storage storage;
  int64_t rows, vocab, row_stride;
  int64_t samples;             // N
  const int32_t* sample_rows;  // [N] row of logits
  const float* temperatures;   // [N], 0: argmax
  const int32_t* top_ks;       // [N], <= 0: off
  const float* top_ps;         // [N], >= 1: off
  const float* min_ps;         // [N], <= 0: off
  const float* uniforms;       // [N] in [0, 1)
  const int32_t* ban_starts;   // [N + 1] range of each sample in ban_ids
  const int32_t* ban_ids;      // [B] vocabulary ids, ascending within a sample
  int64_t* out_tokens;         // [N]
  float* out_logprobs;         // [N], NaN and token -1 where no finite distribution exists
  float* out_kept;             // [N] probability mass kept by the truncation
};

// Paged causal attention of S segments whose query rows are packed in one [T, heads, dim] tensor.
struct AttentionArgs {
  Storage storage;                  // of q, k, v, both caches and out
  int64_t tokens;                   // T
  int64_t segments;                 // S
  int64_t q_heads, kv_heads, dim;   // q_heads is a multiple of kv_heads
  const void *q, *k, *v;            // [T, heads, dim]; the elements of a head are packed
  int64_t q_stride, k_stride, v_stride;                 // of tokens
  int64_t q_head_stride, k_head_stride, v_head_stride;  // of heads
  void *k_cache, *v_cache;          // [blocks, block_size, kv_heads, dim]
  int64_t blocks, block_size;
  const int64_t* slots;             // [T] block * block_size + offset; negative: not written
  const int32_t* cu_q;              // [S + 1]
  const int32_t* kv_lens;           // [S], this step's tokens included; 0: the rows are padding
  const int32_t* block_tables;      // [S, table_stride]
  int64_t table_stride;
  float scale, softcap;             // softcap 0: off
  int64_t window;                   // keys seen by a row, itself included; 0: all
  const float* sinks;               // [q_heads] logits that join the softmax; null: none
  int64_t spans;                    // P
  const int32_t* shared_spans;      // [P, 2] first segment, segments: ascending, one row each
  const int32_t* shared_lens;       // [P] keys that the span's segments have in the same blocks
  void* out;                        // [T, q_heads, dim] contiguous
};

// out = x / sqrt(mean(x^2) + eps) * weight over the last dimension; kernels/rms_norm gives the
// rounding points.
struct RmsNormArgs {
  Storage storage;  // of x, weight and out
  int64_t rows, size;
  const void* x;  // [rows, size], x_stride apart
  int64_t x_stride;
  const void* weight;  // [size]
  float eps;
  bool unit_offset;         // the factor is 1 + weight
  bool cast_before_weight;  // round to the storage type before the factor
  void* out;                // [rows, size] contiguous
};

enum class Activation { kSilu, kGeluTanh };

// out = activation(gate) * up.
struct GatedActivationArgs {
  Storage storage;  // of gate, up and out
  Activation activation;
  int64_t rows, size;
  const void *gate, *up;  // [rows, size], their strides apart
  int64_t gate_stride, up_stride;
  void* out;  // [rows, size] contiguous
};

// Rotary position embedding: entries i and i + rotated / 2 of a head turn together.
struct RotaryArgs {
  Storage storage, angle_storage;  // of x and out; of cos and sin
  int64_t batches, heads, tokens, dim;
  int64_t rotated;  // even, the first entries of a head
  const void* x;    // [batches, heads, tokens, dim] by the strides
  int64_t batch_stride, head_stride, token_stride;
  const void *cos, *sin;  // [angle_batches, tokens, rotated] contiguous
  int64_t angle_batches;  // batches or 1
  void* out;              // [batches, tokens, heads, dim] contiguous
};

// Writes k and v of the tokens [begin, end) into the cache.
void write_kv(const AttentionArgs& args, int64_t begin, int64_t end);

// Group-relative advantages; kernels/group_advantages/reference.py gives the formulas.
// Double accumulation in the order of the rollouts; one thread, the same on every instruction set.
void group_advantages(const AdvantageArgs& args);

// Copies whole blocks of `block_bytes` by (source, target) pairs, pair after pair.
void copy_blocks(void* cache, int64_t block_bytes, const int32_t* pairs, int64_t count);

}  // namespace eapo::cpu
