"""Multi-turn rollouts: policy text, consults, replies, and who wrote which token."""

from __future__ import annotations

from eapo_fast.rollout.collect import collect_rollouts
from eapo_fast.rollout.protocol import ConsultProtocol
from eapo_fast.rollout.types import Rollout, Segment

__all__ = ["ConsultProtocol", "Rollout", "Segment", "collect_rollouts"]
