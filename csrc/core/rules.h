#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tag_matcher.h"
#include "types.h"
#include "vocabulary.h"

namespace eapo {

// What ends, parks and restricts a row, as given by the caller.
struct RulesSpec {
  std::vector<TokenId> stop_token_ids;
  std::vector<std::string> stop_patterns;
  std::vector<std::string> park_patterns;
  std::vector<TokenId> banned_token_ids;
  std::vector<std::string> banned_patterns;

  bool operator==(const RulesSpec&) const = default;
};

// RulesSpec made fast. Stop and park patterns share one matcher (stop patterns come first), banned
// patterns have their own.
class Rules {
 public:
  Rules(RulesSpec spec, std::shared_ptr<const Vocabulary> vocabulary);

  bool is_stop_token(TokenId token) const;
  bool is_stop_pattern(int pattern) const { return pattern < num_stop_patterns(); }
  int park_index(int pattern) const { return pattern - num_stop_patterns(); }

  // Sorted ids that must not be sampled in this state of the ban matcher. The vector is computed
  // once and keeps its address.
  const std::vector<TokenId>& banned(TagMatcher::Node ban_state) const;

  const RulesSpec& spec() const { return spec_; }
  const TagMatcher& matcher() const { return matcher_; }
  const TagMatcher& ban_matcher() const { return ban_matcher_; }

 private:
  int num_stop_patterns() const { return static_cast<int>(spec_.stop_patterns.size()); }

  RulesSpec spec_;
  std::vector<TokenId> stop_tokens_;
  std::vector<TokenId> banned_tokens_;
  TagMatcher matcher_;
  TagMatcher ban_matcher_;
  mutable std::vector<std::optional<std::vector<TokenId>>> banned_;
};

}  // namespace eapo
