#include "rules.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "error.h"

namespace eapo {

namespace {

std::vector<TokenId> sorted_ids(const std::vector<TokenId>& ids, const char* name) {
  std::vector<TokenId> sorted = ids;
  std::ranges::sort(sorted);
  const auto repeated = std::ranges::unique(sorted);
  sorted.erase(repeated.begin(), repeated.end());
  require(sorted.empty() || sorted.front() >= 0, name, " must be >= 0, got ",
          sorted.empty() ? 0 : sorted.front());
  return sorted;
}

std::vector<std::string> concatenated(std::vector<std::string> first,
                                      const std::vector<std::string>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

}  // namespace

Rules::Rules(RulesSpec spec, std::shared_ptr<const Vocabulary> vocabulary)
    : spec_(std::move(spec)),
      stop_tokens_(sorted_ids(spec_.stop_token_ids, "stop_token_ids")),
      banned_tokens_(sorted_ids(spec_.banned_token_ids, "banned_token_ids")),
      matcher_(concatenated(spec_.stop_patterns, spec_.park_patterns), vocabulary),
      ban_matcher_(spec_.banned_patterns, vocabulary),
      banned_(ban_matcher_.num_states()) {}

bool Rules::is_stop_token(TokenId token) const {
  return std::ranges::binary_search(stop_tokens_, token);
}

const std::vector<TokenId>& Rules::banned(TagMatcher::Node ban_state) const {
  auto& cached = banned_.at(ban_state);
  if (!cached) {
    cached.emplace();
    std::ranges::set_union(banned_tokens_, ban_matcher_.completing_tokens(ban_state),
                           std::back_inserter(*cached));
  }
  return *cached;
}

}  // namespace eapo
