#include "cpu/policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/targets.h"

#if EAPO_X86
#include <immintrin.h>
#endif

namespace eapo::cpu {
namespace {

namespace scalar {
#define EAPO_LANES 4
#include "cpu/vec-inl.h"
#include "cpu/policy-inl.h"
#undef EAPO_LANES
}  // namespace scalar

#if EAPO_X86
EAPO_BEGIN_AVX2
namespace avx2 {
#define EAPO_LANES 8
#include "cpu/vec-inl.h"
#include "cpu/policy-inl.h"
#undef EAPO_LANES
}  // namespace avx2
EAPO_END_TARGET

EAPO_BEGIN_AVX512
namespace avx512 {
#define EAPO_LANES 16
#include "cpu/vec-inl.h"
#include "cpu/policy-inl.h"
#undef EAPO_LANES
}  // namespace avx512
EAPO_END_TARGET
#endif

using Block = void (*)(const PolicyArgs&, const float*, int64_t, int64_t, PolicySums&);

constexpr std::pair<std::string_view, Block> kBlocks[] = {
    {"scalar", scalar::policy_block},
#if EAPO_X86
    {"avx2", avx2::policy_block},
    {"avx512", avx512::policy_block},
#endif
};

// The body of the instruction set in use, or of the one that it extends (avx512bf16: avx512).
Block block_of_isa() {
  const std::string_view isa = kernels().isa;
  for (const auto& [name, block] : kBlocks)
    if (isa.starts_with(name)) return block;
  throw std::logic_error("the policy losses were not built for " + std::string(isa));
}

// Tokens of one block: its sums are taken in single precision, in the same order on any thread.
constexpr int64_t kBlockTokens = 4096;
constexpr int64_t kBlocksPerCall = 4;

// How many of `flags`, bytes that are 0 or 1, are set.
int64_t count_set(const bool* flags, int64_t count) {
  constexpr int64_t kWord = 8, kBytesOfSums = 255 * kWord;  // a byte's sum stays below 256
  int64_t total = 0, at = 0;
  while (at + kWord <= count) {
    const int64_t stop = std::min(count, at + kBytesOfSums);
    uint64_t sums = 0;
    for (uint64_t word; at + kWord <= stop; at += kWord) {
      std::memcpy(&word, flags + at, kWord);
      sums += word;
    }
    for (; sums != 0; sums >>= 8) total += static_cast<int64_t>(sums & 0xff);
  }
  for (; at < count; ++at) total += flags[at];
  return total;
}

// Masked-in tokens of each sequence.
std::vector<int64_t> live_tokens(const PolicyArgs& args) {
  std::vector<int64_t> live(static_cast<size_t>(args.sequences));
  for (int64_t i = 0; i < args.sequences; ++i) {
    const int64_t begin = args.cu_seqlens[i], end = args.cu_seqlens[i + 1];
    live[i] = end - begin;
    if (args.mask != nullptr) live[i] = count_set(args.mask + begin, end - begin);
  }
  return live;
}

// The weight of a token of each sequence: the derivative of the aggregate.
std::vector<float> shares(const PolicyArgs& args, const std::vector<int64_t>& live,
                          double num_tokens) {
  double sequences = args.num_sequences;
  if (sequences < 0)
    sequences = static_cast<double>(
        std::count_if(live.begin(), live.end(), [](int64_t count) { return count > 0; }));
  sequences = std::max(sequences, 1.0);
  std::vector<float> weights(live.size());
  for (size_t i = 0; i < live.size(); ++i) {
    double weight = 1.0 / sequences;
    switch (args.aggregation) {
      case Aggregation::kTokenMean: weight = 1.0 / num_tokens; break;
      case Aggregation::kSeqMeanTokenMean:
        weight /= std::max(static_cast<double>(live[i]), 1.0);
        break;
      case Aggregation::kSeqMeanTokenSum: break;
      case Aggregation::kSeqMeanNorm: weight /= args.max_length; break;
      case Aggregation::kNorm: weight = 1.0 / args.max_length; break;
    }
    weights[i] = static_cast<float>(weight);
  }
  return weights;
}

void add(PolicySums& total, const PolicySums& part) {
  total.loss += part.loss;
  total.low += part.low;
  total.high += part.high;
  total.dual += part.dual;
  total.ratio += part.ratio;
  total.gap += part.gap;
  total.kl += part.kl;
  total.entropy += part.entropy;
  total.largest_ratio = std::max(total.largest_ratio, part.largest_ratio);
  total.largest_gap = std::max(total.largest_gap, part.largest_gap);
}

double tokens_of_batch(const PolicyArgs& args, const std::vector<int64_t>& live) {
  double count = args.num_tokens;
  if (count < 0)
    for (count = 0; const int64_t here : live) count += static_cast<double>(here);
  return std::max(count, 1.0);
}

}  // namespace

std::vector<float> policy_weights(const PolicyArgs& args) {
  const std::vector<int64_t> live = live_tokens(args);
  return shares(args, live, tokens_of_batch(args, live));
}

void policy_tokens(const PolicyArgs& args, const float* weights, int64_t begin, int64_t end,
                   PolicySums& sums) {
  block_of_isa()(args, weights, begin, end, sums);
}

PolicySums policy_loss(const PolicyArgs& args) {
  const std::vector<int64_t> live = live_tokens(args);
  const double num_tokens = tokens_of_batch(args, live);
  const std::vector<float> weights = shares(args, live, num_tokens);
  const int64_t blocks = (args.tokens + kBlockTokens - 1) / kBlockTokens;
  std::vector<PolicySums> parts(static_cast<size_t>(blocks));
  const Block block = block_of_isa();
  parallel_for(blocks, kBlocksPerCall, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      block(args, weights.data(), i * kBlockTokens,
            std::min((i + 1) * kBlockTokens, args.tokens), parts[i]);
  });
  PolicySums total;
  for (const PolicySums& part : parts) add(total, part);
  total.num_tokens = num_tokens;
  return total;
}

}  // namespace eapo::cpu
