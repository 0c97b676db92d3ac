#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <span>
#include <vector>

#include "check.h"
#include "core/step_plan.h"
#include "core/types.h"

// A model whose KV is a fingerprint of all tokens up to it, and a paged cache that holds it.
namespace eapo_test {

using eapo::BlockId;
using eapo::StepPlan;
using eapo::TokenId;

inline std::uint64_t fake_kv(TokenId token, std::uint64_t before) {
  std::uint64_t kv = (before ^ static_cast<std::uint64_t>(token + 1)) * 0xD6E8FEB86659FD93;
  return kv ^ (kv >> 29);
}

// The next token behind a token with this KV; -1 at one in 400.
inline TokenId fake_token(std::uint64_t kv, float uniform, std::span<const TokenId> banned,
                          int vocabulary) {
  if (kv % 401 == 0) return eapo::kNoToken;
  auto token = static_cast<TokenId>((kv + static_cast<std::uint64_t>(uniform * 0x1p24F)) %
                                    static_cast<std::uint64_t>(vocabulary));
  while (std::ranges::binary_search(banned, token)) token = (token + 1) % vocabulary;
  return token;
}

class FakeCache {
 public:
  struct Entry {
    std::uint64_t kv = 0, epoch = 0;
  };

  FakeCache(int num_blocks, int block_size, int host_blocks)
      : size_(block_size),
        device_(static_cast<std::size_t>(num_blocks) * block_size),
        host_(static_cast<std::size_t>(host_blocks) * block_size) {}

  // Moves blocks as the plan says, then writes the KV of its tokens, each from the KV that the
  // row's block table has for the token before.
  void forward(const StepPlan& plan, std::uint64_t epoch) {
    move(plan);
    for (int row = 0; row < plan.num_rows(); ++row) {
      const int begin = plan.cu_q[row], end = plan.cu_q[row + 1];
      int position = plan.kv_lens[row] - (end - begin);
      std::uint64_t kv = position == 0 ? 0 : entry(plan, row, position - 1).kv;
      for (int at = begin; at < end; ++at, ++position) {
        EXPECT(plan.positions[at] == position);
        EXPECT(&device_[plan.slots[at]] == &entry(plan, row, position));
        kv = fake_kv(plan.input_ids[at], kv);
        entry(plan, row, position) = {kv, epoch};
      }
    }
  }

  // What the row's block table leads to.
  Entry& entry(const StepPlan& plan, int row, int position) {
    const BlockId block = plan.block_tables[row * plan.table_width + position / size_];
    return device_[static_cast<std::size_t>(block) * size_ + position % size_];
  }

 private:
  using Pairs = std::vector<BlockId>;

  // All swaps out, then all swaps in, then all copies. Each kind may run in any order, so no block
  // is written twice, and none is read by a copy and written by another.
  void move(const StepPlan& plan) {
    std::set<BlockId> host_written, written, copied;
    for_each(plan.swap_out, [&](BlockId block, BlockId host) {
      EXPECT(host_written.insert(host).second);
      copy(device_, block, host_, host);
    });
    for_each(plan.swap_in, [&](BlockId host, BlockId block) {
      EXPECT(!host_written.contains(host));
      EXPECT(written.insert(block).second);
      copy(host_, host, device_, block);
    });
    for_each(plan.copies, [&](BlockId, BlockId to) { EXPECT(written.insert(to).second); });
    for_each(plan.copies, [&](BlockId, BlockId to) { copied.insert(to); });
    for_each(plan.copies, [&](BlockId from, BlockId to) {
      EXPECT(!copied.contains(from));
      copy(device_, from, device_, to);
    });
  }

  template <class Call>
  static void for_each(const Pairs& pairs, Call call) {
    for (std::size_t i = 0; i < pairs.size(); i += 2) call(pairs[i], pairs[i + 1]);
  }

  void copy(const std::vector<Entry>& source, BlockId from, std::vector<Entry>& target,
            BlockId to) const {
    const auto first = source.begin() + std::ptrdiff_t{from} * size_;
    std::copy(first, first + size_, target.begin() + std::ptrdiff_t{to} * size_);
  }

  int size_;
  std::vector<Entry> device_, host_;
};

}  // namespace eapo_test
