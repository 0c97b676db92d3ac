// Random operations on small pools: every row must become what it becomes alone.
//
//     test_scheduler_random [--operations 100000] [--seeds 3] [--first-seed 0]
//
// After every operation Scheduler::check() walks all rows, blocks and lists; it is cheap, as pools
// are small. Every plan runs on a fake cache and every event is compared with LoneRow's.

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "core/scheduler.h"
#include "fake_model.h"
#include "lone_row.h"

using namespace eapo;
using namespace eapo_test;

namespace {

const Strings kPieces{"<", "q", ">", "/",  "<q", "q>", "a<q>/", "",   "b",  "bb",
                      "c", "d", "e", "ab", "ca", "de", "f",     "ff", "fg", "g"};

const std::vector<RulesSpec> kRules{
    {{}, {}, {}, {}, {}},
    {{18, 19}, {"<q>", "bb"}, {}, {}, {}},
    {{17}, {"de"}, {"q>", "<q", "f"}, {}, {}},
    {{}, {}, {"c", "<"}, {2, 13}, {"q>", "ff", "ab"}},
};

class Fuzz {
 public:
  Fuzz(unsigned seed, int operations) : random_(seed), left_(operations) {}

  void run() {
    while (left_ > 0 && failures == 0) episode();
  }

  std::map<std::string, std::int64_t> totals;

 private:
  int below(int bound) { return static_cast<int>(random_() % static_cast<unsigned>(bound)); }
  bool chance(int percent) { return below(100) < percent; }

  template <class T>
  const T& any(const std::vector<T>& values) {
    return values[below(static_cast<int>(values.size()))];
  }

  std::vector<TokenId> tokens(int count) {
    std::vector<TokenId> ids(count);
    for (TokenId& id : ids) id = below(static_cast<int>(kPieces.size()));
    return ids;
  }

  // A pool and two schedulers, one after the other.
  void episode() {
    const int block_size = 1 + below(5), num_blocks = 6 + below(40);
    const int host_blocks = chance(50) ? below(24) : 0;
    pool_ = std::make_shared<KvPool>(num_blocks, block_size, host_blocks);
    cache_.emplace(num_blocks, block_size, host_blocks);
    for (int turn = 0; turn < 2; ++turn) {
      const SchedulerConfig config{1 + below(9), 1 + below(30), 20 + below(40), chance(85)};
      max_context_ = std::min(config.max_context, num_blocks * block_size);
      scheduler_ = std::make_unique<Scheduler>(pool_, vocabulary_, config);
      rows_.clear();
      for (int i = 0; i < 800; ++i) operate();
      if (turn == 0 && chance(50)) drain();
      count(scheduler_->stats());
      if (chance(50)) scheduler_->plan();
      scheduler_.reset();
      EXPECT(pool_->num_free() == num_blocks && pool_->num_host_free() == host_blocks);
      pool_->check();
    }
  }

  void operate() {
    --left_;
    const int choice = below(100);
    if (choice < 50) {
      step();
    } else if (choice < 60) {
      if (rows_.size() < 40) add();
    } else if (choice < 97) {
      edit(choice);
    } else {
      pool_->advance_epoch();
    }
    scheduler_->check();
  }

  void edit(int choice) {
    const std::vector<SeqId> parked = all_in(LoneRow::State::kParked);
    const std::vector<SeqId> runnable = all_in(LoneRow::State::kRunnable);
    const std::vector<SeqId> done = all_in(LoneRow::State::kDone);
    if (choice < 74 && !parked.empty()) {
      inject(any(parked));
    } else if (choice < 79 && !parked.empty()) {
      const double wait = chance(20) ? std::numeric_limits<double>::infinity() : below(30);
      scheduler_->expect_wait(any(parked), wait);
    } else if (choice < 81 && !parked.empty()) {
      set_rules(any(parked));
    } else if (choice < 83 && !runnable.empty()) {
      set_rules(any(runnable));
    } else if (choice < 84 && !runnable.empty()) {
      finish(any(runnable));
    } else if (choice < 85 && !parked.empty()) {
      finish(any(parked));
    } else if (choice < 86 && !runnable.empty()) {
      release(any(runnable));
    } else if (choice < 96 && !done.empty()) {
      release(any(done));
    } else if (choice < 97) {
      scheduler_->set_prefill_rate(any(std::vector<double>{0.1, 5.0, 100.0}));
    }
  }

  void add() {
    static const std::vector<std::vector<TokenId>> kHeads{
        {8, 9, 10, 11, 8, 9, 10, 11, 12, 13, 14}, {8, 9, 10, 11, 12, 11, 10, 9, 8}, {}};
    std::vector<TokenId> prompt = any(kHeads);
    prompt.resize(below(static_cast<int>(prompt.size()) + 1));
    for (const TokenId id : tokens(1 + below(6))) prompt.push_back(id);
    prompt.resize(std::min<std::size_t>(prompt.size(), max_context_ - 1));
    SamplingSpec sampling{.max_tokens = 1 + below(20), .temperature = 0.5F, .seed = 7, .step = 1};
    sampling.prompt_id = below(1000);
    if (chance(30)) sampling.temperature_schedule = {1.0F, 0.75F, 0.25F};
    const RulesSpec& rules = any(kRules);
    const auto seqs = scheduler_->add_group(prompt, 1 + below(5), scheduler_->add_rules(rules),
                                            sampling);
    for (std::size_t i = 0; i < seqs.size(); ++i) {
      rows_.emplace(seqs[i], LoneRow{.pieces = &kPieces,
                                     .group = seqs.front(),
                                     .sample = static_cast<int>(i),
                                     .max_context = max_context_,
                                     .sampling = sampling,
                                     .rules = rules,
                                     .tokens = prompt});
    }
  }

  void inject(SeqId seq) {
    const auto ids = tokens(below(8));
    EXPECT(scheduler_->inject(seq, ids) == rows_.at(seq).inject(ids));
  }

  void set_rules(SeqId seq) {
    rows_.at(seq).rules = any(kRules);
    scheduler_->set_rules(seq, scheduler_->add_rules(rows_.at(seq).rules));
  }

  void finish(SeqId seq) {
    scheduler_->finish(seq, "cancelled");
    rows_.at(seq).state = LoneRow::State::kDone;
    rows_.at(seq).reason = "cancelled";
    compare(seq);
  }

  void release(SeqId seq) {
    compare(seq);
    scheduler_->release(seq);
    rows_.erase(seq);
  }

  void drain() {
    for (int i = 0; i < 3000; ++i) {
      if (step()) continue;
      const auto parked = all_in(LoneRow::State::kParked);
      if (parked.empty()) return;
      for (const SeqId seq : parked) inject(seq);
    }
    fail("rows are left after 3000 steps", __FILE__, __LINE__);
  }

  // One plan, fake forward and commit; false if nothing can run.
  bool step() {
    const auto runnable = all_in(LoneRow::State::kRunnable);
    const auto plan = scheduler_->plan();
    EXPECT(plan.has_value() == !runnable.empty());
    if (!plan) return false;
    scheduler_->check();
    EXPECT(std::ranges::find(plan->seqs, runnable.front()) != plan->seqs.end());
    cache_->forward(*plan, pool_->epoch());
    check_cache(*plan);
    check_spans(*plan);
    if (chance(2)) pool_->advance_epoch();
    commit(*plan);
    return true;
  }

  void check_cache(const StepPlan& plan) {
    for (int row = 0; row < plan.num_rows(); ++row) {
      LoneRow& lone = rows_.at(plan.seqs[row]);
      for (int at = 0; at < plan.kv_lens[row]; ++at) {
        const auto entry = cache_->entry(plan, row, at);
        EXPECT(entry.kv == lone.kv_at(at));
        const auto known = static_cast<std::size_t>(at) < lone.epochs.size();
        EXPECT(entry.epoch == pool_->epoch() || (known && entry.epoch == lone.epochs[at]));
        if (!known) lone.epochs.push_back(entry.epoch);
        lone.epochs[at] = entry.epoch;
      }
      if (lone.position() > 0 || plan.kv_lens[row] > lone.prompt_length) continue;
      for (auto& [seq, member] : rows_) {  // the prompt is computed once, for all members
        if (member.group == lone.group && member.position() == 0) member.epochs = lone.epochs;
      }
    }
  }

  void check_spans(const StepPlan& plan) {
    int end = 0;
    for (std::size_t i = 0; i < plan.shared_lens.size(); ++i) {
      const int first = plan.shared_spans[2 * i], count = plan.shared_spans[2 * i + 1];
      const int blocks = plan.shared_lens[i] / pool_->block_size();
      EXPECT(first >= end && count >= 2 && blocks >= 1);
      end = first + count;
      for (int row = first; row < end; ++row) {
        EXPECT(plan.cu_q[row + 1] - plan.cu_q[row] == 1);
        EXPECT(rows_.at(plan.seqs[row]).group == rows_.at(plan.seqs[first]).group);
        EXPECT(plan.kv_lens[row] > plan.shared_lens[i]);
        const BlockId* const table = &plan.block_tables[row * plan.table_width];
        EXPECT(std::equal(table, table + blocks, &plan.block_tables[first * plan.table_width]));
      }
    }
    EXPECT(end <= plan.num_rows());
  }

  void commit(const StepPlan& plan) {
    std::vector<std::int64_t> sampled;
    std::vector<float> logprobs;
    std::map<SeqId, LoneRow::Event> expected;
    std::size_t ban = 0;
    for (std::size_t i = 0; i < plan.sample_seqs.size(); ++i) {
      LoneRow& lone = rows_.at(plan.sample_seqs[i]);
      const std::vector<TokenId> banned = lone.banned();
      for (const TokenId id : banned) {
        EXPECT(ban < plan.ban_ids.size() && plan.ban_ids[ban] == id &&
               plan.ban_rows[ban] == static_cast<int>(i));
        ++ban;
      }
      EXPECT(plan.uniforms[i] == lone.uniform());
      EXPECT(plan.temperatures[i] == lone.temperature());
      const std::uint64_t kv = kv_of_sample(plan, i);
      sampled.push_back(
          fake_token(kv, plan.uniforms[i], banned, static_cast<int>(kPieces.size())));
      logprobs.push_back(-plan.uniforms[i]);
      const auto [any, event] = lone.draw(banned);
      if (any) expected.emplace(plan.sample_seqs[i], event);
    }
    EXPECT(ban == plan.ban_ids.size());
    const std::vector<float> kept(sampled.size(), 1.0F);
    for (const Event& event : scheduler_->commit(sampled, logprobs, kept)) {
      const auto found = expected.find(event.seq);
      EXPECT(found != expected.end());
      if (found == expected.end()) continue;
      EXPECT((found->second == LoneRow::Event{event.kind == Event::Kind::kParked, event.pattern,
                                              event.overshoot}));
      expected.erase(found);
    }
    EXPECT(expected.empty());
    for (const SeqId seq : plan.sample_seqs) compare(seq);
  }

  std::uint64_t kv_of_sample(const StepPlan& plan, std::size_t sample) {
    const auto token = static_cast<int>(plan.logits_rows[plan.sample_rows[sample]]);
    const auto row = static_cast<int>(std::ranges::upper_bound(plan.cu_q, token) -
                                      plan.cu_q.begin()) - 1;
    EXPECT(token == plan.cu_q[row + 1] - 1);
    return cache_->entry(plan, row, plan.kv_lens[row] - 1).kv;
  }

  void compare(SeqId seq) {
    const Sequence& got = scheduler_->sequence(seq);
    const LoneRow& lone = rows_.at(seq);
    EXPECT(got.tokens == lone.tokens);
    EXPECT(got.logprobs == lone.logprobs);
    EXPECT(got.mask == lone.mask);
    EXPECT(got.finish_reason == lone.reason);
    std::map<int, std::vector<TokenId>> bans;
    for (const BanRun& run : got.ban_runs) {
      for (int at = run.begin; at < run.begin + run.count; ++at) bans[at] = *run.ids;
    }
    EXPECT(bans == lone.bans);
  }

  std::vector<SeqId> all_in(LoneRow::State state) const {
    std::vector<SeqId> seqs;
    for (const auto& [seq, row] : rows_) {
      if (row.state == state) seqs.push_back(seq);
    }
    return seqs;
  }

  void count(const SchedulerStats& stats) {
    totals["preemptions"] += stats.preemptions;
    totals["hit tokens"] += stats.blocks.hit_tokens;
    totals["copied blocks"] += stats.blocks.copied_blocks;
    totals["swapped-in blocks"] += stats.blocks.swapped_in_blocks;
    totals["evicted blocks"] += stats.evicted_blocks;
    totals["decode tokens"] += stats.decode_tokens;
  }

  std::mt19937 random_;
  int left_;
  int max_context_ = 0;
  std::shared_ptr<const Vocabulary> vocabulary_ = std::make_shared<const Vocabulary>(kPieces);
  std::shared_ptr<KvPool> pool_;
  std::optional<FakeCache> cache_;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<SeqId, LoneRow> rows_;
};

}  // namespace

int main(int argc, char** argv) {
  const int operations = option(argc, argv, "--operations", 100'000);
  const int seeds = option(argc, argv, "--seeds", 3);
  const int first = option(argc, argv, "--first-seed", 0);
  const auto rows_become_what_they_become_alone = [&] {
    for (int seed = first; seed < first + seeds && failures == 0; ++seed) {
      Fuzz fuzz(static_cast<unsigned>(seed), operations);
      fuzz.run();
      std::cout << "seed " << seed << ": " << operations << " operations";
      for (const auto& [name, total] : fuzz.totals) {
        std::cout << ", " << total << ' ' << name;
        EXPECT(total > 0);
      }
      std::cout << std::endl;
    }
  };
  return run(rows_become_what_they_become_alone);
}
