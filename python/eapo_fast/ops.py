"""The arithmetic of policy optimization: advantages, token statistics, losses.

Every function takes `backend="auto"|"reference"|"cpu"|"triton"|"cuda"`: auto goes by device, and
a backend that cannot run here raises `ValueError` with the reason. float64 in gives float64 out.
"""

from __future__ import annotations

from eapo_fast.kernels.group_advantages import (
    GroupStatistics,
    group_advantages,
    group_statistics,
)
from eapo_fast.kernels.linear_policy_loss import linear_policy_loss
from eapo_fast.kernels.linear_token_stats import TokenStats, linear_token_stats
from eapo_fast.kernels.linear_token_stats.sharded import sharded_token_stats
from eapo_fast.kernels.logits_policy_loss import logits_policy_loss
from eapo_fast.kernels.paged_attention import paged_attention
from eapo_fast.kernels.policy_loss import (
    LossOutput,
    PolicyBatch,
    policy_loss,
    policy_statistics,
)
from eapo_fast.kernels.sample import sample
from eapo_fast.kernels.token_advantages import token_advantages
from eapo_fast.kernels.truncated_entropy import TruncatedEntropy, truncated_entropy

__all__ = [
    "GroupStatistics",
    "LossOutput",
    "PolicyBatch",
    "TokenStats",
    "TruncatedEntropy",
    "group_advantages",
    "group_statistics",
    "linear_policy_loss",
    "linear_token_stats",
    "logits_policy_loss",
    "paged_attention",
    "policy_loss",
    "policy_statistics",
    "sample",
    "sharded_token_stats",
    "token_advantages",
    "truncated_entropy",
]
