// Arguments of paged attention on a GPU, one query row at a time.
#pragma once

#include <cstdint>

#include "cuda/target.h"

namespace eapo {

struct PagedRowsArgs {
  cuda::Storage storage;  // of q, the caches and out
  int64_t rows;           // query rows
  int64_t segments;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t dim;  // its bytes are a multiple of 16, at most 1024
  int32_t block_size;
  const void* q;  // [rows, q_heads, dim], rows q_stride elements apart
  int64_t q_stride;
  const void* k_cache;  // [blocks, block_size, kv_heads, dim]
  const void* v_cache;
  const int32_t* cu_q;          // [segments + 1]
  const int32_t* kv_lens;       // [segments]
  const int32_t* block_tables;  // [segments, .], rows table_stride entries apart
  int64_t table_stride;
  float scale;
  float softcap;       // 0: off
  int32_t window;      // 0: off
  const float* sinks;  // [q_heads] or null
  int32_t split;       // keys whose partial result a block makes, from position 0 on
  int32_t slots;       // splits that a row touches at most
  float* acc_parts;    // [rows, q_heads, slots, dim]; these three are not read with one slot
  float* max_parts;    // [rows, q_heads, slots]
  float* sum_parts;    // [rows, q_heads, slots]
  void* out;           // [rows, q_heads, dim]
};

}  // namespace eapo
