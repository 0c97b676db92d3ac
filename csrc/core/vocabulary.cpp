#include "vocabulary.h"

#include <algorithm>
#include <numeric>

namespace eapo {

Vocabulary::Vocabulary(const std::vector<std::string>& token_bytes) {
  offsets_.reserve(token_bytes.size() + 1);
  offsets_.push_back(0);
  for (const std::string& bytes : token_bytes) {
    text_ += bytes;
    offsets_.push_back(text_.size());
  }
}

std::span<const TokenId> Vocabulary::with_prefix(std::string_view prefix) const {
  if (by_bytes_.empty()) {
    by_bytes_.resize(static_cast<std::size_t>(size()));
    std::iota(by_bytes_.begin(), by_bytes_.end(), 0);
    std::ranges::sort(by_bytes_, {}, [this](TokenId token) { return bytes(token); });
  }
  const auto head = [&](TokenId token) { return bytes(token).substr(0, prefix.size()); };
  return std::ranges::equal_range(by_bytes_, prefix, {}, head);
}

}  // namespace eapo
