#include <cstring>

#include "cpu/kernels.h"

namespace eapo::cpu {

void copy_blocks(void* cache, int64_t block_bytes, const int32_t* pairs, int64_t count) {
  char* base = static_cast<char*>(cache);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t source = pairs[2 * i], target = pairs[2 * i + 1];
    if (source != target)
      std::memcpy(base + target * block_bytes, base + source * block_bytes,
                  static_cast<size_t>(block_bytes));
  }
}

}  // namespace eapo::cpu
