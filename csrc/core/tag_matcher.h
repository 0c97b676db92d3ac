#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "types.h"
#include "vocabulary.h"

namespace eapo {

// Finds byte patterns in a stream of tokens with one integer of state (Aho and Corasick, 1975).
//
// A match may begin and end anywhere inside tokens. Of several matches in one token the one that
// ends first is reported; of several that end at one byte, the longest.
class TagMatcher {
 public:
  using Node = std::int32_t;
  static constexpr Node kRoot = 0;
  static constexpr int kNoPattern = -1;

  struct Step {
    Node state;     // after all bytes of the token
    int pattern;    // index of the first match, or kNoPattern
    int overshoot;  // bytes of the token behind the first match
  };

  // Patterns must not be empty nor occur twice.
  TagMatcher(std::vector<std::string> patterns, std::shared_ptr<const Vocabulary> vocabulary);

  Step advance(Node state, TokenId token) const;

  // Sorted tokens that would complete some pattern from `state`; computed once per state.
  const std::vector<TokenId>& completing_tokens(Node state) const;

  int num_states() const { return static_cast<int>(next_.size()); }
  bool empty() const { return patterns_.empty(); }

 private:
  Node add_node(int pattern, int depth);
  void add_pattern(int pattern);
  void link_suffixes();
  std::vector<TokenId> tokens_with_match() const;
  std::vector<TokenId> find_completing(Node state) const;
  void append_crossing(Node node, std::vector<TokenId>& tokens) const;
  void require_state(Node state) const;

  std::vector<std::string> patterns_;
  std::shared_ptr<const Vocabulary> vocabulary_;
  std::vector<std::array<Node, 256>> next_;  // a trie first, the full automaton after linking
  std::vector<Node> suffix_;                 // longest proper suffix that is a node
  std::vector<int> match_;                   // longest pattern that ends at the node
  std::vector<int> path_pattern_;            // a pattern that the node is a prefix of ...
  std::vector<int> depth_;                   // ... with this many bytes
  mutable std::vector<std::optional<std::vector<TokenId>>> completing_;
};

}  // namespace eapo
