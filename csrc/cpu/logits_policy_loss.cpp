#include "cpu/logits_policy_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/parallel.h"

namespace eapo::cpu {
namespace {

// Logits that one call of a parallel body takes on: a few rows of a large vocabulary.
constexpr int64_t kGrain = 1 << 19;

AbsorbArgs row_of(const AbsorbArgs& all, int64_t row, float* references) {
  const int64_t offset = row * all.width * (all.storage == Storage::kFloat32 ? 4 : 2);
  AbsorbArgs one = all;
  one.logits = static_cast<const char*>(all.logits) + offset;
  one.out = static_cast<char*>(all.out) + offset;
  one.rows = 1;
  one.map.ban_starts = all.map.ban_starts ? all.map.ban_starts + row : nullptr;
  one.targets = all.targets + row;
  one.state = all.state + row;
  one.references = references;
  return one;
}

void clear(const AbsorbArgs& row) {
  std::memset(row.out, 0, static_cast<size_t>(row.width) * (row.storage == Storage::kFloat32 ? 4 : 2));
}

// Reads one row, evaluates its token and leaves its gradient in `out`.
void run_row(const LogitsPolicyLossArgs& args, const float* weights, int64_t row,
             float* references) {
  const PolicyArgs& policy = args.policy;
  const AbsorbArgs one = row_of(args.logits, row, references);
  LossRow& state = *one.state;
  state = {.max = -std::numeric_limits<double>::infinity()};
  const bool live = policy.mask == nullptr || policy.mask[row];
  if (live) {
    absorb_rows(one, 0, 1);
    const double log_mass = std::log(state.mass);
    args.logprob[row] = static_cast<float>(state.target - state.max - log_mass);
    if (args.entropy != nullptr)
      args.entropy[row] = static_cast<float>(log_mass - state.moment / state.mass);
  }
  PolicySums unused;
  policy_tokens(policy, weights, row, row + 1, unused);
  const float a = policy.a[row], b = policy.b ? policy.b[row] : 0.0f;
  if (a == 0 && b == 0) return clear(one);
  constexpr int64_t kFirst = 0;
  gradient_rows({.storage = one.storage,
                 .tile = one.out,
                 .rows = 1,
                 .width = one.width,
                 .column = one.column,
                 .references = references,
                 .state = &state,
                 .targets = one.targets,
                 .count = 1,
                 .source = &kFirst,
                 .target = &kFirst,
                 .a = &a,
                 .b = policy.b ? &b : nullptr,
                 .temperature = one.map.temperature,
                 .softcap = one.map.softcap},
                0, 1);
}

}  // namespace

PolicySums logits_policy_loss(const LogitsPolicyLossArgs& args) {
  const std::vector<float> weights = policy_weights(args.policy);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.logits.width));
  parallel_for(args.logits.rows, grain, [&](int64_t first, int64_t last) {
    std::vector<float> references(static_cast<size_t>(loss_blocks(args.logits.width)));
    for (int64_t row = first; row < last; ++row) run_row(args, weights.data(), row, references.data());
  });
  return policy_loss(args.policy);
}

}  // namespace eapo::cpu
