#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "philox.h"

namespace eapo {

constexpr std::uint64_t fnv1a64(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return hash;
}

// A random number that is a pure function of (seed, purpose, indices).
//
// The first block is keyed by the seed and counts (purpose hash, number of indices); then each four
// indices take two blocks (their low words, their high words), and each block keys the next.
class KeyedDraw {
 public:
  constexpr KeyedDraw(std::uint64_t seed, std::string_view purpose,
                      std::span<const std::int64_t> indices)
      : words_{low(seed), high(seed), 0, 0} {
    const std::uint64_t hash = fnv1a64(purpose), count = indices.size();
    fold({low(hash), high(hash), low(count), high(count)});
    for (std::size_t at = 0; at < indices.size(); at += 4) {
      fold_indices(indices.subspan(at, std::min<std::size_t>(4, indices.size() - at)));
    }
  }

  constexpr std::uint64_t bits() const { return words_[0] | std::uint64_t{words_[1]} << 32; }

  // In [0, 1), 53 random bits.
  constexpr double uniform() const { return static_cast<double>(bits() >> 11) * 0x1p-53; }

  // In [0, 1), the upper 24 of the same bits (no rounding up to 1).
  constexpr float uniform_f32() const { return static_cast<float>(bits() >> 40) * 0x1p-24F; }

 private:
  static constexpr std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
  static constexpr std::uint32_t high(std::uint64_t x) { return low(x >> 32); }

  constexpr void fold(PhiloxCounter counter) {
    words_ = philox4x32(counter, {words_[0], words_[1]});
  }

  constexpr void fold_indices(std::span<const std::int64_t> four) {
    PhiloxCounter lows{}, highs{};
    for (std::size_t i = 0; i < four.size(); ++i) {
      lows[i] = low(static_cast<std::uint64_t>(four[i]));
      highs[i] = high(static_cast<std::uint64_t>(four[i]));
    }
    fold(lows);
    fold(highs);
  }

  PhiloxCounter words_;
};

}  // namespace eapo
