"""`Recipe`: a policy-optimization method as data.

The gradient of every method here with respect to the logits of one token is
`a (onehot - p) + b (-p (ln p + H)) + c (-q (ln q + Ht))` with detached scalars a, b and c, q being
p on a truncated vocabulary. A recipe says how advantages are made from rewards and how a, b and c
are filled; `eapo_fast.ops` does the arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eapo_fast.errors import ConfigError
from eapo_fast.recipes.checks import Data, check_choice, check_number
from eapo_fast.recipes.parts import KLS, EntropyBand, EntropyTarget, Reweighting, Selection

CENTERS = ("mean", "loo", "length", "none")
SCALES = ("std", "batch_std", "none")
RATIOS = ("token", "sequence", "sequence_token")
SURROGATES = ("clip", "detached_clip", "geo_mean", "none", "reinforce")
AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "token-sum-norm",
)
SCOPES = ("batch", "micro_batch")
LOCALITIES = ("token-local", "sequence-level", "batch-global")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "center": CENTERS,
    "scale": SCALES,
    "ddof": (0, 1),
    "whiten": (False, True),
    "group_filter": (None, "accuracy"),
    "ratio": RATIOS,
    "surrogate": SURROGATES,
    "kl": KLS,
    "aggregation": AGGREGATIONS,
    "scope": SCOPES,
}
_PARTS: dict[str, type[Data]] = {
    "selection": Selection,
    "reweighting": Reweighting,
    "entropy_band": EntropyBand,
    "entropy_target": EntropyTarget,
}


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)  # torch.compile watches it
class Recipe(Data):
    """One policy-optimization method. Raises `ConfigError` for a value or pair that cannot work.

    Notation: A advantage, l and o log-probability under the current and the sampling policy,
    f under the reference, d = l - o, r = exp(clamp(d, -20, 20)), H entropy in nats, Ht entropy of
    the truncated distribution; T_i policy tokens of sequence i, N tokens and S sequences (with at
    least one policy token) of the batch. Parts may be given as mappings.
    """

    name: str
    """What `recipes.get` and the logs call it; not empty."""
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
    gamma: float = 1.0
    """A token's return is gamma^k times a reward that comes k policy tokens later."""
    whiten: bool = False
    """Advantages of tokens are whitened over the batch: (x - mean) / sqrt(var + 1e-8)."""
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
    selection: Selection | None = None
    """Tokens whose L is dropped or replaced (Clip-Cov, KL-Cov, Lp-Reg)."""
    reweighting: Reweighting | None = None
    """Factor on L by what the token does to the entropy (STEER)."""

    kl: str = "k3"
    """Estimator of the KL term, with D = l - f: k1 D, abs |D|, k2 D^2 / 2, k3 exp(-D) + D - 1."""
    beta: float = 0.0
    """KL coefficient; 0 adds no KL term and needs no reference model."""
    entropy_coef: float = 0.0
    """Entropy bonus: the loss falls by entropy_coef times the aggregated entropy."""
    entropy_band: EntropyBand | None = None
    """Penalty that the bonus subtracts for entropies off their usual level (EPO)."""
    entropy_target: EntropyTarget | None = None
    """Pull of the aggregated truncated entropy to an anchor (SIREN)."""
    aggregation: str = "token-mean"
    """Weight of a token: token-mean 1/N, seq-mean-token-mean 1/(S T_i), seq-mean-token-sum 1/S,
    seq-mean-token-sum-norm 1/(S max_length), token-sum-norm 1/max_length."""
    max_length: float | None = None
    """The constant of the -norm aggregations; None: the trainer puts max_completion_length."""
    scope: str = "batch"
    """What statistics over tokens run over: the whole "batch" that an optimizer step sees, or the
    "micro_batch" at hand, as in most published code (then the cut changes the result)."""

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ConfigError(f"name: got {self.name!r}, allowed is text that is not empty")
        if not isinstance(self.source, str):
            raise ConfigError(f"source: got {self.source!r}, allowed is text")
        for field, allowed in _CHOICES.items():
            check_choice(field, getattr(self, field), allowed)
        for field in ("advantage_eps", "epsilon", "beta"):
            check_number(field, getattr(self, field), minimum=0.0)
        check_number("gamma", self.gamma, minimum=0.0, maximum=1.0)
        check_number("entropy_coef", self.entropy_coef)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high, minimum=0.0)
        if self.max_length is not None:
            check_number("max_length", self.max_length, minimum=1.0)
        for field, kind in _PARTS.items():
            object.__setattr__(self, field, _part(field, kind, getattr(self, field)))
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.delta is not None:
            check_number("delta", self.delta)
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
        if self.selection is not None:
            kept = self.selection.effect == "drop" and not self.selection.skip_clipped
            if not kept and self.surrogate not in ("clip", "none"):
                raise ConfigError(
                    f"selection: surrogate {self.surrogate!r} has no loss without clip; "
                    "use 'clip' or 'none', or effect 'drop' without skip_clipped"
                )
        if self.entropy_band is not None and not self.entropy_coef:
            raise ConfigError("entropy_band: entropy_coef is 0, so there is no bonus to smooth")

    @property
    def clip_high(self) -> float:
        """The upper clip range: `epsilon_high`, or `epsilon` where that is None."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def locality(self) -> str:
        """What a, b and c of a token depend on: token-local, sequence-level or batch-global."""
        if self.selection or self.reweighting or self.entropy_target:
            return "batch-global"
        sequence = self.ratio != "token" or self.surrogate == "geo_mean"
        return "sequence-level" if sequence else "token-local"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probabilities of a reference model."""
        return self.beta > 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss reads the entropy of the current policy."""
        return self.entropy_coef != 0

    @property
    def stats(self) -> tuple[str, ...]:
        """Names of the per-token statistics that the loss reads from `stats`.

        old_entropy, max_logprob and kept_mass are those of the sampling policy, truncated_entropy
        is the current policy's.
        """
        names = ["old_entropy"] if self.reweighting else []
        if self.selection and self.selection.effect == "kl_to_proxy":
            names += ["max_logprob", "kept_mass"]
        return (*names, *(["truncated_entropy"] if self.entropy_target else []))

    def keeps_group(self, accuracies: Sequence[float | None]) -> bool:
        """Whether a prompt group is trained on, given the accuracy of each rollout.

        Unknown accuracies (None) are left out; a group of one is kept (DAPO, arXiv 2503.14476).
        """
        known = [a for a in accuracies if a is not None]
        return self.group_filter is None or len(known) < 2 or max(known) > min(known)

    def to_json(self) -> str:
        """Return one JSON object with every field; `from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote. Raises `ConfigError`."""
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ConfigError(f"a recipe must be a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"a recipe must be a JSON object, got {type(fields).__name__}")
        return cls.from_dict(fields)

    def __str__(self) -> str:
        advantage = f"advantage {self.center}/{self.scale}{' whitened' if self.whiten else ''}"
        parts = [advantage, self._surrogate_text()]
        parts += [str(p) for p in (self.selection, self.reweighting) if p is not None]
        if self.beta > 0:
            parts.append(f"{self.beta:g} KL ({self.kl})")
        if self.entropy_coef:
            band = "" if self.entropy_band is None else f" less {self.entropy_band}"
            parts.append(f"{self.entropy_coef:g} entropy bonus{band}")
        parts += [] if self.entropy_target is None else [str(self.entropy_target)]
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


def _part(field: str, kind: type[Data], value: Any) -> Data | None:
    if value is None or isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return kind.from_dict(value)
    raise ConfigError(f"{field}: got {value!r}, allowed is a {kind.__name__}, a mapping or None")
