"""Random packed batches for the policy losses, and what may be done to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import policy_oracle as oracle
import torch
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.recipes import EntropyBand, EntropyTarget, Recipe, Reweighting, Selection
from eapo_fast.recipes.parts import KLS
from eapo_fast.recipes.recipe import AGGREGATIONS

CU = [0, 4, 4, 9, 10, 15, 21]
"""Six sequences, the second of them empty."""
DOUBLE = torch.float64
PER_TOKEN = ("old_entropy", "max_logprob", "kept_mass", "truncated_entropy", "selected")

Case = dict[str, Any]


def random_case(seed: int = 3) -> Case:
    """Arguments of `ops.policy_loss` for 21 tokens, every statistic among them."""
    generator = torch.Generator().manual_seed(seed)
    rows, sequences = CU[-1], len(CU) - 1

    def normal(size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.randn(size, generator=generator, dtype=DOUBLE) * scale + shift

    logprob = normal(rows, 0.8, -1.5)
    old = logprob + normal(rows, 0.6)
    return {
        "logprob": logprob,
        "old_logprob": old,
        "advantages": normal(sequences),
        "cu_seqlens": torch.tensor(CU),
        "mask": torch.rand(rows, generator=generator) > 0.25,
        "entropy": normal(rows).abs(),
        "ref_logprob": logprob + normal(rows, 0.5),
        "stats": {
            "old_entropy": normal(rows).abs(),
            "max_logprob": old + normal(rows).abs() * 3,
            "kept_mass": 1 - 0.4 * torch.rand(rows, generator=generator, dtype=DOUBLE),
            "truncated_entropy": normal(rows).abs(),
            "anchor": torch.tensor(0.3, dtype=DOUBLE),
        },
    }


def forced(case: Case, recipe: Recipe) -> Case:
    """The case with what a random selection draws made the caller's choice."""
    if recipe.selection is None or recipe.selection.pick != "random":
        return case
    drawn = ops.policy_loss(**case, recipe=recipe, details=True).details["selected"]
    return case | {"stats": case["stats"] | {"selected": drawn}}


def wanted(recipe: Recipe, case: Case, **more: Any) -> tuple[Tensor, Tensor]:
    """The oracle's loss and token losses."""
    stats = case.get("stats") or {}
    return oracle.policy_loss(
        recipe,
        case["logprob"],
        case["old_logprob"],
        case["advantages"],
        case["cu_seqlens"].tolist(),
        case["mask"],
        case["entropy"],
        case["ref_logprob"],
        stats.get("weight"),
        stats=stats,
        **more,
    )


def rows_of(case: Case, rows: Tensor | slice, sequences: Any, cu_seqlens: Tensor) -> Case:
    """The case cut down to some rows and sequences, with new `cu_seqlens`."""
    total = len(case["logprob"])

    def cut(values: Any) -> Any:
        whole = isinstance(values, Tensor) and values.ndim and len(values) == total
        return values[rows] if whole else values

    stats = {name: cut(values) for name, values in case["stats"].items()}
    taken = {name: cut(values) for name, values in case.items() if name != "stats"}
    advantages = case["advantages"][sequences]
    return taken | {"stats": stats, "advantages": advantages, "cu_seqlens": cu_seqlens}


def part(case: Case, first: int, last: int) -> Case:
    """Sequences first ... last."""
    cu = case["cu_seqlens"]
    rows = slice(int(cu[first]), int(cu[last]))
    return rows_of(case, rows, slice(first, last), cu[first : last + 1] - cu[first])


def permuted(case: Case, order: Sequence[int]) -> tuple[Case, Tensor]:
    """The case with its sequences in another order, and where its rows were."""
    cu = case["cu_seqlens"].tolist()
    rows = torch.cat([torch.arange(cu[i], cu[i + 1]) for i in order])
    lengths = case["cu_seqlens"].diff()[list(order)]
    moved = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    return rows_of(case, rows, list(order), moved), rows


def counts(case: Case) -> dict[str, int]:
    """Tokens and sequences of the whole case."""
    spans = itertools.pairwise(case["cu_seqlens"].tolist())
    return {
        "num_tokens": int(case["mask"].sum()),
        "num_sequences": sum(bool(case["mask"][a:b].any()) for a, b in spans),
    }


def grid() -> Iterator[Recipe]:
    """Every recipe as published, and variants that meet every branch on 21 tokens."""
    for name in recipes.names():
        yield recipes.get(name).replace(max_length=11)
    for aggregation in AGGREGATIONS:
        base = recipes.get("ppo_dual_clip").replace(aggregation=aggregation, max_length=7)
        yield base.replace(name=aggregation, delta=1.5)
    eapo = recipes.get("eapo")
    for kl in KLS:
        yield recipes.get("grpo").replace(name=f"kl {kl}", kl=kl, beta=0.3)
    for ratio, surrogate in itertools.product(
        ("sequence", "sequence_token"), ("clip", "none", "detached_clip")
    ):
        yield eapo.replace(name=f"{ratio} {surrogate}", ratio=ratio, surrogate=surrogate)
    yield recipes.get("gmpo").replace(name="gmpo asymmetric", epsilon=0.05, epsilon_high=0.3)
    yield eapo.replace(name="everything", delta=1.6, beta=0.2, entropy_coef=0.05)
    yield from _batch_global()


def _batch_global() -> Iterator[Recipe]:
    def named(name: str, base: str, **changes: Any) -> Recipe:
        return recipes.get(base).replace(name=name, max_length=11, **changes)

    eapo, clip = recipes.get("eapo"), recipes.get("clip_cov").selection
    lp, kl = recipes.get("lp_reg").selection, recipes.get("kl_cov").selection
    assert clip is not None
    assert lp is not None
    assert kl is not None
    busy = clip.replace(low=-0.3, high=1.0, fraction=0.25)
    yield named("clip_cov busy", "clip_cov", selection=busy)
    yield eapo.replace(name="gspo drop", ratio="sequence", selection=kl.replace(effect="drop"))
    yield named("kl_cov busy", "kl_cov", selection=kl.replace(fraction=0.3))
    yield named("lp_reg busy", "lp_reg", selection=lp.replace(fraction=0.6))
    swap = Selection(
        score="covariance", sign="positive", pick="lowest", fraction=0.5, effect="kl_to_proxy"
    )
    yield eapo.replace(name="clip and proxy", selection=swap, beta=0.1)
    exponential = Reweighting(mapping="exponential", low=0.5, floor=0.4)
    yield named("steer exponential", "steer", reweighting=exponential)
    yield eapo.replace(name="both", selection=swap, reweighting=Reweighting(low=0.1))
    band = EntropyBand(level="sequence", penalty=0.3, coef=2.0)
    yield named("epo sequence", "epo", entropy_band=band, entropy_coef=0.2)
    yield named("epo width", "epo", entropy_band=band.replace(width=6), entropy_coef=0.2)
    yield named("siren busy", "siren", entropy_target=EntropyTarget(coef=0.7, quantile=0.4))


GRID = list(grid())
