#include "vocabulary.h"

#include <algorithm>

namespace eapo {

Vocabulary::Vocabulary(const std::vector<std::string>& token_bytes) {
  offsets_.reserve(token_bytes.size() + 1);
  offsets_.push_back(0);
  for (const std::string& bytes : token_bytes) {
    text_ += bytes;
    if (!bytes.empty()) by_bytes_.push_back(size());
    offsets_.push_back(text_.size());
  }
  std::ranges::sort(by_bytes_, {}, [this](TokenId token) { return bytes(token); });
}

std::span<const TokenId> Vocabulary::with_prefix(std::string_view prefix) const {
  const auto head = [&](TokenId token) { return bytes(token).substr(0, prefix.size()); };
  return std::ranges::equal_range(by_bytes_, prefix, {}, head);
}

}  // namespace eapo
