#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rules.h"
#include "tag_matcher.h"
#include "types.h"

namespace eapo {

struct Sequence;

// How the tokens of a group are drawn.
struct SamplingSpec {
  int max_tokens = 1;        // sampled tokens a row may have
  float temperature = 1.0F;  // 0 is greedy
  int top_k = 0;             // 0 is off
  float top_p = 1.0F;        // 1 is off
  float min_p = 0.0F;        // 0 is off
  std::uint64_t seed = 0;
  std::int64_t step = 0;
  std::int64_t prompt_id = 0;
  // Of a row's i-th sampled token: entry min(i, size - 1); empty: `temperature`.
  std::vector<float> temperature_schedule = {};

  float temperature_at(int sampled) const;
};

void validate(const SamplingSpec& sampling);

// The samples of one prompt. Until it is forked only its first unfinished member (the leader)
// computes anything: the prompt.
struct Group {
  SamplingSpec sampling;
  std::vector<Sequence*> members = {};  // unfinished ones, by sample index
  bool forked = false;
  std::int64_t begun_at = -1;      // the plan that gave the prompt its first slot

  Sequence* leader() const { return members.front(); }
};

// Positions [begin, begin + count) after the prompt were sampled with `ids` banned.
struct BanRun {
  int begin;
  int count;
  const std::vector<TokenId>* ids;
};

// The queue that a row is in.
enum class Place : std::uint8_t { kNone, kBatch, kInjected, kReady, kWaiting, kParked };

// One row: its tokens and what is known about them, its KV blocks, its matcher states.
//
// Between plans `blocks` cover exactly the first `computed` tokens, and computed < length() while
// the row is unfinished (the KV of the newest token is never there yet). Host blocks continue
// behind them, with a hole between if device blocks were dropped later.
struct Sequence {
  SeqId id;
  int sample;  // index in the group
  std::shared_ptr<Group> group;
  const Rules* rules;
  int prompt_length;

  std::vector<TokenId> tokens;    // prompt, then all that follows
  std::vector<float> logprobs;    // of the tokens after the prompt; 0 where the mask is 0
  std::vector<float> kept_mass;   // 1 where the mask is 0
  std::vector<std::uint8_t> mask; // 1: sampled, 0: injected
  std::vector<BanRun> ban_runs;

  std::vector<BlockId> blocks;
  int computed = 0;         // tokens whose KV is in the blocks
  int planned = 0;          // tokens of the pending step
  int published = 0;        // leading blocks that the pool's index holds
  std::uint64_t epoch = 0;  // of the weights when its KV began

  std::vector<BlockId> host_blocks;  // the last one is the first in the row
  int host_begin = 0;                // ... and this is its index there
  int host_tokens = 0;               // tokens of the row up to the end of the host blocks

  double expected_wait = std::numeric_limits<double>::infinity();  // seconds, of a parked row
  std::int64_t parked_at = 0;                                      // counts parks

  int policy_tokens = 0;   // tokens with mask 1
  int segment_start = 0;   // in `tokens`: behind the last injection
  TagMatcher::Node match_state = TagMatcher::kRoot;
  TagMatcher::Node ban_state = TagMatcher::kRoot;

  State state = State::kWaiting;
  Place place = Place::kNone;
  std::string finish_reason;

  int length() const { return static_cast<int>(tokens.size()); }
  int pending() const { return length() - computed; }
  int position() const { return length() - prompt_length; }  // of the next token
  bool done() const { return state == State::kDone; }
  bool in_batch() const { return place == Place::kBatch; }
  bool has_kv() const { return !blocks.empty() || !host_blocks.empty(); }
  bool out_of_policy_tokens() const { return policy_tokens >= group->sampling.max_tokens; }

  // The draw for the next token: Philox keyed by (seed, step, prompt, sample, position).
  float uniform() const;

  // Ids banned at the next token; remembered as a ban of that position.
  const std::vector<TokenId>& ban_next();
  void forget_ban();  // the next token was not sampled after all

  void append_sampled(TokenId token, float logprob, float kept);
  void append_injected(std::span<const TokenId> ids);

  // Sets the rules and brings both matchers to where the tokens since the last injection lead.
  void set_rules(const Rules& new_rules);
};

struct ById {
  bool operator()(const Sequence* a, const Sequence* b) const { return a->id < b->id; }
};

// Parked rows in the order in which they give their blocks away.
struct LongestWait {
  bool operator()(const Sequence* a, const Sequence* b) const {
    if (a->expected_wait != b->expected_wait) return a->expected_wait > b->expected_wait;
    return a->parked_at > b->parked_at;
  }
};

}  // namespace eapo
