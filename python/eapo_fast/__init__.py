"""eapo_fast: Expert-Assisted Policy Optimization (arXiv 2509.23730), fast and readable.

Names load on first use, so `import eapo_fast` costs milliseconds and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eapo_fast import experts, ops, recipes, rewards
    from eapo_fast.config import EAPOConfig
    from eapo_fast.engine import Completion, Sampler, SamplerConfig, SamplingParams
    from eapo_fast.experts import (
        Budget,
        ConsultPolicy,
        ConsultRequest,
        ConsultScheduler,
        Expert,
        ExpertReply,
    )
    from eapo_fast.recipes import Recipe
    from eapo_fast.rollout import ConsultProtocol, Rollout, Segment, collect_rollouts
    from eapo_fast.trainer import Trainer

    __version__: str

_HOMES: dict[str, str] = {
    "Trainer": "trainer",
    "EAPOConfig": "config",
    **dict.fromkeys(("Completion", "Sampler", "SamplerConfig", "SamplingParams"), "engine"),
    **dict.fromkeys(("ConsultProtocol", "Rollout", "Segment", "collect_rollouts"), "rollout"),
    **dict.fromkeys(
        ("Budget", "ConsultPolicy", "ConsultRequest", "ConsultScheduler", "Expert", "ExpertReply"),
        "experts",
    ),
    "Recipe": "recipes",
}
_MODULES = ("experts", "ops", "recipes", "rewards")

__all__ = [
    "Budget",
    "Completion",
    "ConsultPolicy",
    "ConsultProtocol",
    "ConsultRequest",
    "ConsultScheduler",
    "EAPOConfig",
    "Expert",
    "ExpertReply",
    "Recipe",
    "Rollout",
    "Sampler",
    "SamplerConfig",
    "SamplingParams",
    "Segment",
    "Trainer",
    "collect_rollouts",
    "experts",
    "ops",
    "recipes",
    "rewards",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version(__name__)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    elif name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
