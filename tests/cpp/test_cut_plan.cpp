#include <algorithm>
#include <memory>
#include <vector>

#include "check.h"
#include "core/cut_plan.h"

using namespace eapo;
using namespace eapo_test;

namespace {

// Rows over a pool of 10 blocks: 0 and 1 belong to a, b and c, 2 and 3 to a, 4 to b, 5 to c.
struct World {
  KvPool pool{10, 4};
  Sequence a{}, b{}, c{};
  CutPlan plan;

  World() {
    for (int block = 0; block < 6; ++block) pool.allocate();
    for (const BlockId block : {0, 0, 1, 1}) pool.take(block);
    a.blocks = {0, 1, 2, 3};
    b.blocks = {0, 1, 4};
    c.blocks = {0, 1, 5};
  }

  // What each row keeps, -1 if it gives up nothing.
  std::vector<int> keeps() {
    std::vector<int> kept{-1, -1, -1};
    for (const CutPlan::Cut& cut : plan.cuts()) {
      kept[cut.row == &a ? 0 : cut.row == &b ? 1 : 2] = cut.keep;
    }
    return kept;
  }
};

void tails_go_first_and_no_more_than_needed() {
  World world;
  world.plan.begin(world.pool, 1);
  world.plan.add(world.a);
  EXPECT(world.plan.enough());
  EXPECT((world.keeps() == std::vector{3, -1, -1}));
}

void shared_blocks_are_free_once_all_owners_gave_them_up() {
  World world;
  world.plan.begin(world.pool, 6);
  for (Sequence* row : {&world.a, &world.b, &world.c}) world.plan.add(*row);
  EXPECT(world.plan.freed() == 4);
  world.plan.deepen();
  EXPECT(world.plan.enough());
  EXPECT((world.keeps() == std::vector{0, 0, 0}));
}

void a_row_keeps_shared_blocks_that_would_not_become_free() {
  World world;
  world.plan.begin(world.pool, 5);
  for (Sequence* row : {&world.a, &world.b}) world.plan.add(*row);
  world.plan.deepen();
  EXPECT(!world.plan.enough() && world.plan.freed() == 3);
  EXPECT((world.keeps() == std::vector{2, 2, -1}));
}

void pinned_blocks_do_not_count() {
  World world;
  const std::vector<BlockId> pinned{3, 5};
  world.plan.begin(world.pool, 2);
  world.plan.pin(pinned);
  world.plan.add(world.a);
  world.plan.add_all(world.c);
  EXPECT(world.plan.freed() == 0);
  EXPECT((world.keeps() == std::vector{-1, -1, -1}));
  world.plan.begin(world.pool, 2);  // the pins are gone
  world.plan.add(world.a);
  EXPECT((world.keeps() == std::vector{2, -1, -1}));
}

// Row c writes to block 1, once a and b have let go of it.
void a_block_that_is_wanted_alone_counts_when_its_other_owners_are_gone() {
  World world;
  world.plan.begin(world.pool, 4);
  world.plan.want_alone(1);
  for (Sequence* row : {&world.a, &world.b}) world.plan.add(*row);
  EXPECT(world.plan.freed() == 3);
  world.plan.deepen();
  EXPECT(world.plan.enough());
  EXPECT((world.keeps() == std::vector{1, 1, -1}));
}

}  // namespace

int main() {
  return run(tails_go_first_and_no_more_than_needed,
             shared_blocks_are_free_once_all_owners_gave_them_up,
             a_row_keeps_shared_blocks_that_would_not_become_free, pinned_blocks_do_not_count,
             a_block_that_is_wanted_alone_counts_when_its_other_owners_are_gone);
}
