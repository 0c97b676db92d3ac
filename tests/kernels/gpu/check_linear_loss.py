"""The LM-head losses on GPUs against the float64 reference: values, gradients, rows, settings.

`EAPO_CHECK`: "triton", or "cuda", whose products are torch's.

Tolerances. float32: 2e-5 of the largest number of a result. bfloat16 and float16: logits are exact
sums of exact products, so statistics agree as in float32; gradients are rounded once to the dtype
on the way into their products and once at the end: 2**-7 (bfloat16) of the norm.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.kernels import checks
from eapo_fast.kernels.linear_token_stats import NonFiniteError, library_head, triton_kernel
from eapo_fast.kernels.linear_token_stats import triton_products as products
from eapo_fast.recipes import Recipe

BACKEND = os.environ.get("EAPO_CHECK", "triton")
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if BACKEND == "triton" else [])
CU = [0, 9, 9, 20, 21, 40]
RECIPES = ["eapo", "cispo", "gspo", "gmpo"]


def head(
    rows: int, vocab: int, *, width: int = 20, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 2 / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


def moved(value: Any, to: Any) -> Any:
    if isinstance(value, Tensor):
        cast = isinstance(to, torch.device) or value.is_floating_point()
        return value.detach().clone().to(to) if cast else value
    return tuple(moved(x, to) for x in value) if isinstance(value, tuple) else value


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    got, want = got.detach().cpu().double(), want.detach().double()
    if dtype == torch.float32:
        room = 2e-5 * (1e-3 + float(want.abs().max() if want.numel() else 0))
        torch.testing.assert_close(got, want, rtol=0, atol=room)
    else:
        assert got.isfinite().all()
        assert (got - want).norm() <= 2**-7 * want.norm() + 1e-6


def statistics(
    inputs: tuple[Tensor, Tensor, Tensor],
    device: torch.device | None,
    *,
    backend: str = BACKEND,
    **settings: Any,
) -> tuple[Any, tuple[Tensor, ...]]:
    """Statistics and gradients of a sum with coefficients of both signs, and 0."""
    to: Any = device or torch.float64
    hidden, weight, targets = (moved(x, to) for x in inputs)
    settings = {k: moved(v, to) for k, v in settings.items()}
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in settings:
        leaves.append(settings["bias"].requires_grad_())
    found = ops.linear_token_stats(
        *leaves[:2], targets, backend=backend if device else "reference", **settings
    )
    rows = torch.arange(len(targets), device=device or "cpu")
    a, b = (rows % 5 - 2.0) / 3, (rows % 3 - 1.0) / 4
    loss = (a * found.logprob).sum() + (b * found.entropy).sum()
    return found, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (63, 3), (130, 100), (5, 4097), (3, 9001)])
def test_odd_sizes(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = head(rows, vocab, dtype=dtype)
    (got, gradients), (want, wanted) = statistics(inputs, device), statistics(inputs, None)
    for name in ("logprob", "entropy"):
        assert_close(getattr(got, name), getattr(want, name), torch.float32)
    for g, w in zip(gradients, wanted, strict=True):
        assert g.dtype == dtype
        assert_close(g, w, dtype)


def test_large_vocabulary(device: torch.device) -> None:
    inputs = head(2, 152_064, width=4)
    (got, gradients), (want, wanted) = statistics(inputs, device), statistics(inputs, None)
    assert_close(got.logprob, want.logprob, torch.float32)
    assert_close(gradients[1], wanted[1], torch.float32)
    error = (gradients[0].cpu().double() - wanted[0]).abs().max()
    room = 2e-5 * wanted[0].abs().max()
    if BACKEND == "cuda":  # a sum of 152k products in the library's order errs as torch's does
        plain, _ = statistics(inputs, torch.device("cpu"), backend="reference")[1]
        room += (plain.double() - wanted[0]).abs().max()
    assert error <= room


BIAS = torch.linspace(-1, 1, 300)
HOLES = BIAS.clone().index_fill(0, torch.tensor([3, 299]), -torch.inf)
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "bias": {"bias": BIAS},
    "-inf bias": {"bias": HOLES},
    "softcap": {"softcap": 2.5, "temperature": 1.3},
    "padded vocabulary": {"vocab_size": 283, "bias": BIAS},
    "banned": {"banned": (torch.tensor([9, 0, 3, 3, 0]), torch.tensor([1, 22, 5, 0, 2]))},
    "chunks": {"chunk_size": 7},
    "everything": {
        "bias": HOLES,
        "softcap": 4.0,
        "temperature": 0.8,
        "vocab_size": 290,
        "banned": (torch.tensor([7, 2, 2]), torch.tensor([4, 19, 0])),
        "chunk_size": 6,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(settings: dict[str, Any], device: torch.device) -> None:
    hidden, weight, targets = head(19, 300)
    inputs = hidden, weight, 30 + targets % 250  # none of them banned
    got, gradients = statistics(inputs, device, **settings)
    want, wanted = statistics(inputs, None, **settings)
    for name in ("logprob", "entropy"):
        assert_close(getattr(got, name), getattr(want, name), torch.float32)
    for g, w in zip(gradients, wanted, strict=True):
        assert_close(g, w, torch.float32)
    assert not gradients[1][settings.get("vocab_size", 300) :].any()


def test_extras(device: torch.device) -> None:
    inputs = head(9, 5000)
    names = ("sum_p3", "max_logprob", "sum_p2", "p_max", "truncated_entropy", "kept_mass")
    banned = torch.arange(9), torch.arange(9)
    for min_p in (0.0, 0.02, 0.4, 1.0):
        settings = {"extras": names, "min_p": min_p, "banned": banned, "softcap": 8.0}
        got, _ = statistics(inputs, device, **settings)
        want, _ = statistics(inputs, None, **settings)
        for name in names:
            assert_close(got.extras[name], want.extras[name], torch.float32)


def test_extreme_logits(device: torch.device) -> None:
    """+-1e4, shifts of all logits, and ties."""
    weight = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    weight[7] = weight.abs().max() + 0.5
    for scale in (1e4, -1e4):
        hidden = torch.full((3, 1), scale)
        targets = torch.tensor([7, int((hidden[0] * weight[:, 0]).argmax()), 0])
        (got, gradients), (want, wanted) = (
            statistics((hidden, weight, targets), to) for to in (device, None)
        )
        torch.testing.assert_close(got.logprob.detach().cpu().double(), want.logprob.detach(),
                                   rtol=1e-6, atol=1e-6)  # fmt: skip
        for g, w in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(g.cpu().double(), w, rtol=1e-5, atol=1e-4)
    zeros = torch.zeros(2, 3), torch.zeros(4097, 3), torch.tensor([0, 4096])
    got, _ = statistics(zeros, device)
    log_v = torch.tensor(4097.0).log().expand(2)
    torch.testing.assert_close(got.entropy.detach().cpu(), log_v)
    torch.testing.assert_close(got.logprob.detach().cpu(), -log_v)


def test_a_banned_target_has_no_gradient_of_its_own(device: torch.device) -> None:
    hidden, weight, _ = head(3, 40)
    inputs = hidden, weight, torch.tensor([4, 9, 3])
    banned = torch.tensor([1]), torch.tensor([9])
    leaves = [x.to(device).requires_grad_() for x in inputs[:2]]
    found = ops.linear_token_stats(
        *leaves, inputs[2].to(device), backend=BACKEND, banned=moved(banned, device)
    )
    assert found.logprob[1] == -torch.inf
    grads = torch.autograd.grad(found.logprob.nan_to_num(neginf=0.0).sum() + found.entropy.sum(),
                                leaves)  # fmt: skip
    assert all(g.isfinite().all() for g in grads)


def batch_of(rows: int = CU[-1], *, poison: bool = False) -> ops.PolicyBatch:
    generator = torch.Generator().manual_seed(4)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    old = normal(rows) * 0.5 - 4
    mask = torch.rand(rows, generator=generator) > 0.3
    stats = {
        "weight": normal(rows).abs(),
        "old_entropy": normal(rows).abs(),
        "max_logprob": old + normal(rows).abs(),
        "kept_mass": 1 - 0.4 * torch.rand(rows, generator=generator),
    }
    values = {"old_logprob": old, "ref_logprob": old + 0.3 * normal(rows), **stats}
    for x in values.values():
        x[~mask] = torch.nan if poison else x[~mask]
    return ops.PolicyBatch(
        old_logprob=values["old_logprob"],
        advantages=torch.tensor([1.0, 0.4, 0.0, -1.1, 0.6]),
        cu_seqlens=torch.tensor(CU),
        mask=mask,
        ref_logprob=values["ref_logprob"],
        stats=stats | {"step": torch.tensor(3)},
    )


def on(batch: ops.PolicyBatch, to: Any) -> ops.PolicyBatch:
    names = ("old_logprob", "advantages", "cu_seqlens", "mask", "ref_logprob")
    stats = {k: moved(v, to) for k, v in (batch.stats or {}).items()}
    return replace(batch, **{n: moved(getattr(batch, n), to) for n in names}, stats=stats)


def loss(
    inputs: tuple[Tensor, Tensor, Tensor],
    batch: ops.PolicyBatch,
    recipe: Recipe,
    device: torch.device | None,
    *,
    frozen: bool = False,
    **settings: Any,
) -> tuple[ops.LossOutput, tuple[Tensor, ...]]:
    to: Any = device or torch.float64
    hidden, weight, targets = (moved(x, to) for x in inputs)
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
    settings = {k: moved(v, to) for k, v in settings.items()}
    if device is None:
        settings.pop("plan", None)
    found = ops.linear_policy_loss(
        hidden, weight, targets, on(batch, to), recipe,
        backend=BACKEND if device else "reference", **settings,
    )  # fmt: skip
    return found, torch.autograd.grad(found.loss * 3, leaves)


def compare(
    inputs: tuple[Tensor, Tensor, Tensor],
    batch: ops.PolicyBatch,
    recipe: Recipe,
    device: torch.device,
    **settings: Any,
) -> ops.LossOutput:
    got, gradients = loss(inputs, batch, recipe, device, **settings)
    want, wanted = loss(inputs, batch, recipe, None, **settings)
    for name in ("loss", "a", "b", "token_loss"):
        assert_close(getattr(got, name), getattr(want, name), torch.float32)
    assert (got.c is None) == (want.c is None)
    if got.c is not None and want.c is not None:
        assert_close(got.c, want.c, torch.float32)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        torch.testing.assert_close(
            got.metrics[name].cpu().double(), value.double(), rtol=1e-4, atol=1e-5
        )
    for g, w in zip(gradients, wanted, strict=True):
        assert_close(g, w, inputs[0].dtype)
    return got


@pytest.mark.parametrize("name", RECIPES)
def test_every_plan(name: str, device: torch.device) -> None:
    inputs = head(CU[-1], 200)
    recipe = recipes.get(name).replace(beta=0.05)
    for plan, chunk in (("auto", None), ("auto", 16), ("prepass", 25), ("slab", 13)):
        compare(inputs, batch_of(), recipe, device, plan=plan, chunk_size=chunk)
    if not recipe.entropy_coef:
        compare(inputs, batch_of(), recipe, device, plan="scale", chunk_size=9, frozen=True)


@pytest.mark.parametrize("aggregation", recipes.recipe.AGGREGATIONS)
def test_every_aggregation(aggregation: str, device: torch.device) -> None:
    recipe = recipes.get("eapo").replace(
        aggregation=aggregation, max_length=17, entropy_coef=0.01, delta=1.5
    )
    compare(head(CU[-1], 300), batch_of(), recipe, device, chunk_size=13)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_low_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    compare(head(CU[-1], 900, dtype=dtype), batch_of(), recipes.get(name), device, chunk_size=17)


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_bias_softcap_and_bans(name: str, device: torch.device) -> None:
    inputs = head(CU[-1], 300)
    rows = torch.arange(CU[-1])
    banned = rows, (inputs[2] + 1 + rows % 5) % 300
    compare(inputs, batch_of(), recipes.get(name), device, banned=banned, bias=BIAS, softcap=5.0,
            temperature=0.9, chunk_size=16)  # fmt: skip


@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo"])
def test_masked_rows_may_hold_anything(name: str, device: torch.device) -> None:
    hidden, weight, targets = head(CU[-1], 300)
    batch = batch_of()
    want, wanted = loss((hidden, weight, targets), batch, recipes.get(name), device)
    assert batch.mask is not None
    hidden[~batch.mask], targets[~batch.mask] = torch.nan, -100
    got, gradients = loss(
        (hidden, weight, targets), batch_of(poison=True), recipes.get(name), device
    )
    assert torch.equal(got.loss, want.loss)
    assert all(map(torch.equal, gradients, wanted))
    assert not gradients[0][~batch.mask].any()


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_nothing_to_train_on(name: str, device: torch.device) -> None:
    batch = batch_of()
    assert batch.mask is not None
    batch.mask[:] = False
    found, (of_hidden, of_weight) = loss(head(CU[-1], 50), batch, recipes.get(name), device)
    assert found.loss.item() == 0
    assert not of_hidden.any()
    assert not of_weight.any()


def test_rows_that_teach_nothing_leave_the_list(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if BACKEND == "cuda":
        pytest.skip("its list is made before the logits: see test_what_needs_no_gradient")
    lengths: list[int] = []
    listed = products.listed

    def noted(flags: Tensor) -> tuple[Tensor, Tensor]:
        order, count = listed(flags)
        lengths.append(int(count))
        return order, count

    monkeypatch.setattr(triton_kernel.products, "listed", noted)
    found, _ = loss(head(CU[-1], 300), batch_of(), recipes.get("eapo"), device, chunk_size=8)
    batch = batch_of()
    assert batch.mask is not None
    assert sum(lengths[1:] if lengths[0] == int(batch.mask.sum()) else lengths) == int(
        (found.a != 0).sum()
    )
    assert int((found.a != 0).sum()) < int(batch.mask.sum())


def test_the_fused_launch_gives_the_coefficients_of_the_policy_loss(device: torch.device) -> None:
    """The token program sits in both kernels: the same bits in the interpreter."""
    recipe = recipes.get("eapo").replace(beta=0.1, entropy_coef=0.01, delta=2.0)
    from eapo_fast.kernels.linear_policy_loss import row_lists, triton_plan

    inputs = [x.to(device) for x in head(CU[-1], 300)]
    batch = on(batch_of(), device)
    assert batch.mask is not None
    settings: dict[str, Any] = {
        "bias": None, "temperature": 1.0, "softcap": None, "vocab_size": 300, "banned": None,
        "chunk_size": 8, "wanted": (True, True, False),
    }  # fmt: skip
    own: triton_kernel.TritonHead
    if BACKEND == "cuda":
        lists = row_lists.row_list(batch, recipe)
        own = library_head.LibraryHead(*inputs, lists=lists, **settings)
    else:
        own = triton_kernel.TritonHead(*inputs, live=products.listed(batch.mask), **settings)
    found = triton_plan.run(own, batch, recipe, "slab", (True, True, False))
    for got, want in ((own.a, found.a), (own.b, found.b), (own.losses, found.token_loss)):
        if device.type == "cpu":
            assert torch.equal(got, want)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def with_a_bad_row() -> tuple[tuple[Tensor, Tensor, Tensor], ops.PolicyBatch, int]:
    """A masked-in row of a sequence without advantage, whose hidden state holds a NaN."""
    hidden, weight, targets = head(CU[-1], 300)
    batch = batch_of()
    assert batch.mask is not None
    bad = CU[2] + int(batch.mask[CU[2] :].nonzero()[3])
    hidden[bad, 2] = torch.nan
    return (hidden, weight, targets), batch, bad


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_a_bad_row_is_reported_by_its_place(name: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU nothing waits for the check; the loss is NaN")
    inputs, batch, bad = with_a_bad_row()
    with pytest.raises(NonFiniteError, match=f"token {bad} has no distribution"):
        loss(inputs, batch, recipes.get(name), device)
    with pytest.raises(NonFiniteError, match=f"token {bad} has no distribution"):
        statistics(inputs, device)


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo", "kl_cov"])
def test_a_bad_row_makes_the_loss_nan_and_is_named_to_who_waits(
    name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; GMPO's own loss would not notice a row of a sequence without advantage."""
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)
    inputs, batch, bad = with_a_bad_row()
    moved_to = [moved(x, device) for x in inputs]
    found = ops.linear_policy_loss(*moved_to, on(batch, device), recipes.get(name), backend=backend)
    assert found.loss.isnan()
    with pytest.raises(NonFiniteError, match=f"token {bad} has no distribution"):
        found.check()
    stats = ops.linear_token_stats(*moved_to, backend=backend)
    assert stats.logprob.isnan().nonzero().flatten().tolist() == [bad]
    with pytest.raises(NonFiniteError, match=f"token {bad} has no distribution"):
        stats.check()


def test_a_loss_that_is_not_finite_names_its_token(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)
    batch = batch_of()
    assert batch.mask is not None
    at = int(batch.mask.nonzero()[7])
    batch.old_logprob[at] = torch.nan
    inputs = [moved(x, device) for x in head(CU[-1], 50)]
    found = ops.linear_policy_loss(*inputs, on(batch, device), recipes.get("eapo"), backend=BACKEND)
    assert found.bad_token is not None
    assert int(found.bad_token) == -1
    with pytest.raises(NonFiniteError, match=f"the loss is nan, first at token {at} "):
        found.check()
    given = ops.policy_loss(
        inputs[0][:, 0], on(batch, device).old_logprob, on(batch, device).advantages,
        on(batch, device).cu_seqlens, mask=on(batch, device).mask, recipe=recipes.get("eapo"),
        backend="triton",
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=f"first at token {at} "):
        given.check()


def test_the_same_bits_for_any_slab(device: torch.device) -> None:
    """Statistics do not depend on the slab, and a run repeats itself."""
    inputs = head(CU[-1], 300)
    runs = [loss(inputs, batch_of(), recipes.get("eapo"), device, chunk_size=c) for c in (8, 8, 40)]
    if BACKEND != "cuda":  # a library may multiply other numbers of rows in another way
        assert torch.equal(runs[0][0].a, runs[2][0].a)
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
