// Fetches the keys and values of a work item into the cache ahead of their use, a few lines at a
// time, so that memory and cores are busy together. A burst of prefetches would stall the core.
#pragma once

#include <cstdint>

#include "cpu/attention_plan.h"
#include "cpu/targets.h"

namespace eapo::cpu {

// Consecutive keys of a segment and the members of the work item that read them.
struct Tile {
  int64_t segment, first, keys, member, members;
};

class Fetcher {
 public:
  // Goes through the tiles once for their keys, then once for their values.
  Fetcher(const AttentionArgs& args, const AttentionItem& item, const Tile* tiles, int64_t count);

  // The caller goes on to its next tile.
  void pass_tile();

  // Fetches `Lines` lines, none when it is far enough ahead.
  template <int Lines>
  EAPO_INLINE void step() {
    if (cursor_ >= end_) return;
    if (end_ - cursor_ < Lines * kLine) return step_over_runs(Lines);
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(cursor_ + i * kLine, 0, kLevel2);
    cursor_ += Lines * kLine;
    if (cursor_ >= end_) next_run();
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes
  // Into the second-level cache: the few fill buffers of the first level limit what is under way.
  static constexpr int kLevel2 = 2;

  void next_run();
  void step_over_runs(int lines);

  const AttentionArgs& args_;
  const Tile* tiles_;
  int64_t count_;
  bool whole_rows_;                        // the item has all heads of a key
  int64_t row_bytes_, offset_, run_bytes_;  // of a key: all heads, the item's heads
  const char *cursor_ = nullptr, *end_ = nullptr;  // what is left of the run
  int64_t tile_ = 0, key_ = 0;  // of the next run; tiles from count_ on are those of the values
  int64_t passed_ = 0;          // tiles that the caller has begun
  int64_t ahead_bytes_ = 0;     // fetched beyond those
};

}  // namespace eapo::cpu
