"""`ops.logits_policy_loss` on GPUs against autograd in float64.

Tolerances are those of `check_linear_loss.py`; a gradient in a dtype of 2 bytes is rounded once.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from check_linear_loss import CU, assert_close, batch_of, on
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.kernels import checks
from eapo_fast.kernels.linear_token_stats import NonFiniteError
from eapo_fast.recipes import Recipe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKEND = os.environ.get("EAPO_CHECK", "triton")


def logits_of(vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits with an outlier, banned tokens, a row of banned blocks, and their targets."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(CU[-1], vocab, generator=generator) * 2
    logits[1, vocab // 2] = 20.0
    logits[2, : vocab // 2] = -torch.inf
    logits[3] -= 90.0
    targets = torch.randint(vocab // 2, vocab, (CU[-1],), generator=generator)
    return logits.to(dtype), targets


def loss(
    logits: Tensor,
    targets: Tensor,
    batch: ops.PolicyBatch,
    recipe: Recipe,
    device: torch.device | None,
    **settings: Any,
) -> tuple[ops.LossOutput, Tensor]:
    """Loss and gradient of -2 losses; without a device in float64 on the reference."""
    leaf = (logits.clone().to(device) if device else logits.double()).requires_grad_()
    if device is None:
        settings.pop("in_place", None)
    to: Any = device or torch.float64
    found = ops.logits_policy_loss(
        leaf * 1, targets.to(device or "cpu"), on(batch, to), recipe,
        backend=BACKEND if device else "reference", **settings,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.loss * -2, leaf)
    return found, gradient


def compare(
    inputs: tuple[Tensor, Tensor],
    batch: ops.PolicyBatch,
    recipe: Recipe,
    device: torch.device,
    **settings: Any,
) -> Tensor:
    got, gradient = loss(*inputs, batch, recipe, device, **settings)
    want, wanted = loss(*inputs, batch, recipe, None, **settings)
    for name in ("loss", "a", "b", "token_loss"):
        assert_close(getattr(got, name), getattr(want, name), torch.float32)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        torch.testing.assert_close(
            got.metrics[name].cpu().double(), value.double(), rtol=1e-4, atol=1e-5
        )
    assert gradient.dtype == inputs[0].dtype
    assert_close(gradient, wanted, gradient.dtype)
    return gradient


@pytest.mark.parametrize(
    "name", ["cispo", "gspo_token", "gmpo", "clip_cov", "kl_cov", "lp_reg", "steer", "epo"]
)
def test_recipes(name: str, device: torch.device) -> None:
    recipe = recipes.get(name).replace(beta=0.05, max_length=30)
    compare(logits_of(50), batch_of(), recipe, device, temperature=0.8)


@pytest.mark.parametrize(("vocab", "in_place"), [(7, True), (300, False), (4097, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_dtypes_and_sizes(
    name: str, dtype: torch.dtype, vocab: int, in_place: bool, device: torch.device
) -> None:
    recipe = recipes.get(name).replace(entropy_coef=0.01, delta=1.5)
    scaled = replace(batch_of(), advantages=torch.tensor([1.0, 0.4, 0.0, -1.1, 0.6]) * 100)
    compare(logits_of(vocab, dtype), scaled, recipe, device, in_place=in_place)


@pytest.mark.skipif(BACKEND == "cuda", reason="the CUDA rows compute no cut")
def test_siren(device: torch.device) -> None:
    recipe = recipes.get("siren").replace(max_length=30, entropy_coef=0.3)
    batch = batch_of()
    stats = dict(batch.stats or {}) | {"anchor": torch.tensor(0.7)}
    inputs = logits_of(200, torch.bfloat16)
    compare(inputs, replace(batch, stats=stats), recipe, device, in_place=True)


def test_the_largest_vocabulary(device: torch.device) -> None:
    logits, targets = logits_of(151_936, torch.bfloat16)
    rows = slice(CU[3], CU[4] + 3)  # a sequence of one token, and three tokens of the next
    batch = batch_of()
    assert batch.mask is not None
    batch = ops.PolicyBatch(
        old_logprob=batch.old_logprob[rows] - 8, advantages=torch.tensor([1.0, -1.0]),
        cu_seqlens=torch.tensor([0, 1, 4]),
    )  # fmt: skip
    compare((logits[rows], targets[rows]), batch, recipes.get("eapo"), device, in_place=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["eapo", "gmpo"])
def test_masked_rows_may_hold_anything(name: str, in_place: bool, device: torch.device) -> None:
    (logits, targets), batch = logits_of(300), batch_of()
    assert batch.mask is not None
    want, wanted = loss(logits, targets, batch, recipes.get(name), device)
    logits[~batch.mask], targets[~batch.mask] = torch.nan, -100
    got, gradient = loss(
        logits, targets, batch_of(poison=True), recipes.get(name), device, in_place=in_place
    )
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(gradient, wanted)
    assert not gradient[~batch.mask].any()


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_parts_of_wider_rows(name: str, device: torch.device) -> None:
    """Rows at a distance: read where they lie; their gradient leaves the other columns alone."""
    (logits, targets), batch = logits_of(290), batch_of()
    want, wanted = loss(logits, targets, batch, recipes.get(name), device)
    wide = torch.full((CU[-1], 310), torch.nan)
    wide[:, 5:295] = logits
    leaf = wide.to(device).requires_grad_()
    found = ops.logits_policy_loss(
        (leaf * 1)[:, 5:295], targets.to(device), on(batch, device), recipes.get(name),
        backend=BACKEND, in_place=True,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.loss * -2, leaf)
    assert torch.equal(found.loss, want.loss)
    assert torch.equal(gradient[:, 5:295], wanted)
    assert not gradient[:, :5].any()


def test_logits_that_are_not_rows_are_left_alone(device: torch.device) -> None:
    """One row of a transposed product, and logits behind each other by column."""
    (logits, targets), batch = logits_of(300), batch_of()
    recipe = recipes.get("eapo")
    want, wanted = loss(logits, targets, batch, recipe, device)
    by_column = logits.T.contiguous().to(device).T.requires_grad_()
    kept = by_column.detach().clone()
    found = ops.logits_policy_loss(
        by_column, targets.to(device), on(batch, device), recipe, backend=BACKEND
    )
    (gradient,) = torch.autograd.grad(found.loss * -2, by_column)
    assert torch.equal(by_column.detach(), kept)
    assert torch.equal(found.loss, want.loss)
    assert torch.equal(gradient, wanted)
    one = ops.PolicyBatch(
        old_logprob=torch.zeros(1), advantages=torch.ones(1), cu_seqlens=torch.tensor([0, 1])
    )
    row = torch.randn(300, 1, device=device).T.requires_grad_()
    kept = row.detach().clone()
    ops.logits_policy_loss(row, targets[:1].to(device), on(one, device), recipe, backend=BACKEND)
    assert torch.equal(row.detach(), kept)


def test_in_place_is_the_memory_of_the_logits(device: torch.device) -> None:
    (logits, targets), batch = logits_of(300), batch_of()
    leaf = logits.to(device).requires_grad_()
    own = leaf * 1
    before = own._version
    inputs = targets.to(device), on(batch, device), recipes.get("eapo")
    found = ops.logits_policy_loss(own, *inputs, backend=BACKEND, in_place=True)
    assert own._version > before
    (gradient,) = torch.autograd.grad(found.loss, own, retain_graph=True)
    assert gradient.data_ptr() == own.data_ptr()
    with pytest.raises(RuntimeError, match="a second way back"):
        torch.autograd.grad(found.loss, own)
    with pytest.raises(ValueError, match="in_place: logits are"):
        ops.logits_policy_loss(leaf, *inputs, backend=BACKEND, in_place=True)
    with torch.no_grad():
        kept = leaf.clone()
        ops.logits_policy_loss(leaf, *inputs, backend=BACKEND, in_place=True)
    assert torch.equal(leaf, kept)


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_nothing_to_train_on(name: str, device: torch.device) -> None:
    batch = batch_of()
    assert batch.mask is not None
    batch.mask[:] = False
    found, gradient = loss(*logits_of(50), batch, recipes.get(name), device, in_place=True)
    assert found.loss.item() == 0
    assert not gradient.any()
    none = ops.PolicyBatch(
        old_logprob=torch.zeros(0), advantages=torch.zeros(0), cu_seqlens=torch.zeros(1).long()
    )
    empty = torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)
    assert loss(*empty, none, recipes.get(name), device)[0].loss.item() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_a_row_without_a_distribution_is_named(
    name: str, value: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logits, targets), batch = logits_of(300), batch_of()
    assert batch.mask is not None
    bad = int(batch.mask.nonzero()[6])
    logits[bad, 70] = value
    inputs = targets.to(device), on(batch, device), recipes.get(name)
    if device.type == "cpu":
        with pytest.raises(NonFiniteError, match=f"token {bad} has no distribution"):
            ops.logits_policy_loss(logits.requires_grad_(), *inputs, backend=BACKEND)
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)
    found = ops.logits_policy_loss(logits.detach().to(device), *inputs, backend=BACKEND)
    assert found.loss.isnan()
    with pytest.raises(NonFiniteError, match=f"token {bad} has no distribution"):
        found.check()


def test_a_target_that_is_no_column_reads_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody may look at targets first."""
    from eapo_fast.kernels import logits_policy_loss as op

    monkeypatch.setattr(op, "_check_targets", lambda *_: None)
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)
    (logits, targets), batch = logits_of(300), batch_of()
    assert batch.mask is not None
    at = int(batch.mask.nonzero()[4])
    for wrong in (-100, 300, 2**40):
        targets[at] = wrong
        found = ops.logits_policy_loss(
            logits.to(device), targets.to(device), on(batch, device), recipes.get("eapo"),
            backend=BACKEND,
        )  # fmt: skip
        with pytest.raises(NonFiniteError, match=f"the loss is nan, first at token {at} "):
            found.check()
