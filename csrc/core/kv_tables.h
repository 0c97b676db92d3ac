#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kv_pool.h"
#include "sequence.h"

namespace eapo {

// What a row need not compute.
struct Prefix {
  std::vector<BlockId> hits = {};  // published blocks that follow its own
  int free_hits = 0;               // of these, the ones without an owner
  int tokens = 0;                  // its own, those of the hits, and swapped-out ones behind them
};

// Moves KV blocks between the pool and the rows of one scheduler, and keeps the block moves that
// the next forward must begin with: all swaps out, then all swaps in, then all copies, each kind in
// any order.
//
// That order never reads a block too late or too early:
//  - Only rows that are not planned give blocks away, and what a row gets in a plan it uses in that
//    plan. So a block that is swapped out held its content before the step, and no block is the
//    target of two moves.
//  - A device block that is swapped out may be handed out again within the plan: all writes to it
//    (a swap in, a copy, the forward) come after all swaps out.
//  - Nobody gives the source of a copy away before the plan ends (see copy_sources()), so no other
//    copy is written to it.
//  - A host block that is swapped in becomes free when the plan ends, so no swap out overwrites it
//    before.
class KvTables {
 public:
  KvTables(std::shared_ptr<KvPool> pool, bool prefix_cache);

  KvPool& pool() { return *pool_; }
  const KvPool& pool() const { return *pool_; }

  // Blocks at the row's end that nobody else owns.
  int blocks_alone(const Sequence& row) const;

  // What the row could take instead of computing it; takes nothing. At least one token of the row
  // remains to be computed.
  Prefix find_prefix(const Sequence& row) const;

  // Blocks that are missing before the row can hold `end` tokens, prefix included; <= 0: none.
  int shortfall(const Sequence& row, const Prefix& prefix, int end) const;

  // The largest `end` that the free blocks allow the row.
  int reachable(const Sequence& row, const Prefix& prefix) const;

  // Where the row must stop computing because swapped-out tokens go on; its length otherwise.
  int stop(const Sequence& row, const Prefix& prefix) const;

  // Gives the row its prefix and blocks for `end` tokens; a shared partial block is copied.
  void extend(Sequence& row, const Prefix& prefix, int end);

  // Publishes the row's full blocks, now that their KV is computed. Where an equal block is
  // published already, the row changes over to it. A row whose KV is of several epochs, or of an
  // older one, publishes nothing.
  void publish(Sequence& row);

  // Takes all blocks of the row from index `keep` on. With `swap` the ones that it alone owns go
  // to the host while there is room and no hole before what is there already.
  void cut(Sequence& row, int keep, bool swap);
  void drop(Sequence& row);

  // The member takes part in all blocks of the leader.
  void fork(const Sequence& leader, Sequence& member);

  // The moves of a plan as pairs: (block, host block), (host block, block), (source, destination).
  struct Moves {
    std::vector<BlockId> swap_out, swap_in, copies;
  };
  Moves end_plan();

  // Blocks that the copies of this plan read: they must keep their owners until it ends.
  const std::vector<BlockId>& copy_sources() const { return copied_from_; }

  struct Totals {
    std::int64_t shared_blocks = 0;       // by fork
    std::int64_t copied_blocks = 0;       // on write
    std::int64_t hit_tokens = 0;          // found instead of computed
    std::int64_t swapped_out_blocks = 0;
    std::int64_t swapped_in_blocks = 0;
  };
  const Totals& totals() const { return totals_; }

  // Whether the row's next token goes to a block of several owners, so that it must be copied.
  bool writes_shared_block(const Sequence& row) const;

 private:
  bool looks_up(const Sequence& row) const;
  void take_hits(Sequence& row, const Prefix& prefix);
  void swap_in(Sequence& row);
  bool swap_out(Sequence& row, int index);

  std::shared_ptr<KvPool> pool_;
  bool prefix_cache_;
  Moves moves_;
  std::vector<BlockId> copied_from_;    // by the copies of this plan
  std::vector<BlockId> withheld_host_;  // swapped in by this plan
  Totals totals_;
};

}  // namespace eapo
