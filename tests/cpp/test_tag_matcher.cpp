#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "core/tag_matcher.h"

using namespace eapo;

namespace {

using Strings = std::vector<std::string>;

const Strings kPieces{"<", "q", ">", "/", "<q", "q>", "", "a<q>/a", "</q", "qq>", "aqaqa"};

TagMatcher matcher_of(Strings patterns) {
  return {std::move(patterns), std::make_shared<const Vocabulary>(kPieces)};
}

bool matches_behind(const std::string& text, std::size_t start, const Strings& patterns) {
  for (std::size_t end = start + 1; end <= text.size(); ++end) {
    const auto head = std::string_view(text).substr(0, end);
    const auto ends = [&](const std::string& pattern) { return head.ends_with(pattern); };
    if (std::ranges::any_of(patterns, ends)) return true;
  }
  return false;
}

void agrees_with_a_search(const Strings& patterns, unsigned seed) {
  const TagMatcher matcher = matcher_of(patterns);
  std::mt19937 random(seed);
  std::string text;
  TagMatcher::Node state = TagMatcher::kRoot;
  for (int i = 0; i < 300; ++i) {
    const auto& completing = matcher.completing_tokens(state);
    for (TokenId token = 0; token < static_cast<TokenId>(kPieces.size()); ++token) {
      const bool matches = matches_behind(text + kPieces[token], text.size(), patterns);
      EXPECT(std::ranges::binary_search(completing, token) == matches);
      EXPECT((matcher.advance(state, token).pattern != TagMatcher::kNoPattern) == matches);
    }
    const auto token = static_cast<TokenId>(random() % kPieces.size());
    text += kPieces[token];
    state = matcher.advance(state, token).state;
  }
}

void agrees_with_a_search_for_all_sets() {
  const std::vector<Strings> sets{
      {"</q>"}, {"<q", "<q>", "<q>/"}, {"q>", "<q>/"}, {"aqa", "qaq", "qq"}, {"q"}, {}};
  for (unsigned seed = 0; seed < 3; ++seed) {
    for (const Strings& patterns : sets) agrees_with_a_search(patterns, seed);
  }
}

void reports_the_longest_of_those_that_end_first() {
  const TagMatcher matcher = matcher_of({"q>", "<q>", ">/a"});
  const auto step = matcher.advance(TagMatcher::kRoot, 7);
  EXPECT(step.pattern == 1);
  EXPECT(step.overshoot == 2);
}

void refuses_misuse() {
  THROWS(InvalidArgument, "pattern 1 is empty", matcher_of({"a", ""}));
  THROWS(InvalidArgument, "pattern 1 repeats pattern 0", matcher_of({"a", "a"}));
  THROWS(InvalidArgument, "not in [0, 2)", matcher_of({"a"}).advance(2, 0));
  THROWS(InvalidArgument, "not in [0, 2)", matcher_of({"a"}).completing_tokens(-1));
}

}  // namespace

int main() {
  return eapo_test::run(agrees_with_a_search_for_all_sets,
                        reports_the_longest_of_those_that_end_first, refuses_misuse);
}
