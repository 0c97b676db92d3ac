#include "cpu/attention_fetch.h"
#include <cstdlib>
namespace eapo::cpu {


static int64_t ahead() { const char* e = std::getenv("AHEAD"); return e ? atoi(e) : 65536; }
void Fetcher::next_run() {
  const int64_t A = ahead();
  if (A == 0) return;
  const int64_t tiles = std::max<int64_t>(1, A / (32 * run_bytes_));
  if (tile_ >= 2 * count_ || tile_ >= passed_ + tiles) return;
  const Tile& tile = tiles_[tile_ < count_ ? tile_ : tile_ - count_];
  const int64_t position = tile.first + key_, inside = position % args_.block_size;
  const int64_t block =
      args_.block_tables[tile.segment * args_.table_stride + position / args_.block_size];
  const auto* cache = static_cast<const char*>(tile_ < count_ ? args_.k_cache : args_.v_cache);
  cursor_ = cache + (block * args_.block_size + inside) * row_bytes_ + offset_;
  const int64_t keys = whole_rows_ ? std::min(tile.keys - key_, args_.block_size - inside) : 1;
  end_ = cursor_ + (keys - 1) * row_bytes_ + run_bytes_;
  key_ += keys;
  if (key_ >= tile.keys) {
    ++tile_;
    key_ = 0;
  }
}

void Fetcher::step_over_runs(int lines) {
  for (; lines > 0 && cursor_ < end_; --lines) {
    __builtin_prefetch(cursor_);
    cursor_ += kLine;
    if (cursor_ >= end_) next_run();
  }
}

}  // namespace eapo::cpu
