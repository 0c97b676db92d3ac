#pragma once

#include <climits>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cut_plan.h"
#include "growth_curve.h"
#include "kv_pool.h"
#include "kv_tables.h"
#include "length_estimate.h"
#include "rules.h"
#include "sequence.h"
#include "step_plan.h"
#include "types.h"
#include "vocabulary.h"

namespace eapo {

struct SchedulerConfig {
  int max_batch;        // rows that may compute in one step; parked rows don't count
  int max_step_tokens;  // tokens of one step, prefill and decode together
  int max_context;      // tokens of a row, the prompt included
  bool prefix_cache = true;  // find published blocks, and publish; forks share either way
};

struct Event {
  enum class Kind : std::uint8_t { kFinished, kParked };
  SeqId seq;
  Kind kind;
  int pattern;    // index in the stop (finished) or park (parked) patterns of its rules, or -1
  int overshoot;  // bytes of the last token behind the pattern
};

struct SchedulerStats {
  int free_blocks;
  int free_host_blocks;
  int running;                    // rows in the batch
  int waiting;                    // runnable rows outside it
  int parked;
  std::int64_t preemptions;       // running rows that lost their slot or KV, so far
  std::int64_t prefill_tokens;    // planned so far: prompts, injections, recomputation
  std::int64_t decode_tokens;     // planned so far, one a row and step
  KvTables::Totals blocks;        // so far
  std::int64_t evicted_blocks;    // findable blocks handed out anew, so far
};

// Paged continuous batching. plan() picks the tokens of the next forward pass and gives them KV
// blocks, commit() takes the sampled tokens; between the two the planned rows are fixed.
//
// A step is filled in this order, oldest row first within each line, until the budget of
// max_step_tokens is spent:
//   1. the oldest runnable row: it gets a slot and blocks whatever it takes (progress guarantee)
//   2. rows of the batch with one token to compute (decode)
//   3. rows that resume with more than one: first those in the batch, then, given a slot and blocks
//      for the whole row, injected rows, then preempted and freshly forked ones
//   4. prompts: first those in the batch, then new ones
// A row outside the batch that finds no room keeps those behind it out too.
//
// When blocks run out, KV is dropped from tails: parked rows give first (the longest expected wait
// first), then rows newer than the one in need (of the group begun last, of those begun together
// the one with most unfinished rows); blocks with several owners go after the others. What a row
// samples depends on none of this.
class Scheduler {
 public:
  // The pool must be unused: schedulers share it one after another.
  Scheduler(std::shared_ptr<KvPool> pool, std::shared_ptr<const Vocabulary> vocabulary,
            const SchedulerConfig& config);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  int add_rules(RulesSpec spec);  // equal rules get equal ids
  std::vector<SeqId> add_group(std::span<const TokenId> prompt, int n, int rules,
                               const SamplingSpec& sampling);

  std::optional<StepPlan> plan();  // nothing when no row is runnable
  // A token of -1 says that there was no distribution to sample from: its row ends as "error".
  std::vector<Event> commit(std::span<const std::int64_t> tokens, std::span<const float> logprobs,
                            std::span<const float> kept_mass);

  bool inject(SeqId seq, std::span<const TokenId> ids);
  void finish(SeqId seq, std::string_view reason);
  void set_rules(SeqId seq, int rules);
  void release(SeqId seq);
  void clear();  // releases all rows, the planned step is forgotten

  // Seconds until a parked row's injection (infinity: unknown), and how fast this machine prefills.
  // A parked row keeps its KV as long as that wait is shorter than prefilling the whole pool.
  void expect_wait(SeqId seq, double seconds);
  void set_prefill_rate(double tokens_per_second);

  const Sequence& sequence(SeqId seq) const;
  SchedulerStats stats() const;
  void check() const;  // throws InvalidState on a broken invariant

 private:
  // Whose blocks a row may take.
  struct Victims {
    SeqId newer_than;  // rows in the batch or waiting for a slot, if their id is larger
    bool kept;         // parked rows that should keep their KV
  };
  static constexpr SeqId kParkedOnly = INT_MAX;  // no row is newer
  using Queue = std::set<Sequence*, ById>;

  Sequence& editable(SeqId seq, const char* action) const;
  Sequence& find(SeqId seq) const;
  const Rules& rules_at(int rules) const;

  Sequence& add_row(const std::shared_ptr<Group>& group, int sample, const Rules& rules,
                    std::span<const TokenId> prompt);
  void enter(Sequence& row, Place place, State state);
  void leave(Sequence& row);
  void retire(Sequence& row, std::string_view reason);
  void hand_over(Sequence& leader);

  Sequence* oldest_runnable() const;
  void plan_oldest(Sequence& row);
  void plan_decode_rows();
  void plan_batch_prefill(bool prompts);
  bool batch_full() const { return static_cast<int>(batch_.size()) >= max_batch_; }
  int decode_rows_besides(const Sequence& row) const;
  void schedule(Sequence& row, const Prefix& prefix, int tokens, Victims victims);

  bool admit_from(Queue& queue);
  bool make_room(const Sequence& row, const Prefix& prefix);
  void add_growth(const Sequence& row);
  void admit(Sequence& row);
  void preempt(Sequence& row);

  bool reclaim(const Sequence& row, const Prefix& prefix, int end, Victims victims);
  int parked_supply(int wanted, bool kept);
  bool find_cuts(const Sequence& row, const Prefix& prefix, int target, Victims victims);
  void cut_parked(bool kept);
  void cut_newer_than(SeqId id);
  void carry_out_cuts();
  bool keeps(const Sequence& parked) const;
  void file_parked(Sequence& row);
  void remove_parked(Sequence& row);
  const std::vector<Group*>& victim_groups();

  void begin_step();
  void emit_step();
  void emit(Sequence& row);
  void emit_tokens(const Sequence& row);
  void emit_samples(Sequence& row);
  void emit_sample(Sequence& row, int logits_row);
  void emit_block_tables();
  void emit_shared_spans();

  void check_commit(std::span<const std::int64_t> tokens, std::size_t num_logprobs,
                    std::size_t num_kept_mass) const;
  void advance(Sequence& row);
  void fork(Sequence& leader);
  std::optional<Event> settle(Sequence& row, TokenId token);
  Event finish_sampled(Sequence& row, std::string_view reason, int pattern, int overshoot);
  Event park(Sequence& row, int pattern, int overshoot);

  void check_row(const Sequence& row) const;
  void check_kv(const Sequence& row) const;
  void check_places() const;
  void check_blocks() const;

  SchedulerConfig config_;
  int max_batch_;    // no more than max_step_tokens, so that every decode row finds a token free
  int max_context_;  // no more than the pool, so that a row alone always fits
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::vector<std::unique_ptr<Rules>> rules_;
  KvTables kv_;
  std::int64_t evictions_before_;  // of the pool

  SeqId next_id_ = 0;
  std::unordered_map<SeqId, std::unique_ptr<Sequence>> rows_;
  std::vector<Sequence*> batch_;             // by id, so the oldest comes first
  Queue injected_;                           // without a slot, injected
  Queue ready_;                              // without a slot, preempted or freshly forked
  Queue waiting_;                            // leaders of groups that have not begun
  // Parked rows that have blocks: of their own, and only such as others own too.
  std::set<Sequence*, LongestWait> parked_, parked_sharing_;
  std::vector<Group*> groups_;               // begun and unfinished, in the order of beginning
  int num_parked_ = 0;
  int unfinished_ = 0;  // rows, the members of groups that have not begun included

  double prefill_rate_ = 0;  // tokens a second; 0: unknown
  LengthEstimate lengths_;

  bool pending_ = false;  // planned, not committed
  int budget_ = 0;
  GrowthCurve growth_;                   // of the batch
  struct {
    bool kept = false;                   // whether parked rows that should keep their KV count
    int blocks = 0;
    Sequence* last = nullptr;            // counted
  } supply_;                             // of parked rows, in this plan
  bool parked_exhausted_ = false;        // parked rows have nothing more to give in this plan
  std::vector<Group*> victim_groups_;    // of this plan, once somebody asked
  CutPlan cuts_;
  StepPlan step_;
  std::vector<Sequence*> planned_;      // rows of the step
  std::vector<Sequence*> samples_;      // rows of its samples
  std::int64_t plans_ = 0;
  std::int64_t parks_ = 0;
  std::int64_t preemptions_ = 0;
  std::int64_t prefill_tokens_ = 0;
  std::int64_t decode_tokens_ = 0;
};

}  // namespace eapo
