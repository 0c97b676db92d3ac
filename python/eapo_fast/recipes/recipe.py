"""`Recipe`: a policy-optimization method as data.

The gradient of every method here with respect to the logits of one token is
`a (onehot - p) + b (-p (ln p + H))` with detached scalars a and b. A recipe says how advantages are
made from rewards and how a and b are filled; `eapo_fast.ops` does the arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eapo_fast.errors import ConfigError, suggest

CENTERS = ("mean", "loo", "length", "none")
SCALES = ("std", "batch_std", "none")
RATIOS = ("token", "sequence", "sequence_token")
SURROGATES = ("clip", "detached_clip", "geo_mean", "none", "reinforce")
KLS = ("k1", "abs", "k2", "k3")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum-norm",
)
LOCALITIES = ("token-local", "sequence-level", "batch-global")

_CHOICES: dict[str, tuple[str, ...]] = {
    "center": CENTERS,
    "scale": SCALES,
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "kl": KLS,
    "aggregation": AGGREGATIONS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One policy-optimization method. Raises `ConfigError` for a value or pair that cannot work.

    Notation: A advantage, l and o log-probability under the current and the sampling policy,
    f under the reference, d = l - o, r = exp(clamp(d, -20, 20)), H entropy in nats; T_i policy
    tokens of sequence i, N tokens and S sequences (with at least one policy token) of the batch.
    """

    name: str
    """What `recipes.get` and the logs call it."""
    source: str = ""
    """The paper that the method comes from."""

    center: str = "mean"
    """What is subtracted from a reward: group mean, leave-one-out mean, length-weighted mean."""
    scale: str = "std"
    """What the difference is divided by: std of the group, of the batch, or nothing."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation."""
    ddof: int = 1
    """The variance divides by n - ddof; 0 or 1."""
    group_filter: str | None = None
    """"accuracy" drops prompt groups whose rollouts are all right or all wrong."""

    ratio: str = "token"
    """token: r. sequence: s = exp(mean_t d) of the sequence, differentiated as it stands (GSPO).
    sequence_token: the value of s, differentiated through the token's own l (GSPO-token)."""
    surrogate: str = "clip"
    """Loss L of a token. clip: max(-A r, -A clip(r)). detached_clip: -sg[clip(r)] A l (CISPO).
    geo_mean: -A exp(mean_t d'), d' = d clipped on the side that A pushes to (GMPO; the bounds are
    for d, not for r). none: -A r. reinforce: -A l."""
    epsilon: float = 0.2
    """clip(r) is at least 1 - epsilon; geo_mean: d' is at least -epsilon."""
    epsilon_high: float | None = None
    """clip(r) is at most 1 + epsilon_high; None: epsilon."""
    delta: float | None = None
    """Dual clip: where A < 0, L is at most -A delta. Needs delta > 1 + epsilon_high."""
    kl: str = "k3"
    """Estimator of the KL term, with D = l - f: k1 D, abs |D|, k2 D^2 / 2, k3 exp(-D) + D - 1."""
    beta: float = 0.0
    """KL coefficient; 0 adds no KL term and needs no reference model."""
    entropy_coef: float = 0.0
    """Entropy bonus: the loss falls by entropy_coef times the aggregated entropy."""
    aggregation: str = "token-mean"
    """Weight of a token: token-mean 1/N, seq-mean-token-mean 1/(S T_i), seq-mean-token-sum 1/S,
    seq-mean-token-sum-norm 1/(S max_length), token-sum-norm 1/max_length."""
    max_length: int | None = None
    """The constant of the -norm aggregations; None: the trainer puts max_completion_length."""

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            _check_choice(field, getattr(self, field), allowed)
        _check_choice("group_filter", self.group_filter, (None, "accuracy"))
        _check_choice("ddof", self.ddof, (0, 1))
        for field in ("advantage_eps", "epsilon", "beta"):
            _check_number(field, getattr(self, field), minimum=0.0)
        _check_number("entropy_coef", self.entropy_coef)
        if self.epsilon_high is not None:
            _check_number("epsilon_high", self.epsilon_high, minimum=0.0)
        if self.max_length is not None and not self.max_length >= 1:
            raise ConfigError(f"max_length: got {self.max_length!r}, allowed is 1 or more")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if not self.name:
            raise ConfigError("name: a recipe needs a name")
        if self.delta is not None:
            _check_number("delta", self.delta)
            if self.surrogate != "clip":
                raise ConfigError(f"delta: surrogate {self.surrogate!r} has no dual clip; use None")
            if not self.delta > 1 + self.clip_high:
                raise ConfigError(
                    f"delta: got {self.delta!r}, allowed is more than 1 + epsilon_high "
                    f"({1 + self.clip_high:g})"
                )
        if self.ratio != "token" and self.surrogate in ("geo_mean", "reinforce"):
            raise ConfigError(
                f"ratio: got {self.ratio!r}, but surrogate {self.surrogate!r} fixes its own; "
                "use 'token'"
            )

    @property
    def clip_high(self) -> float:
        """The upper clip range: `epsilon_high`, or `epsilon` where that is None."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def locality(self) -> str:
        """What a and b of a token depend on: token-local, sequence-level or batch-global."""
        sequence = self.ratio != "token" or self.surrogate == "geo_mean"
        return "sequence-level" if sequence else "token-local"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probabilities of a reference model."""
        return self.beta > 0

    def keeps_group(self, accuracies: Sequence[float | None]) -> bool:
        """Whether a prompt group is trained on, given the accuracy of each rollout.

        Unknown accuracies (None) are left out; a group of one is kept (DAPO, arXiv 2503.14476).
        """
        known = [a for a in accuracies if a is not None]
        return self.group_filter is None or len(known) < 2 or max(known) > min(known)

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed, checked again; unknown: `ConfigError`."""
        return type(self).from_dict(self.to_dict() | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every field by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def to_json(self) -> str:
        """Return one JSON object with every field; `from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """Build from a mapping. Raises `ConfigError` for an unknown field or a bad value."""
        names = [f.name for f in dataclasses.fields(cls)]
        for unknown in [f for f in fields if f not in names]:
            raise ConfigError(f"a recipe has no field {unknown!r}.{suggest(str(unknown), names)}")
        if "name" not in fields:
            raise ConfigError("name: a recipe needs a name")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote. Raises `ConfigError`."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a recipe must be a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"a recipe must be a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)

    def __str__(self) -> str:
        parts = [f"advantage {self.center}/{self.scale}", self._surrogate_text()]
        if self.beta > 0:
            parts.append(f"{self.beta:g} KL ({self.kl})")
        if self.entropy_coef:
            parts.append(f"{self.entropy_coef:g} entropy bonus")
        parts += [self.aggregation, *([f"filter {self.group_filter}"] if self.group_filter else [])]
        return f"{self.name}: {', '.join(parts)} ({self.locality})"

    def _surrogate_text(self) -> str:
        if self.surrogate == "reinforce":
            return "reinforce"
        if self.surrogate == "none":
            return f"{self.ratio} ratio unclipped"
        center = 0.0 if self.surrogate == "geo_mean" else 1.0
        bounds = f"[{center - self.epsilon:g}, {center + self.clip_high:g}]"
        dual = "" if self.delta is None else f" dual {self.delta:g}"
        return f"{self.ratio} {self.surrogate} {bounds}{dual}"


def _check_choice(field: str, value: Any, allowed: Sequence[Any]) -> None:
    if any(value == a and type(value) is type(a) for a in allowed):
        return
    words = ", ".join(repr(a) for a in allowed)
    hint = suggest(str(value), [a for a in allowed if isinstance(a, str)])
    raise ConfigError(f"{field}: got {value!r}, allowed is one of {words}.{hint}")


def _check_number(field: str, value: Any, *, minimum: float = -math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and math.isfinite(value) and value >= minimum:
        return
    least = "" if minimum == -math.inf else f" of at least {minimum:g}"
    raise ConfigError(f"{field}: got {value!r}, allowed is a finite number{least}")
