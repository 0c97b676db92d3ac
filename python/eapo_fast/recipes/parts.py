"""Optional parts of a recipe: selected tokens, token weights, and two entropy terms.

Statistics of all of them run over the policy tokens of the mini-batch, and none is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eapo_fast.errors import ConfigError
from eapo_fast.recipes.checks import Data, check_choice, check_count, check_number

KLS = ("k1", "abs", "k2", "k3")
SCORES = ("covariance", "logprob")
SIGNS = (None, "negative", "positive")
PICKS = ("highest", "lowest", "random")
EFFECTS = ("drop", "kl_to_old", "kl_to_proxy")
MAPPINGS = ("linear", "exponential")
LEVELS = ("token", "sequence")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection(Data):
    """Tokens whose loss is another one.

    Of the n tokens with the right sign of A, `k = max(1, int(fraction n))` are picked among those
    that the bounds and `skip_clipped` leave (all of them if they are fewer). Equal scores, and what
    "random" draws, follow the rollout's own log-probabilities, not its place in the batch.
    """

    kind: ClassVar[str] = "a selection"

    score: str
    """covariance: (A - mean A)(l - mean l), arXiv 2505.22617. logprob: l."""
    sign: str | None = None
    """Only tokens whose A is "negative" or "positive"; None: any."""
    low: float | None = None
    """The score must be above this."""
    high: float | None = None
    """The score must be below this."""
    skip_clipped: bool = False
    """Leave out tokens that the ratio clip has already stopped."""
    pick: str
    """The k "highest" or "lowest" scores, or k at "random", uniformly without replacement."""
    fraction: float
    """Share of the tokens with that sign; above 0, at most 1."""
    minimum: int = 1
    """Where k is below this, nothing is picked."""
    effect: str
    """Loss of a picked token. drop: 0 (it still counts in the denominator). kl_to_old:
    -A r + coef KL(l, o). kl_to_proxy: -A r + coef KL(l, q) where l < q, with q the log-probability
    after the sampling policy has lost its tokens below min_p times the likeliest one."""
    kl: str = "abs"
    """Estimator of that KL, with D = l - o or l - q; as `Recipe.kl`."""
    coef: float = 1.0
    """Coefficient of that KL."""
    min_p: float = 0.02
    """Least p, as a share of the largest, of the tokens that the proxy keeps."""
    seed: int = 0
    """Of the random draws."""

    def __post_init__(self) -> None:
        check_choice("selection.score", self.score, SCORES)
        check_choice("selection.sign", self.sign, SIGNS)
        check_choice("selection.pick", self.pick, PICKS)
        check_choice("selection.effect", self.effect, EFFECTS)
        check_choice("selection.kl", self.kl, KLS)
        check_choice("selection.skip_clipped", self.skip_clipped, (False, True))
        for field, bound in (("selection.low", self.low), ("selection.high", self.high)):
            if bound is not None:
                check_number(field, bound)
        check_number("selection.fraction", self.fraction, above=0.0, maximum=1.0)
        check_number("selection.min_p", self.min_p, minimum=0.0, maximum=1.0)
        check_number("selection.coef", self.coef)
        check_count("selection.minimum", self.minimum)
        check_count("selection.seed", self.seed, minimum=0)

    def __str__(self) -> str:
        bounds = [] if self.low is None else [f"above {self.low:g}"]
        bounds += [] if self.high is None else [f"below {self.high:g}"]
        sign = "" if self.sign is None else f" of A {'<' if self.sign == 'negative' else '>'} 0"
        where = f" {' '.join(bounds)}" if bounds else ""
        kl = "" if self.effect == "drop" else f"{self.coef:g} {self.kl} "
        return f"{self.pick} {self.fraction:.3g} by {self.score}{where}{sign}: {kl}{self.effect}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reweighting(Data):
    """STEER, arXiv 2510.10150: tokens that would move the entropy most count less.

    `Om = |A / p_old * p (1 - p) (ln p + H_old)|`, and the surrogate is multiplied by w(Om).
    """

    kind: ClassVar[str] = "a reweighting"

    mapping: str = "linear"
    """linear: w falls from `high` at the least Om of the batch to `low` at the largest.
    exponential: w = exp(-k Om) with k = -ln(low) / max(largest Om, floor)."""
    low: float = 0.8
    """Smallest weight."""
    high: float = 1.2
    """Largest weight of "linear"; "exponential" starts at 1."""
    floor: float = 0.02
    """Least value that stands for the largest Om ("exponential")."""

    def __post_init__(self) -> None:
        check_choice("reweighting.mapping", self.mapping, MAPPINGS)
        check_number("reweighting.high", self.high)
        check_number("reweighting.low", self.low, above=0.0, maximum=self.most)
        check_number("reweighting.floor", self.floor, above=0.0)

    @property
    def most(self) -> float:
        """The largest weight."""
        return self.high if self.mapping == "linear" else 1.0

    def __str__(self) -> str:
        return f"{self.mapping} weight {self.low:g} to {self.most:g} by entropy change"


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyBand(Data):
    """EPO's smoothing, arXiv 2509.22576: a penalty on entropies far from their mean so far.

    The bonus is `entropy_coef (agg(H) - coef w agg(P))`, with P = 0 strictly between `low Hbar` and
    `high Hbar` and `penalty` elsewhere; Hbar and w come with the batch. P is constant in pieces, so
    the gradient is that of the bonus alone.
    """

    kind: ClassVar[str] = "an entropy band"

    low: float = 0.8
    """Lower edge, as a multiple of Hbar."""
    high: float = 1.2
    """Upper edge, as a multiple of Hbar."""
    penalty: float = 0.1
    """P outside of the band."""
    coef: float = 1.0
    """Coefficient of P."""
    level: str = "token"
    """What lies in the band: H of the "token", or the mean of H over its "sequence"."""
    width: int | None = None
    """Divisor of that mean (the padded width, in the published code); None: T_i."""

    def __post_init__(self) -> None:
        for field in ("low", "high", "penalty", "coef"):
            check_number(f"entropy_band.{field}", getattr(self, field), minimum=0.0)
        check_choice("entropy_band.level", self.level, LEVELS)
        if self.width is not None:
            check_count("entropy_band.width", self.width)
            if self.level == "token":
                raise ConfigError("entropy_band.width: level 'token' takes no mean; use None")

    def __str__(self) -> str:
        return f"{self.level} band [{self.low:g}, {self.high:g}] at {self.penalty:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyTarget(Data):
    """SIREN, arXiv 2509.25133: `coef (L_H - anchor)^2` on truncated entropies.

    L_H is the mean over sequences of the mean of Ht over the tokens above the sequence's quantile;
    a sequence without such a token adds 0 and counts. The anchor comes with the batch.
    """

    kind: ClassVar[str] = "an entropy target"

    coef: float = 0.005
    """Coefficient of the squared distance."""
    top_p: float = 0.8
    """Ht is the entropy of the likeliest tokens whose mass stays below top_p, renormalised."""
    top_k: int = 10000
    """At most so many of them."""
    quantile: float = 0.8
    """Tokens with Ht above this quantile of their sequence (linear interpolation) count."""

    def __post_init__(self) -> None:
        check_number("entropy_target.coef", self.coef)
        check_number("entropy_target.top_p", self.top_p, minimum=0.0, maximum=1.0)
        check_number("entropy_target.quantile", self.quantile, minimum=0.0, maximum=1.0)
        check_count("entropy_target.top_k", self.top_k)

    def __str__(self) -> str:
        return f"{self.coef:g} (top-{self.top_p:g} entropy above q{self.quantile:g} - anchor)^2"
