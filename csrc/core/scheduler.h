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

#include "kv_pool.h"
#include "rules.h"
#include "sequence.h"
#include "step_plan.h"
#include "types.h"
#include "vocabulary.h"

namespace eapo {

struct SchedulerConfig {
  int num_blocks;
  int block_size;
  int max_batch;       // rows that may compute in one step; parked rows don't count
  int max_step_tokens; // tokens of one step, prefill and decode together
  int max_context;     // tokens of a row, the prompt included
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
  int running;                 // rows in the batch
  int waiting;                 // runnable rows outside it
  int parked;
  std::int64_t preemptions;    // running rows that lost their slot or KV, so far
  std::int64_t prefill_tokens; // planned so far: prompts, injections, recomputation
  std::int64_t decode_tokens;  // planned so far, one a row and step
  std::int64_t shared_blocks;  // blocks taken from a sibling instead of computed, so far
  std::int64_t copied_blocks;  // copies on write, so far
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
// When blocks run out, KV is dropped from tails: parked rows give first (the last parked first),
// then rows newer than the one in need (the newest first); blocks with other owners go last.
// What a row samples depends on none of this.
class Scheduler {
 public:
  Scheduler(const SchedulerConfig& config, const std::vector<std::string>& token_bytes);

  int add_rules(RulesSpec spec);  // equal rules get equal ids
  std::vector<SeqId> add_group(std::span<const TokenId> prompt, int n, int rules,
                               const SamplingSpec& sampling);

  std::optional<StepPlan> plan();  // nothing when no row is runnable
  std::vector<Event> commit(std::span<const std::int64_t> tokens, std::span<const float> logprobs,
                            std::span<const float> kept_mass);

  bool inject(SeqId seq, std::span<const TokenId> ids);
  void finish(SeqId seq, std::string_view reason);
  void set_rules(SeqId seq, int rules);
  void release(SeqId seq);

  const Sequence& sequence(SeqId seq) const;
  SchedulerStats stats() const;
  void check() const;  // throws InvalidState on a broken invariant

 private:
  static constexpr SeqId kParkedOnly = INT_MAX;  // no row is newer: only parked rows give blocks

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
  void admit_resumed(bool injected);
  void admit_prompts();
  bool make_room(Sequence& row);
  bool batch_full() const { return static_cast<int>(batch_.size()) >= max_batch_; }
  void admit(Sequence& row);
  void preempt(Sequence& row);
  int decode_rows_besides(const Sequence& row) const;

  void schedule(Sequence& row, int count, SeqId newer_than);
  bool reclaim(const Sequence& row, int end, SeqId newer_than);
  void reclaim_from(std::span<Sequence* const> victims, const Sequence& row, int end, bool shared);
  std::vector<Sequence*> victims_newer_than(SeqId id) const;

  void emit(Sequence& row, int count);
  void emit_tokens(const Sequence& row, int count);
  void emit_samples(Sequence& row);
  void emit_sample(Sequence& row, int logits_row);
  void emit_block_tables();
  void begin_step();

  void check_commit(std::span<const std::int64_t> tokens, std::size_t num_logprobs,
                    std::size_t num_kept_mass) const;
  void advance(Sequence& row);
  void fork(Sequence& leader);
  std::optional<Event> settle(Sequence& row, TokenId token);
  Event finish_sampled(Sequence& row, std::string_view reason, int pattern, int overshoot);
  Event park(Sequence& row, int pattern, int overshoot);

  void check_row(const Sequence& row) const;
  void check_places() const;
  void check_blocks() const;

  SchedulerConfig config_;
  int max_batch_;    // no more than max_step_tokens, so that every decode row finds a token free
  int max_context_;  // no more than the pool, so that a row alone always fits
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::vector<std::unique_ptr<Rules>> rules_;
  KvPool kv_;

  SeqId next_id_ = 0;
  std::unordered_map<SeqId, std::unique_ptr<Sequence>> rows_;
  std::vector<Sequence*> batch_;        // by id, so the oldest comes first
  std::set<Sequence*, ById> ready_;     // begun, without a slot
  std::set<Sequence*, ById> waiting_;   // leaders of groups that have not begun
  std::vector<Sequence*> parked_;       // by the time of parking
  int unfinished_ = 0;                  // rows, the members of groups that have not begun included

  bool pending_ = false;  // planned, not committed
  int budget_ = 0;
  StepPlan step_;
  std::vector<Sequence*> planned_;      // rows of the step
  std::vector<Sequence*> samples_;      // rows of its samples
  std::int64_t preemptions_ = 0;
  std::int64_t prefill_tokens_ = 0;
  std::int64_t decode_tokens_ = 0;
};

}  // namespace eapo
