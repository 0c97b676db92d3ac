"""Token-local policy losses in one read of the inputs, by the compiled CPU kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from eapo_fast import _core
from eapo_fast.kernels.native import follow_torch_threads
from eapo_fast.kernels.policy_loss.batch import LossOutput, PolicyBatch
from eapo_fast.kernels.policy_loss.metrics import metric_names
from eapo_fast.kernels.policy_loss.rows import norm_length
from eapo_fast.recipes import Recipe

_SUMS = (
    "loss",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/delta_mean",
    "ratio_mean",
    "logp_difference_mean",
    "kl",
    "entropy",
    "ratio_max",
    "logp_difference_max",
    "num_tokens",
)


def refusal(logprob: Tensor, recipe: Recipe) -> str | None:
    """Return why the compiled kernel cannot evaluate `recipe` on `logprob`, or None."""
    if logprob.device.type != "cpu":
        return f"the tensors are on {logprob.device}"
    if logprob.dtype == torch.float64:
        return "it computes in float32, got float64"
    if recipe.locality != "token-local" or recipe.entropy_band is not None:
        return f"it knows single tokens, and recipe {recipe.name!r} looks at more than one"
    return None


def policy_loss(
    logprob: Tensor, entropy: Tensor | None, batch: PolicyBatch, recipe: Recipe
) -> LossOutput:
    """Return the detached loss of a checked batch, metrics and coefficients; float32."""
    follow_torch_threads()
    results = Results.empty(len(logprob), recipe)
    _core.policy_loss(
        _plain(logprob),
        **batch_arguments(batch),
        entropy=_optional(entropy),
        method=method_of(recipe),
        **results.arguments(),
    )
    return results.output(names_of(recipe, batch, entropy))


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """What the kernels fill: coefficients and losses [N] of the tokens, and sums over them."""

    a: Tensor
    b: Tensor | None
    token_loss: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, tokens: int, recipe: Recipe) -> Results:
        """Return room for the results of `recipe`."""
        a = torch.empty(tokens)
        return cls(
            a,
            torch.empty_like(a) if recipe.entropy_coef else None,
            torch.empty_like(a),
            torch.empty(_core.POLICY_SUMS, dtype=torch.float64),
        )

    def arguments(self) -> dict[str, Any]:
        """Return them by the names that the kernels use."""
        return {"a": self.a, "b": self.b, "token_loss": self.token_loss, "sums": self.sums}

    def output(self, names: list[str]) -> LossOutput:
        """Return the detached loss with the metrics `names`."""
        a, b = self.a, self.b
        return LossOutput(
            loss=self.sums[0].float(),
            metrics=metrics_of_sums(self.sums, names),
            a=a,
            b=a.new_zeros(()).expand(len(a)) if b is None else b,
            token_loss=self.token_loss,
        )


def batch_arguments(batch: PolicyBatch) -> dict[str, Any]:
    """Return a checked batch by the names that the kernels use."""
    return {
        "old_logprob": _plain(batch.old_logprob),
        "advantages": _plain(batch.advantages),
        "cu_seqlens": batch.cu_seqlens.long().contiguous(),
        "mask": None if batch.mask is None else _flags(batch.mask),
        "ref_logprob": _optional(batch.ref_logprob),
        "factor": _optional((batch.stats or {}).get("weight")),
        "num_tokens": -1.0 if batch.num_tokens is None else float(batch.num_tokens),
        "num_sequences": -1.0 if batch.num_sequences is None else float(batch.num_sequences),
    }


def names_of(recipe: Recipe, batch: PolicyBatch, entropy: Tensor | None) -> list[str]:
    """Return the names of the metrics of a batch."""
    return metric_names(recipe, batch.ref_logprob is not None, entropy is not None)


@lru_cache(maxsize=64)
def method_of(recipe: Recipe) -> _core.PolicyMethod:
    """Return the settings of a token-local recipe."""
    return _core.PolicyMethod(
        surrogate=recipe.surrogate,
        kl=recipe.kl,
        aggregation=recipe.aggregation,
        least=1 - recipe.epsilon,
        most=1 + recipe.clip_high,
        delta=float("inf") if recipe.delta is None else recipe.delta,
        beta=recipe.beta,
        entropy_coef=recipe.entropy_coef,
        max_length=norm_length(recipe) if recipe.aggregation.endswith("-norm") else 1.0,
    )


def metrics_of_sums(sums: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Return the metrics, by name, of sums [11] in the order of `_SUMS`."""
    means = dict(zip(_SUMS, (sums / sums[-1]).float().unbind(), strict=True))
    largest = dict(zip(_SUMS, sums.float().unbind(), strict=True))
    means["clip_ratio/region_mean"] = means["clip_ratio/low_mean"] + means["clip_ratio/high_mean"]
    return {name: (largest if name.endswith("_max") else means)[name] for name in names}


def _plain(values: Tensor) -> Tensor:
    return values.detach().float().contiguous()


def _optional(values: Tensor | None) -> Tensor | None:
    return None if values is None else _plain(values)


def _flags(mask: Tensor) -> Tensor:
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()
