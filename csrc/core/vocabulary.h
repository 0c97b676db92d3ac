#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "types.h"

namespace eapo {

// The bytes of every token. Ids past the end (padding rows of a model) have no bytes. Nothing
// changes after construction, so schedulers and threads may share one.
class Vocabulary {
 public:
  explicit Vocabulary(const std::vector<std::string>& token_bytes);

  TokenId size() const { return static_cast<TokenId>(offsets_.size()) - 1; }

  std::string_view bytes(TokenId token) const {
    if (token < 0 || token >= size()) return {};
    return std::string_view(text_).substr(offsets_[token], offsets_[token + 1] - offsets_[token]);
  }

  // Tokens whose bytes begin with `prefix`, which is not empty.
  std::span<const TokenId> with_prefix(std::string_view prefix) const;

 private:
  std::string text_;
  std::vector<std::size_t> offsets_;
  std::vector<TokenId> by_bytes_;  // tokens that have bytes, sorted by them
};

}  // namespace eapo
