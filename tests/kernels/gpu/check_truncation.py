"""Cuts in Triton against the float64 reference: what is kept, its entropy, and SIREN's gradient.

Tolerances as in `check_linear_loss`. A cut whose mass is reached within rounding may fall on either
side of a token; the fixed inputs here stay clear of that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from check_linear_loss import BIAS, CU, DTYPES, HOLES, assert_close, batch_of, compare, head, moved
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_token_stats import triton_kernel, triton_row_pass
from eapo_fast.kernels.truncated_entropy.reference import truncated_entropy
from eapo_fast.recipes import Recipe

EXTRAS = ("kept_mass", "truncated_entropy")
CUTS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.8},
    "nothing": {"top_p": 0.0},
    "nearly all": {"top_p": 0.999},
    "top_k": {"top_k": 7},
    "one": {"top_k": 1},
    "more than there are": {"top_k": 10**6},
    "both": {"top_p": 0.7, "top_k": 4},
    "all three": {"top_p": 0.9, "top_k": 30, "min_p": 0.05},
}


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns at once, and few tokens near a border put aside: all ways through the search."""
    monkeypatch.setattr(triton_row_pass, "ROOM", 16)
    monkeypatch.setattr(triton_row_pass, "SPAN", 64)


def check(
    inputs: tuple[Tensor, Tensor, Tensor], device: torch.device, **settings: Any
) -> dict[str, Tensor]:
    """Compare mass and entropy with float64; returns the reference's."""

    def run(to: Any, backend: str) -> Any:
        own = {name: moved(value, to) for name, value in settings.items()}
        parts = (moved(x, to) for x in inputs)
        return ops.linear_token_stats(*parts, extras=EXTRAS, backend=backend, **own).extras

    got, want = run(device, "triton"), run(torch.float64, "reference")
    for name in EXTRAS:
        assert_close(got[name], want[name], torch.float32)
    return dict(want)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (2, 2), (1, 2047)])
def test_sizes(rows: int, vocab: int, cut: dict[str, Any], device: torch.device) -> None:
    check(head(rows, vocab), device, **cut)


@pytest.mark.parametrize(("cut", "dtype"), zip(("all three", "both", "top_p"), DTYPES, strict=True))
def test_every_way_of_the_search(
    cut: str, dtype: torch.dtype, device: torch.device, little_room: None
) -> None:
    """Duplicates of a weight's rows are ties; some lie at the border, some elsewhere."""
    hidden, weight, targets = head(4, 150, dtype=dtype)
    weight[torch.randperm(150, generator=torch.Generator().manual_seed(1))[:90]] = weight[
        :90
    ].clone()
    settings = {"softcap": 5.0, "temperature": 0.6, "bias": HOLES[150:], "vocab_size": 149,
                "banned": (torch.tensor([1, 1, 3]), torch.tensor([0, 77, 148]))}  # fmt: skip
    check((hidden, weight, targets), device, **CUTS[cut])
    check((hidden, weight, targets.clamp(max=148)), device, **CUTS[cut], **settings)


@pytest.mark.parametrize("level", [0.0, 3.0, -20.0])
def test_equal_logits_are_kept_in_the_order_of_their_ids(
    level: float, device: torch.device, little_room: None
) -> None:
    """More equal tokens than there is room for: of 100, 29 weigh less than 0.3 and 30 do not."""
    weight, hidden = torch.full((100, 1), level), torch.ones(1, 1)
    found = triton_kernel.TritonHead(
        hidden.to(device), weight.to(device), torch.zeros(1, dtype=torch.int64, device=device),
        bias=None, temperature=1.0, softcap=None, vocab_size=100, banned=None, chunk_size=None,
    )  # fmt: skip
    for cut, kept in (((0.295, None), 29), ((None, 41), 41), ((0.5, 12), 12), ((0.995, None), 99)):
        found.truncation = triton_row_pass.Cut(*cut)
        found.read(0, 1, keep=False)
        assert float(found.state[0, 8]) == kept - 1
        torch.testing.assert_close(float(found.extra("kept_mass")), kept / 100)
    want = check((hidden, weight, torch.tensor([0])), device, top_p=0.295)
    assert round(float(want["kept_mass"]) * 100) == 29


def test_which_tokens_are_kept(device: torch.device, little_room: None) -> None:
    """Exact logits: +-1e4, small ones, zeros of either sign, ties, and masses that are hit."""
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(64, generator=generator)
    rows = [row * 1e4, row * 1e-3, row * 0.0, row.sign() * 1e-3, row - 80, row.abs().round(),
            -row.abs().round(), row.round(), torch.zeros(64)]  # fmt: skip
    weight = torch.stack(rows, 1)
    own = triton_kernel.TritonHead(
        torch.eye(9, device=device), weight.to(device), torch.zeros(9, device=device).long(),
        bias=None, temperature=1.0, softcap=None, vocab_size=64, banned=None, chunk_size=None,
    )  # fmt: skip
    cuts = [CUTS[name] for name in ("top_p", "nothing", "top_k", "all three")]
    for cut in (*cuts, {"top_p": 0.5}, {"top_k": 64}, {"min_p": 1.0}, {"min_p": 0.4}):
        own.truncation = triton_row_pass.Cut(**cut)
        own.read(0, 9, keep=False)
        border, last = (x[:, None].cpu() for x in own.state[:, 7:].unbind(1))
        logits = weight.T
        got = (logits > border) | ((logits == border) & (torch.arange(64) <= last))
        log_p = logits.double().log_softmax(-1)
        want = own.truncation.kept(log_p)
        told_apart = (
            torch.arange(9) != 1
        )  # float64's log-probabilities of denormal logits are equal
        assert torch.equal(got[told_apart], want[told_apart]), cut
        mass, entropy = truncated_entropy(log_p, want)
        assert_close(own.extra("kept_mass"), mass, torch.float32)
        assert_close(own.extra("truncated_entropy"), entropy, torch.float32)


def test_large_vocabulary(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # where time goes with the number of blocks
        monkeypatch.setattr(triton_row_pass, "SPAN", 1 << 15)
        monkeypatch.setattr(triton_row_pass, "ROOM", 1 << 13)
    check(head(1, 151_936, width=4), device, top_p=0.8, top_k=10_000)


def test_rows_without_a_distribution(device: torch.device) -> None:
    hidden, weight, targets = head(3, 70)
    hidden[1, 0] = torch.nan
    own = triton_kernel.TritonHead(
        hidden.to(device), weight.to(device), targets.to(device), bias=None, temperature=1.0,
        softcap=None, vocab_size=70, banned=None, chunk_size=None,
    )  # fmt: skip
    own.truncation = triton_row_pass.Cut(0.8)
    own.read(0, 3, keep=False)
    for name in EXTRAS:
        assert own.extra(name).isfinite().tolist() == [True, False, True]


def siren(**changes: Any) -> tuple[Recipe, ops.PolicyBatch]:
    """SIREN with a strong pull on the entropy of few tokens, and a batch with an anchor."""
    recipe = recipes.get("siren").replace(max_length=50, **changes)
    assert recipe.entropy_target is not None
    target = recipe.entropy_target.replace(coef=0.7, top_k=60, quantile=0.4)
    batch = batch_of()
    stats = dict(batch.stats or {}) | {"anchor": torch.tensor(0.5)}
    return recipe.replace(entropy_target=target), replace(batch, stats=stats)


@pytest.mark.parametrize(("plan", "entropy_coef"), [("slab", 0.3), ("prepass", 0.0)])
def test_the_third_coefficient(plan: str, entropy_coef: float, device: torch.device) -> None:
    hidden, weight, targets = head(CU[-1], 300)
    weight[100:150] = weight[200:250]
    recipe, batch = siren(entropy_coef=entropy_coef)
    rows = torch.arange(CU[-1])
    found = compare(
        (hidden, weight, targets), batch, recipe, device, plan=plan, chunk_size=13,
        softcap=4.0, temperature=0.8, bias=BIAS, banned=(rows, (targets + 1 + rows % 5) % 300),
    )  # fmt: skip
    assert found.c is not None
    assert found.c.any()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_siren_in_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    recipe, batch = siren()
    frozen = dtype == torch.float16
    found = compare(head(CU[-1], 80, dtype=dtype), batch, recipe, device, frozen=frozen)
    assert found.c is not None
    assert found.c.any()
