#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/keyed_draw.h"
#include "core/rules.h"
#include "core/sequence.h"
#include "fake_model.h"

// What a row must become, decoded one token at a time: no batch, no blocks, no cache, no automaton.
namespace eapo_test {

using eapo::RulesSpec;
using eapo::SamplingSpec;
using Strings = std::vector<std::string>;

// Index of the pattern whose first match ends first behind byte `start` (the longest of several),
// and the bytes behind it; (-1, 0) if there is none.
inline std::pair<int, int> first_match(std::string_view text, std::size_t start,
                                       const Strings& patterns) {
  for (std::size_t end = start + 1; end <= text.size(); ++end) {
    int found = -1;
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      const bool longer = found < 0 || patterns[i].size() > patterns[found].size();
      if (longer && text.substr(0, end).ends_with(patterns[i])) found = static_cast<int>(i);
    }
    if (found >= 0) return {found, static_cast<int>(text.size() - end)};
  }
  return {-1, 0};
}

struct LoneRow {
  enum class State { kRunnable, kParked, kDone };
  struct Event {
    bool parked;
    int pattern, overshoot;
    bool operator==(const Event&) const = default;
  };

  const Strings* pieces;  // bytes of the tokens
  int group;
  int sample;
  int max_context;
  SamplingSpec sampling;
  RulesSpec rules;
  std::vector<TokenId> tokens;  // prompt first
  int prompt_length = static_cast<int>(tokens.size());
  int segment_start = prompt_length;
  int policy_tokens = 0;
  State state = State::kRunnable;
  std::string reason = "";
  std::vector<std::uint64_t> kv = {};
  std::vector<float> logprobs = {};
  std::vector<std::uint8_t> mask = {};
  std::map<int, std::vector<TokenId>> bans = {};  // by position
  std::vector<std::uint64_t> epochs = {};         // under which each token's KV was last seen

  int position() const { return static_cast<int>(tokens.size()) - prompt_length; }

  float uniform() const {
    const std::array<std::int64_t, 4> key{sampling.step, sampling.prompt_id, sample, position()};
    return eapo::KeyedDraw(sampling.seed, "sample", key).uniform_f32();
  }

  float temperature() const {
    const auto& schedule = sampling.temperature_schedule;
    if (schedule.empty()) return sampling.temperature;
    return schedule[std::min<std::size_t>(policy_tokens, schedule.size() - 1)];
  }

  // Sorted ids that must not come next.
  std::vector<TokenId> banned() const {
    std::vector<TokenId> ids;
    const std::string seen = text();
    for (TokenId token = 0; token < static_cast<TokenId>(pieces->size()); ++token) {
      const std::string more = seen + (*pieces)[token];
      if (std::ranges::find(rules.banned_token_ids, token) != rules.banned_token_ids.end() ||
          first_match(more, seen.size(), rules.banned_patterns).first >= 0) {
        ids.push_back(token);
      }
    }
    return ids;
  }

  // Draws one token; whether that is an event, and which.
  std::pair<bool, Event> draw(const std::vector<TokenId>& ban) {
    const TokenId token =
        fake_token(kv_at(tokens.size() - 1), uniform(), ban, static_cast<int>(pieces->size()));
    if (token == eapo::kNoToken) return finished("error", -1, 0);
    const std::size_t start = text().size();
    if (!ban.empty()) bans[position()] = ban;
    logprobs.push_back(-uniform());
    mask.push_back(1);
    tokens.push_back(token);
    ++policy_tokens;
    return settle(token, start);
  }

  bool inject(std::span<const TokenId> ids) {
    if (policy_tokens >= sampling.max_tokens ||
        static_cast<int>(tokens.size() + ids.size()) + 1 > max_context) {
      finished("length", -1, 0);
      return false;
    }
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    logprobs.resize(logprobs.size() + ids.size(), 0.0F);
    mask.resize(mask.size() + ids.size(), 0);
    segment_start = static_cast<int>(tokens.size());
    state = State::kRunnable;
    return true;
  }

  std::uint64_t kv_at(std::size_t position) {
    while (kv.size() <= position) {
      kv.push_back(fake_kv(tokens[kv.size()], kv.empty() ? 0 : kv.back()));
    }
    return kv[position];
  }

 private:
  std::string text() const {
    std::string bytes;
    for (std::size_t at = segment_start; at < tokens.size(); ++at) bytes += (*pieces)[tokens[at]];
    return bytes;
  }

  std::pair<bool, Event> finished(std::string_view why, int pattern, int overshoot) {
    state = State::kDone;
    reason = why;
    return {true, {false, pattern, overshoot}};
  }

  std::pair<bool, Event> settle(TokenId token, std::size_t start) {
    const auto& stops = rules.stop_token_ids;
    if (std::ranges::find(stops, token) != stops.end()) return finished("stop", -1, 0);
    Strings patterns = rules.stop_patterns;
    patterns.insert(patterns.end(), rules.park_patterns.begin(), rules.park_patterns.end());
    const auto [found, overshoot] = first_match(text(), start, patterns);
    const int num_stops = static_cast<int>(rules.stop_patterns.size());
    if (found >= num_stops) {
      state = State::kParked;
      return {true, {true, found - num_stops, overshoot}};
    }
    if (found >= 0) return finished("stop", found, overshoot);
    if (policy_tokens >= sampling.max_tokens || static_cast<int>(tokens.size()) >= max_context) {
      return finished("length", -1, 0);
    }
    return {false, {}};
  }
};

}  // namespace eapo_test
