// Policy losses over given logits: a row becomes its gradient while it is in the cache.
#pragma once

#include "cpu/loss.h"
#include "cpu/policy.h"

namespace eapo::cpu {

struct LogitsPolicyLossArgs {
  // [N, V], column 0; `state` is overwritten, `out` [N, V] receives the gradient (it may be the
  // logits), `references` are not used.
  AbsorbArgs logits;
  // Of token-local recipes. `logprob` and, if it is not null, `entropy` are those below.
  PolicyArgs policy;
  float *logprob, *entropy;  // [N], 0 where the mask is; entropy may be null
};

// The result does not depend on the number of threads.
PolicySums logits_policy_loss(const LogitsPolicyLossArgs& args);

}  // namespace eapo::cpu
