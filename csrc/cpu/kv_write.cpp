#include <cstring>

#include "cpu/kernels.h"

namespace eapo::cpu {
namespace {

constexpr int64_t kAhead = 8;  // tokens whose slots are fetched early
constexpr int64_t kLine = 64;  // bytes

struct Copy {
  const char* from;
  int64_t token_stride, head_stride;  // bytes
  char* cache;
};

void write_token(const Copy& copy, int64_t token, int64_t slot, int64_t heads, int64_t head_bytes) {
  const char* from = copy.from + token * copy.token_stride;
  char* to = copy.cache + slot * heads * head_bytes;
  for (int64_t head = 0; head < heads; ++head)
    std::memcpy(to + head * head_bytes, from + head * copy.head_stride,
                static_cast<size_t>(head_bytes));
}

}  // namespace

void write_kv(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t size = args.storage == Storage::kFloat32 ? 4 : 2;
  const int64_t head_bytes = args.dim * size, row_bytes = args.kv_heads * head_bytes;
  const Copy copies[] = {{static_cast<const char*>(args.k), args.k_stride * size,
                          args.k_head_stride * size, static_cast<char*>(args.k_cache)},
                         {static_cast<const char*>(args.v), args.v_stride * size,
                          args.v_head_stride * size, static_cast<char*>(args.v_cache)}};
  for (int64_t token = begin; token < end; ++token) {
    const int64_t ahead = token + kAhead < end ? args.slots[token + kAhead] : -1;
    for (const Copy& copy : copies) {
      for (int64_t byte = 0; ahead >= 0 && byte < row_bytes; byte += kLine)
        __builtin_prefetch(copy.cache + ahead * row_bytes + byte, 1);
      if (args.slots[token] >= 0)
        write_token(copy, token, args.slots[token], args.kv_heads, head_bytes);
    }
  }
}

}  // namespace eapo::cpu
