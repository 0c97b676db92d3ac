// Arguments of writes to the KV cache on a GPU.
#pragma once

#include <cstdint>

namespace eapo {

// Tokens' keys and values into their slots.
struct KvWriteArgs {
  int64_t tokens;
  int64_t row_bytes;  // kv_heads * dim elements
  const void* k;      // [tokens], rows k_stride bytes apart
  const void* v;
  int64_t k_stride;
  int64_t v_stride;
  void* k_cache;  // [slots], row_bytes apart
  void* v_cache;
  const int64_t* slots;  // [tokens]; negative: nothing is written
};

// Whole blocks inside each of `count` caches.
struct CopyBlocksArgs {
  static constexpr int kMaxCaches = 128;  // of one launch: they travel as kernel arguments

  void* caches[kMaxCaches];
  int count;
  int64_t block_bytes;
  const int32_t* copies;  // [pairs, 2] (source, target)
  int64_t pairs;
};

}  // namespace eapo
