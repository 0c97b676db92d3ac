#include <algorithm>
#include <limits>

#include "error.h"
#include "scheduler.h"

namespace eapo {

std::vector<Event> Scheduler::commit(std::span<const std::int64_t> tokens,
                                     std::span<const float> logprobs,
                                     std::span<const float> kept_mass) {
  check_commit(tokens, logprobs.size(), kept_mass.size());
  for (Sequence* const row : planned_) advance(*row);
  std::vector<Event> events;
  for (std::size_t i = 0; i < samples_.size(); ++i) {
    Sequence& row = *samples_[i];
    const auto token = static_cast<TokenId>(tokens[i]);
    if (token == kNoToken) {
      row.forget_ban();
      retire(row, "error");
      events.push_back({row.id, Event::Kind::kFinished, TagMatcher::kNoPattern, 0});
      continue;
    }
    row.append_sampled(token, logprobs[i], kept_mass[i]);
    if (const auto event = settle(row, token)) events.push_back(*event);
  }
  for (Sequence* const row : planned_) {
    if (row->in_batch()) row->state = row->pending() > 1 ? State::kPrefill : State::kRunning;
  }
  planned_.clear();
  samples_.clear();
  pending_ = false;
  return events;
}

void Scheduler::check_commit(std::span<const std::int64_t> tokens, std::size_t num_logprobs,
                             std::size_t num_kept_mass) const {
  ensure(pending_, "commit() without a planned step; call plan() first");
  const std::size_t n = samples_.size();
  require(tokens.size() == n && num_logprobs == n && num_kept_mass == n, "the step has ", n,
          " samples, got ", tokens.size(), " tokens, ", num_logprobs, " logprobs, ", num_kept_mass,
          " kept_mass");
  for (const std::int64_t token : tokens) {
    require(token >= kNoToken && token <= std::numeric_limits<TokenId>::max(), "token ", token,
            " is not in [0, 2**31), nor -1 for a row without a distribution");
  }
}

void Scheduler::advance(Sequence& row) {
  row.computed += row.planned;
  row.planned = 0;
  kv_.publish(row);
  if (!row.group->forked && row.pending() == 0) fork(row);
}

void Scheduler::fork(Sequence& leader) {
  leader.group->forked = true;
  for (Sequence* const member : leader.group->members) {
    if (member == &leader) continue;
    kv_.fork(leader, *member);
    enter(*member, Place::kReady, State::kWaiting);
  }
}

// What the newest token means for its row: a stop token comes before patterns, these before length.
std::optional<Event> Scheduler::settle(Sequence& row, TokenId token) {
  if (row.rules->is_stop_token(token)) {
    return finish_sampled(row, "stop", TagMatcher::kNoPattern, 0);
  }
  const auto step = row.rules->matcher().advance(row.match_state, token);
  row.match_state = step.state;
  if (step.pattern != TagMatcher::kNoPattern) {
    if (!row.rules->is_stop_pattern(step.pattern)) return park(row, step.pattern, step.overshoot);
    return finish_sampled(row, "stop", step.pattern, step.overshoot);
  }
  if (row.out_of_policy_tokens() || row.length() >= max_context_) {
    return finish_sampled(row, "length", TagMatcher::kNoPattern, 0);
  }
  return std::nullopt;
}

Event Scheduler::finish_sampled(Sequence& row, std::string_view reason, int pattern,
                                int overshoot) {
  lengths_.add(row);
  retire(row, reason);
  return {row.id, Event::Kind::kFinished, pattern, overshoot};
}

Event Scheduler::park(Sequence& row, int pattern, int overshoot) {
  leave(row);
  row.expected_wait = std::numeric_limits<double>::infinity();
  row.parked_at = parks_++;
  enter(row, Place::kParked, State::kParked);
  return {row.id, Event::Kind::kParked, row.rules->park_index(pattern), overshoot};
}

}  // namespace eapo
