// Policy losses of single tokens from log-probabilities; kernels/policy_loss/surrogate.py and
// reference.py give the formulas. A token's values depend on that token alone and on counts.
#pragma once

#include <cstdint>
#include <vector>

namespace eapo::cpu {

enum class Surrogate { kClip, kDetachedClip, kNone, kReinforce };
enum class KlEstimator { kK1, kAbs, kK2, kK3 };
enum class Aggregation { kTokenMean, kSeqMeanTokenMean, kSeqMeanTokenSum, kSeqMeanNorm, kNorm };

struct PolicyArgs {
  int64_t tokens, sequences;  // N, S
  const float* logprob;       // [N]
  const float* old_logprob;   // [N]
  const float* advantages;    // [S], or [N] if `advantage_per_token`
  bool advantage_per_token;
  const int64_t* cu_seqlens;  // [S + 1]
  const bool* mask;           // [N]; null: all tokens are in
  const float* ref_logprob;   // [N]; null: no KL
  const float* entropy;       // [N]; null: no entropy
  const float* factor;        // [N] on the surrogate; null: 1
  Surrogate surrogate;
  KlEstimator kl;
  Aggregation aggregation;
  float least, most;            // bounds of the ratio
  float delta;                  // dual clip, infinite: none
  float beta, entropy_coef;
  double max_length;            // of the -norm aggregations
  double num_tokens;            // of the whole batch; negative: those here
  double num_sequences;         // of the whole batch with a token; negative: those here
  float* a;                     // [N] dloss/dlogprob
  float* b;                     // [N] dloss/dentropy; null: not wanted
  float* token_loss;            // [N]
};

// Sums over the masked-in tokens; the largest ratio and gap are 0 where there is no token.
struct PolicySums {
  double loss = 0, low = 0, high = 0, dual = 0, ratio = 0, gap = 0, kl = 0, entropy = 0;
  double largest_ratio = 0, largest_gap = 0;
  double num_tokens = 0;  // of the whole batch, at least 1
};

// The result does not depend on the number of threads.
PolicySums policy_loss(const PolicyArgs& args);

// What a token of each sequence [S] weighs in the loss.
std::vector<float> policy_weights(const PolicyArgs& args);

// Evaluates tokens [begin, end) on the calling thread and adds them to `sums`.
void policy_tokens(const PolicyArgs& args, const float* weights, int64_t begin, int64_t end,
                   PolicySums& sums);

}  // namespace eapo::cpu
