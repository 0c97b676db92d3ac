// Fetches the keys and values of a work item ahead of their use, a line at a time, so that the
// memory is busy while the cores compute.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention_plan.h"
#include "cpu/targets.h"

namespace eapo::cpu {

// Keys of a segment and the members of the item that read them.
struct Tile {
  int64_t segment, first, keys, member, members;
};

class Fetcher {
 public:
  // Goes through the tiles once for their keys, then once for their values.
  Fetcher(const AttentionArgs& args, const AttentionItem& item, const Tile* tiles, int64_t count)
      : args_(args), tiles_(tiles), count_(count) {
    const int64_t size = args.storage == Storage::kFloat32 ? 4 : 2;
    row_bytes_ = args.kv_heads * args.dim * size;
    offset_ = item.head * args.dim * size;
    run_bytes_ = item.heads * args.dim * size;
    whole_rows_ = item.heads == args.kv_heads;
  }

  // The caller begins its next tile.
  void pass_tile() {
    ++passed_;
    if (cursor_ >= end_) next_run();
  }

  // Fetches `Lines` lines.
  template <int Lines>
  EAPO_INLINE void step() {
    if (cursor_ >= end_) return;
    if (end_ - cursor_ < Lines * kLine) return step_over_runs(Lines);
    const char* cursor = cursor_;
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(cursor + i * kLine);
    cursor_ = cursor + Lines * kLine;
    if (cursor_ >= end_) next_run();
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kAheadBytes = 1 << 16;

  void next_run();
  void step_over_runs(int lines);

  const AttentionArgs& args_;
  const Tile* tiles_;
  int64_t count_;
  int64_t row_bytes_, offset_, run_bytes_;
  bool whole_rows_;
  const char *cursor_ = nullptr, *end_ = nullptr;
  int64_t tile_ = 0, key_ = 0;  // of the next run; tiles from count_ on are those of the values
  int64_t passed_ = 0;
  int64_t ahead_ = 0;  // bytes
};

}  // namespace eapo::cpu
