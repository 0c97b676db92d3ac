#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "core/scheduler.h"

using namespace eapo;

namespace {

constexpr int kVocabulary = 31;

std::vector<std::string> letters() {
  std::vector<std::string> bytes;
  for (int i = 0; i < kVocabulary; ++i) bytes.emplace_back(1 + i % 2, static_cast<char>('a' + i));
  return bytes;
}

// The next token is a function of the draw alone, so a row's tokens tell whether its draws moved.
std::vector<Event> commit(Scheduler& scheduler, const StepPlan& plan) {
  std::vector<std::int64_t> tokens;
  for (const float uniform : plan.uniforms) {
    tokens.push_back(static_cast<std::int64_t>(uniform * kVocabulary));
  }
  const std::vector<float> ones(tokens.size(), 1.0F);
  return scheduler.commit(tokens, ones, ones);
}

struct Shape {
  int num_blocks, block_size, max_batch, max_step_tokens, max_context;
  int host_blocks = 0;
};

struct Machine {
  explicit Machine(const Shape& shape)
      : pool(std::make_shared<KvPool>(shape.num_blocks, shape.block_size, shape.host_blocks)),
        scheduler(pool, std::make_shared<const Vocabulary>(letters()),
                  {shape.max_batch, shape.max_step_tokens, shape.max_context}) {}

  std::shared_ptr<KvPool> pool;
  Scheduler scheduler;
};

struct Run {
  std::map<SeqId, std::vector<TokenId>> tokens;
  SchedulerStats stats;
};

// Groups with parks, injections and early finishes until nothing is left.
Run run_all(const Shape& shape) {
  Machine machine(shape);
  Scheduler& scheduler = machine.scheduler;
  const int rules = scheduler.add_rules({{30}, {"ff"}, {"c", "g"}, {5}, {"hh"}});
  const std::vector<TokenId> prompt{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  std::vector<SeqId> seqs;
  for (int group = 0; group < 6; ++group) {
    const auto head = std::span(prompt).first(static_cast<std::size_t>(5 + group));
    for (const SeqId seq : scheduler.add_group(head, 1 + group % 4, rules,
                                               {.max_tokens = 20, .prompt_id = group})) {
      seqs.push_back(seq);
    }
  }
  while (auto plan = scheduler.plan()) {
    scheduler.check();
    for (const Event& event : commit(scheduler, *plan)) {
      if (event.kind != Event::Kind::kParked) continue;
      scheduler.inject(event.seq, std::span(prompt).first(3));
    }
    scheduler.check();
  }
  Run run{{}, scheduler.stats()};
  for (const SeqId seq : seqs) {
    run.tokens[seq] = scheduler.sequence(seq).tokens;
    EXPECT(scheduler.sequence(seq).done());
    scheduler.release(seq);
  }
  scheduler.check();
  return run;
}

void results_depend_on_no_shape() {
  const Run reference = run_all({512, 16, 64, 256, 60});
  const std::vector<Shape> shapes{{60, 1, 64, 256, 60}, {15, 4, 64, 64, 60},
                                            {20, 3, 5, 7, 60},    {512, 16, 1, 1, 60},
                                            {64, 16, 3, 2, 60},   {15, 4, 64, 64, 60, 9}};
  for (const Shape& shape : shapes) {
    const Run run = run_all(shape);
    EXPECT(run.tokens == reference.tokens);
    EXPECT(run.stats.running == 0 && run.stats.waiting == 0 && run.stats.parked == 0);
    EXPECT(run.stats.free_blocks == shape.num_blocks);
  }
}

void tight_pools_preempt() {
  EXPECT(run_all({15, 4, 64, 64, 60}).stats.preemptions > 0);
  EXPECT(run_all({512, 16, 64, 256, 60}).stats.preemptions == 0);
}

void unfinished_rows_can_be_released_in_any_state() {
  for (int steps = 0; steps < 9; ++steps) {
    Machine machine({9, 2, 4, 5, 16});
    Scheduler& scheduler = machine.scheduler;
    const int rules = scheduler.add_rules({});
    const std::vector<TokenId> prompt{1, 2, 3, 4, 5, 6, 7};
    auto seqs = scheduler.add_group(prompt, 5, rules, {.max_tokens = 9});
    for (int i = 0; i < steps; ++i) commit(scheduler, *scheduler.plan());
    for (const SeqId seq : seqs) {
      scheduler.release(seq);
      scheduler.check();
    }
    EXPECT(scheduler.stats().free_blocks == 9);
    EXPECT(!scheduler.plan());
  }
}

void refuses_misuse() {
  Machine machine({9, 2, 4, 5, 16});
  Scheduler& scheduler = machine.scheduler;
  const std::vector<TokenId> prompt{1, 2, 3};
  const int rules = scheduler.add_rules({});
  THROWS(InvalidArgument, "rules 7", scheduler.add_group(prompt, 1, 7, {}));
  THROWS(InvalidState, "without a planned step", scheduler.commit({}, {}, {}));
  const SeqId seq = scheduler.add_group(prompt, 1, rules, {}).front();
  const auto plan = scheduler.plan();
  THROWS(InvalidState, "plan() was called twice", scheduler.plan());
  THROWS(InvalidState, "commit() first", scheduler.finish(seq, "stop"));
  THROWS(InvalidArgument, "the step has 1 samples, got 0 tokens", scheduler.commit({}, {}, {}));
  commit(scheduler, *plan);
  THROWS(InvalidArgument, "it finished as 'length'", scheduler.finish(seq, "stop"));
}

void a_pool_serves_schedulers_one_after_another() {
  const auto pool = std::make_shared<KvPool>(9, 2);
  const auto vocabulary = std::make_shared<const Vocabulary>(letters());
  const std::vector<TokenId> prompt{1, 2, 3, 4, 5, 6, 7};
  for (const int hit_tokens : {0, 6}) {
    Scheduler scheduler(pool, vocabulary, {4, 9, 16});
    scheduler.add_group(prompt, 2, scheduler.add_rules({}), {.max_tokens = 9});
    commit(scheduler, *scheduler.plan());
    THROWS(InvalidState, "4 of 9 blocks of the pool are in use",
           Scheduler(pool, vocabulary, {4, 9, 16}));
    EXPECT(scheduler.stats().blocks.hit_tokens == hit_tokens);
    scheduler.plan();
  }
  EXPECT(pool->num_free() == 9);
  pool->check();
}

}  // namespace

int main() {
  return eapo_test::run(results_depend_on_no_shape, tight_pools_preempt,
                        unfinished_rows_can_be_released_in_any_state, refuses_misuse,
                        a_pool_serves_schedulers_one_after_another);
}
