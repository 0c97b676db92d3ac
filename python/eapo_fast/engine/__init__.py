"""The paged-KV sampler: the trainer's own parameters, continuous batching, parked rollouts.

`Sampler` holds model, vocabulary and KV pool; a `Session` is one continuous-batching run over the
C++ scheduler. Neither knows what a consult is: a session only parks rows and appends tokens.
"""

from __future__ import annotations

from eapo_fast.engine.params import Completion, SamplerConfig, SamplingParams
from eapo_fast.engine.sampler import Sampler
from eapo_fast.engine.session import Rules, Session
from eapo_fast.engine.vocabulary import Vocabulary

__all__ = [
    "Completion",
    "Rules",
    "Sampler",
    "SamplerConfig",
    "SamplingParams",
    "Session",
    "Vocabulary",
]
