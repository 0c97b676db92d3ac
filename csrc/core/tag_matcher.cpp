#include "tag_matcher.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "error.h"

namespace eapo {

namespace {

void sort_unique(std::vector<TokenId>& tokens) {
  std::ranges::sort(tokens);
  const auto repeated = std::ranges::unique(tokens);
  tokens.erase(repeated.begin(), repeated.end());
}

}  // namespace

TagMatcher::TagMatcher(std::vector<std::string> patterns,
                       std::shared_ptr<const Vocabulary> vocabulary)
    : patterns_(std::move(patterns)), vocabulary_(std::move(vocabulary)) {
  add_node(0, 0);
  for (int pattern = 0; pattern < static_cast<int>(patterns_.size()); ++pattern) {
    add_pattern(pattern);
  }
  link_suffixes();
  completing_.resize(next_.size());
}

TagMatcher::Node TagMatcher::add_node(int pattern, int depth) {
  next_.emplace_back().fill(kRoot);
  suffix_.push_back(kRoot);
  match_.push_back(kNoPattern);
  path_pattern_.push_back(pattern);
  depth_.push_back(depth);
  return num_states() - 1;
}

void TagMatcher::add_pattern(int pattern) {
  const std::string& bytes = patterns_[pattern];
  require(!bytes.empty(), "pattern ", pattern, " is empty; patterns need at least one byte");
  Node node = kRoot;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (next_[node][byte] == kRoot) {
      const Node child = add_node(pattern, depth_[node] + 1);
      next_[node][byte] = child;
    }
    node = next_[node][byte];
  }
  require(match_[node] == kNoPattern, "pattern ", pattern, " repeats pattern ", match_[node]);
  match_[node] = pattern;
}

// Breadth first: a node's suffix is shallower, so its row of the automaton is complete already.
void TagMatcher::link_suffixes() {
  std::vector<Node> order{kRoot};
  for (std::size_t at = 0; at < order.size(); ++at) {
    const Node node = order[at];
    const auto& fallback = next_[suffix_[node]];
    for (int byte = 0; byte < 256; ++byte) {
      const Node child = next_[node][byte];
      if (child == kRoot) {
        next_[node][byte] = fallback[byte];
        continue;
      }
      if (node != kRoot) suffix_[child] = fallback[byte];
      if (match_[child] == kNoPattern) match_[child] = match_[suffix_[child]];
      order.push_back(child);
    }
  }
}

TagMatcher::Step TagMatcher::advance(Node state, TokenId token) const {
  require_state(state);
  Step step{state, kNoPattern, 0};
  for (const char c : vocabulary_->bytes(token)) {
    if (step.pattern != kNoPattern) ++step.overshoot;
    step.state = next_[step.state][static_cast<unsigned char>(c)];
    if (step.pattern == kNoPattern) step.pattern = match_[step.state];
  }
  return step;
}

const std::vector<TokenId>& TagMatcher::completing_tokens(Node state) const {
  require_state(state);
  auto& cached = completing_[state];
  if (!cached) cached = state == kRoot ? tokens_with_match() : find_completing(state);
  return *cached;
}

std::vector<TokenId> TagMatcher::tokens_with_match() const {
  std::vector<TokenId> tokens;
  for (TokenId token = 0; token < vocabulary_->size() && !empty(); ++token) {
    if (advance(kRoot, token).pattern != kNoPattern) tokens.push_back(token);
  }
  return tokens;
}

// A match that the token completes lies inside it, or began earlier: then a suffix of the text so
// far is a prefix of the pattern (a node on the suffix chain) and the token begins with the rest.
std::vector<TokenId> TagMatcher::find_completing(Node state) const {
  std::vector<TokenId> tokens = completing_tokens(kRoot);
  for (Node node = state; node != kRoot; node = suffix_[node]) append_crossing(node, tokens);
  sort_unique(tokens);
  return tokens;
}

void TagMatcher::append_crossing(Node node, std::vector<TokenId>& tokens) const {
  const std::string_view seen =
      std::string_view(patterns_[path_pattern_[node]]).substr(0, depth_[node]);
  for (const std::string& pattern : patterns_) {
    if (pattern.size() == seen.size() || !pattern.starts_with(seen)) continue;
    const auto found = vocabulary_->with_prefix(std::string_view(pattern).substr(seen.size()));
    tokens.insert(tokens.end(), found.begin(), found.end());
  }
}

void TagMatcher::require_state(Node state) const {
  require(state >= 0 && state < num_states(), "matcher state ", state, " is not in [0, ",
          num_states(), ")");
}

}  // namespace eapo
