#include "sequence.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "error.h"
#include "keyed_draw.h"

namespace eapo {

namespace {

void require_temperature(float value, const char* name) {
  require(value >= 0 && std::isfinite(value), name,
          " must be finite and >= 0 (0 is greedy), got ", value);
}

}  // namespace

void validate(const SamplingSpec& sampling) {
  require(sampling.max_tokens >= 1, "max_tokens must be >= 1, got ", sampling.max_tokens);
  require_temperature(sampling.temperature, "temperature");
  for (const float value : sampling.temperature_schedule) {
    require_temperature(value, "temperature_schedule");
  }
  require(sampling.top_k >= 0, "top_k must be >= 0 (0 is off), got ", sampling.top_k);
  require(sampling.top_p > 0 && sampling.top_p <= 1, "top_p must be in (0, 1] (1 is off), got ",
          sampling.top_p);
  require(sampling.min_p >= 0 && sampling.min_p <= 1, "min_p must be in [0, 1] (0 is off), got ",
          sampling.min_p);
}

float SamplingSpec::temperature_at(int sampled) const {
  if (temperature_schedule.empty()) return temperature;
  const auto last = temperature_schedule.size() - 1;
  return temperature_schedule[std::min(static_cast<std::size_t>(sampled), last)];
}

float Sequence::uniform() const {
  const SamplingSpec& key = group->sampling;
  const std::array<std::int64_t, 4> indices{key.step, key.prompt_id, sample, position()};
  return KeyedDraw(key.seed, "sample", indices).uniform_f32();
}

const std::vector<TokenId>& Sequence::ban_next() {
  const std::vector<TokenId>& ids = rules->banned(ban_state);
  if (ids.empty()) return ids;
  const bool extends = !ban_runs.empty() && ban_runs.back().ids == &ids &&
                       ban_runs.back().begin + ban_runs.back().count == position();
  if (extends) {
    ++ban_runs.back().count;
  } else {
    ban_runs.push_back({position(), 1, &ids});
  }
  return ids;
}

void Sequence::forget_ban() {
  if (ban_runs.empty()) return;
  BanRun& last = ban_runs.back();
  if (last.begin + last.count != position() + 1) return;
  if (--last.count == 0) ban_runs.pop_back();
}

void Sequence::append_sampled(TokenId token, float logprob, float kept) {
  tokens.push_back(token);
  logprobs.push_back(logprob);
  kept_mass.push_back(kept);
  mask.push_back(1);
  ++policy_tokens;
  ban_state = rules->ban_matcher().advance(ban_state, token).state;
}

void Sequence::append_injected(std::span<const TokenId> ids) {
  tokens.insert(tokens.end(), ids.begin(), ids.end());
  logprobs.resize(logprobs.size() + ids.size(), 0.0F);
  kept_mass.resize(kept_mass.size() + ids.size(), 1.0F);
  mask.resize(mask.size() + ids.size(), 0);
  segment_start = length();
  match_state = ban_state = TagMatcher::kRoot;
}

void Sequence::set_rules(const Rules& new_rules) {
  rules = &new_rules;
  match_state = ban_state = TagMatcher::kRoot;
  for (int at = segment_start; at < length(); ++at) {
    match_state = rules->matcher().advance(match_state, tokens[at]).state;
    ban_state = rules->ban_matcher().advance(ban_state, tokens[at]).state;
  }
}

}  // namespace eapo
