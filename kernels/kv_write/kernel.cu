// Copies of bytes, in the widest accesses that all addresses and sizes allow; dtypes do not matter.

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "kv_write/launch.h"

namespace eapo::cuda {
namespace {

constexpr int kThreads = 256;

// One thread an access of a token's row, keys and values alike.
template <typename Word>
__global__ void __launch_bounds__(kThreads) write(KvWriteArgs args) {
  const int64_t words = args.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t token = index / words, word = index % words;
  if (token >= args.tokens) return;
  const int64_t slot = args.slots[token];
  if (slot < 0) return;
  const auto move = [&](const void* from, int64_t stride, void* to) {
    const char* source = static_cast<const char*>(from) + token * stride;
    char* target = static_cast<char*>(to) + slot * args.row_bytes;
    reinterpret_cast<Word*>(target)[word] = reinterpret_cast<const Word*>(source)[word];
  };
  move(args.k, args.k_stride, args.k_cache);
  move(args.v, args.v_stride, args.v_cache);
}

// One thread an access of a block, for all pairs in their order: a block may be read by one pair
// and written by a later one.
template <typename Word>
__global__ void __launch_bounds__(kThreads) copy(const CopyBlocksArgs args) {
  const int64_t words = args.block_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t word = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (word >= words) return;
  Word* cache = static_cast<Word*>(args.caches[blockIdx.y]);
  for (int64_t pair = 0; pair < args.pairs; ++pair)
    cache[args.copies[2 * pair + 1] * words + word] = cache[args.copies[2 * pair] * words + word];
}

// fn(Word{}) with the widest word that divides `bits`, the union of addresses and sizes.
template <typename Fn>
const char* with_word(uint64_t bits, Fn&& fn) {
  if (bits % 16 == 0) return fn(uint4{});
  if (bits % 4 == 0) return fn(uint32_t{});
  if (bits % 2 == 0) return fn(uint16_t{});
  return fn(uint8_t{});
}

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace

const char* kv_write(const KvWriteArgs& args, const Target& target) {
  if (args.tokens == 0 || args.row_bytes == 0) return nullptr;
  const uint64_t bits = static_cast<uint64_t>(args.row_bytes | args.k_stride | args.v_stride) |
                        address(args.k) | address(args.v) | address(args.k_cache) |
                        address(args.v_cache);
  return with_word(bits, [&](auto word) {
    using Word = decltype(word);
    const int64_t threads = args.tokens * (args.row_bytes / static_cast<int64_t>(sizeof(Word)));
    const dim3 grid(static_cast<unsigned>(ceil_div(threads, kThreads)));
    return launch(write<Word>, grid, kThreads, target, args);
  });
}

const char* copy_blocks(const CopyBlocksArgs& args, const Target& target) {
  if (args.count == 0 || args.pairs == 0 || args.block_bytes == 0) return nullptr;
  uint64_t bits = static_cast<uint64_t>(args.block_bytes);
  for (int i = 0; i < args.count; ++i) bits |= address(args.caches[i]);
  return with_word(bits, [&](auto word) {
    using Word = decltype(word);
    const int64_t words = args.block_bytes / static_cast<int64_t>(sizeof(Word));
    const dim3 grid(static_cast<unsigned>(ceil_div(words, kThreads)),
                    static_cast<unsigned>(args.count));
    return launch(copy<Word>, grid, kThreads, target, args);
  });
}

}  // namespace eapo::cuda
