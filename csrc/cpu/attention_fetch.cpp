#include "cpu/attention_fetch.h"

#include <algorithm>

namespace eapo::cpu {
namespace {

// Far enough to cover the latency of memory, and a small part of a second-level cache.
constexpr int64_t kAheadBytes = 1 << 16;

}  // namespace

Fetcher::Fetcher(const AttentionArgs& args, const AttentionItem& item, const Tile* tiles,
                 int64_t count)
    : args_(args), tiles_(tiles), count_(count), whole_rows_(item.heads == args.kv_heads) {
  const int64_t head_bytes = args.dim * (args.storage == Storage::kFloat32 ? 4 : 2);
  row_bytes_ = args.kv_heads * head_bytes;
  offset_ = item.head * head_bytes;
  run_bytes_ = item.heads * head_bytes;
}

// A run is as many keys as lie side by side.
void Fetcher::next_run() {
  if (tile_ >= 2 * count_ || ahead_bytes_ > kAheadBytes) return;
  const Tile& tile = tiles_[tile_ % count_];
  const int64_t position = tile.first + key_, inside = position % args_.block_size;
  const int64_t block =
      args_.block_tables[tile.segment * args_.table_stride + position / args_.block_size];
  const auto* cache = static_cast<const char*>(tile_ < count_ ? args_.k_cache : args_.v_cache);
  const int64_t keys = whole_rows_ ? std::min(tile.keys - key_, args_.block_size - inside) : 1;
  cursor_ = cache + (block * args_.block_size + inside) * row_bytes_ + offset_;
  end_ = cursor_ + (keys - 1) * row_bytes_ + run_bytes_;
  ahead_bytes_ += keys * run_bytes_;
  key_ += keys;
  if (key_ < tile.keys) return;
  ++tile_;
  key_ = 0;
}

void Fetcher::pass_tile() {
  ahead_bytes_ -= tiles_[passed_ % count_].keys * run_bytes_;
  ++passed_;
  if (cursor_ >= end_) next_run();
}

void Fetcher::step_over_runs(int lines) {
  for (; lines > 0 && cursor_ < end_; --lines) {
    __builtin_prefetch(cursor_, 0, kLevel2);
    cursor_ += kLine;
    if (cursor_ >= end_) next_run();
  }
}

}  // namespace eapo::cpu
