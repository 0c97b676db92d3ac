"""Plans, cuts and memory of the LM-head losses: none of them changes a result.

float32 results of two plans differ by the order of additions: within 2e-5 of the largest number.
bfloat16 ones by the rounding of logits, which are made relative to another centre where they are
computed again: within 2**-7 of the norm.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_token_stats import NonFiniteError, gradients
from eapo_fast.kernels.linear_token_stats.coefficients import filled_up
from eapo_fast.recipes import Recipe

CU = [0, 9, 9, 31, 32, 60, 77]
VOCAB, WIDTH = 2500, 12
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ["eapo", "gspo", "gmpo", "cispo", "clip_cov", "kl_cov", "steer", "lp_reg", "epo"]


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, ops.PolicyBatch]:
    """Head and batch of six sequences (one of them empty) with masked and idle rows."""
    generator = torch.Generator().manual_seed(5)
    rows = CU[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden, weight = normal(rows, WIDTH).to(dtype), (normal(VOCAB, WIDTH) * 0.7).to(dtype)
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    found = ops.linear_token_stats(
        hidden.double(), weight.double(), targets, extras=("max_logprob",)
    )
    old = (found.logprob + 0.3 * normal(rows)).float()
    return hidden, weight, targets, ops.PolicyBatch(
        old_logprob=old,
        advantages=torch.tensor([1.0, 0.3, -0.8, 0.5, 0.0, -1.2]),
        cu_seqlens=torch.tensor(CU),
        mask=torch.rand(rows, generator=generator) > 0.2,
        ref_logprob=old + 0.2 * normal(rows),
        stats={
            "old_entropy": found.entropy.float(),
            "max_logprob": torch.maximum(found.extras["max_logprob"].float(), old),
            "kept_mass": 1 - 0.4 * torch.rand(rows, generator=generator),
            "step": torch.tensor(3),
        },
    )  # fmt: skip


def run(
    inputs: tuple[Tensor, Tensor, Tensor, ops.PolicyBatch], recipe: Recipe, **settings: Any
) -> tuple[ops.LossOutput, tuple[Tensor, ...]]:
    hidden, weight, targets, batch = inputs
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    if settings.pop("frozen", False):
        leaves = leaves[:1]
    found = ops.linear_policy_loss(
        leaves[0], leaves[1] if len(leaves) > 1 else weight, targets, batch, recipe, **settings
    )
    return found, torch.autograd.grad(found.loss, leaves)


def assert_same(
    got: tuple[ops.LossOutput, tuple[Tensor, ...]], want: tuple[ops.LossOutput, tuple[Tensor, ...]]
) -> None:
    low = got[1][0].dtype == torch.bfloat16
    room = 2**-7 if low else 2e-5
    torch.testing.assert_close(got[0].loss, want[0].loss, rtol=room, atol=room)
    torch.testing.assert_close(
        got[0].a, want[0].a, rtol=0, atol=room * float(want[0].a.abs().max())
    )
    for a, b in zip(got[1], want[1], strict=True):
        if low:
            assert (a.double() - b.double()).norm() <= room * b.double().norm()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=room * float(b.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_plan_gives_the_same(name: str, dtype: torch.dtype) -> None:
    inputs, recipe = problem(dtype), recipes.get(name)
    want = run(inputs, recipe)
    for chunk in (None, 10):
        for plan in ("auto", "slab", "prepass"):
            got = run(inputs, recipe, plan=plan, chunk_size=chunk)
            assert_same(got, want)
            assert got[0].metrics.keys() == want[0].metrics.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "epo"])
def test_a_frozen_head_can_be_scaled(name: str, dtype: torch.dtype) -> None:
    inputs, recipe = problem(dtype), recipes.get(name)
    want = run(inputs, recipe, plan="slab")
    for plan in ("scale", "prepass", "auto"):
        for backend in ("cpu", "reference"):
            got = run(inputs, recipe, plan=plan, frozen=True, chunk_size=16, backend=backend)
            assert_same((got[0], got[1]), (want[0], want[1][:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["eapo", "gspo", "epo"])
def test_micro_batches_and_chunks_add_up(name: str, dtype: torch.dtype) -> None:
    hidden, weight, targets, batch = problem(dtype)
    recipe = recipes.get(name).replace(beta=0.1)
    stats = dict(batch.stats or {}) | {"entropy_mean": torch.tensor(4.0)}
    batch = replace(batch, stats=stats)
    want = run((hidden, weight, targets, batch), recipe)
    assert batch.mask is not None
    for cuts, chunk in (((0, 2, 3, 6), None), ((0, 1, 2, 3, 4, 5, 6), 3)):
        total, sums = torch.zeros(()), [torch.zeros(hidden.shape), torch.zeros(weight.shape)]
        for first, last in itertools.pairwise(cuts):
            rows = slice(CU[first], CU[last])
            part = replace(
                batch,
                **{
                    key: getattr(batch, key)[rows] for key in ("old_logprob", "mask", "ref_logprob")
                },
                advantages=batch.advantages[first:last],
                cu_seqlens=batch.cu_seqlens[first : last + 1] - CU[first],
                stats={k: v[rows] if v.ndim else v for k, v in stats.items()},
                num_tokens=int(batch.mask.sum()),
                num_sequences=5,
            )
            inputs = (hidden[rows], weight, targets[rows], part)
            found, (of_hidden, of_weight) = run(inputs, recipe, chunk_size=chunk)
            total += found.loss.detach()
            sums[0][rows] += of_hidden
            sums[1] += of_weight.float()
        room = 2**-7 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(total, want[0].loss.detach(), rtol=room, atol=room)
        for a, b in zip(sums, want[1], strict=True):
            assert (a - b.float()).norm() <= room * b.float().norm()


@pytest.mark.parametrize("plan", ["slab", "prepass"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
def test_the_third_coefficient(plan: str, softcap: float | None, entropy_coef: float) -> None:
    """SIREN on the CPU against float64, with banned entries, ties and a temperature."""
    hidden, weight, targets, batch = problem()
    weight[100] = weight[200]
    recipe = recipes.get("siren").replace(max_length=50, entropy_coef=entropy_coef)
    assert recipe.entropy_target is not None
    target = recipe.entropy_target.replace(coef=0.7, top_k=60, quantile=0.4)
    recipe = recipe.replace(entropy_target=target)
    batch = replace(batch, stats={"anchor": torch.tensor(0.5)})
    rows = torch.arange(CU[-1])
    settings: dict[str, Any] = {
        "plan": plan, "softcap": softcap, "temperature": 0.8,
        "banned": (rows, (targets + 1 + rows) % VOCAB),
    }  # fmt: skip
    got = run((hidden, weight, targets, batch), recipe, backend="cpu", chunk_size=33, **settings)
    double = replace(batch, stats={"anchor": torch.tensor(0.5, dtype=torch.float64)})
    wide = (hidden.double(), weight.double(), targets, double)
    want = run(wide, recipe, backend="reference", **settings)
    assert got[0].c is not None
    assert got[0].c.any()
    torch.testing.assert_close(got[0].c.double(), want[0].c, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got[0].loss.double(), want[0].loss, rtol=2e-5, atol=2e-6)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-5 * float(b.abs().max()))


@pytest.fixture
def product_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every block of logit gradients that goes into the products."""
    rows: list[int] = []
    add = gradients.RowGradients.add

    def noted(self: gradients.RowGradients, dz: Tensor, columns: slice) -> None:
        if columns.start == 0:
            rows.append(len(dz))
        add(self, dz, columns)

    monkeypatch.setattr(gradients.RowGradients, "add", noted)
    return rows


@pytest.mark.parametrize("plan", ["slab", "prepass"])
def test_rows_that_teach_nothing_take_no_part(plan: str, product_rows: list[int]) -> None:
    """Masked rows, rows without advantage and clipped rows; until a term needs them."""
    inputs, recipe = problem(), recipes.get("eapo")
    found, _ = run(inputs, recipe, plan=plan, chunk_size=20)
    live = inputs[3].mask
    assert live is not None
    moved = int((found.a != 0).sum())
    advantages = inputs[3].advantages.repeat_interleave(torch.tensor(CU).diff())
    idle = int((live & (advantages == 0)).sum())
    clipped = float(found.metrics["clip_ratio/region_mean"]) * int(live.sum())
    assert idle > 0
    assert clipped > 1
    assert moved == int(live.sum()) - idle - round(clipped)
    assert sum(product_rows) == moved
    product_rows.clear()
    run(inputs, recipe.replace(entropy_coef=0.01), plan=plan)
    assert sum(product_rows) == int(live.sum())


def test_lists_of_rows_are_filled_up() -> None:
    active = torch.tensor([1, 4, 5])
    assert filled_up(active, 9, 1) is active
    assert filled_up(active, 9, 4).tolist() == [0, 1, 4, 5]
    assert filled_up(active, 9, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert filled_up(active, 4 + 2, 8).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_was_not_written_is_not_read(dtype: torch.dtype) -> None:
    """torch fills fresh tensors with NaN while deterministic algorithms are asked for."""
    want = [run(problem(dtype), recipes.get(n), chunk_size=20) for n in ("eapo", "kl_cov")]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = [run(problem(dtype), recipes.get(n), chunk_size=20) for n in ("eapo", "kl_cov")]
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[0].loss, b[0].loss)
        assert all(map(torch.equal, a[1], b[1]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["eapo", "gspo", "kl_cov"])
def test_a_bad_row_is_reported_by_its_place_in_the_batch(name: str, backend: str) -> None:
    hidden, weight, targets, batch = problem()
    assert batch.mask is not None
    bad = int(batch.mask.nonzero()[40])
    hidden[bad, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=f"hidden: token {bad} has no distribution"):
        run((hidden, weight, targets, batch), recipes.get(name), chunk_size=15, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [2, 63, 2047])
@pytest.mark.parametrize("rows", [1, 63, 100])
def test_other_dtypes_and_odd_sizes(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """float16 within its own rounding, float64 exactly, both by the reference."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 7, generator=generator).to(dtype)
    weight = torch.randn(vocab, 7, generator=generator).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    batch = ops.PolicyBatch(
        old_logprob=torch.randn(rows, generator=generator) - 2,
        advantages=torch.tensor([1.0, -1.0]),
        cu_seqlens=torch.tensor([0, rows // 2, rows]),
    )
    recipe = recipes.get("cispo")
    found, grads = run((hidden, weight, targets, batch), recipe)
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprob = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratio = (logprob - batch.old_logprob).detach().exp().clamp(0, 1.28)
    advantages = torch.tensor([1.0, -1.0]).repeat_interleave(batch.cu_seqlens.diff())
    want = -(ratio * advantages * logprob).mean()
    torch.testing.assert_close(found.loss.double(), want, rtol=1e-5, atol=1e-6)
    eps = 1e-12 if dtype == torch.float64 else 2**-10
    for a, b in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=eps)


@pytest.mark.parametrize("plan", ["slab", "prepass"])
def test_the_third_coefficient_of_many_rows(plan: str) -> None:
    """Of more rows than are truncated at once, with gaps that other rows fill."""
    generator = torch.Generator().manual_seed(5)
    rows, vocab = 150, 60
    hidden = torch.randn(rows, 12, generator=generator)
    weight = torch.randn(vocab, 12, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    batch = ops.PolicyBatch(
        old_logprob=-3 * torch.rand(rows, generator=generator),
        advantages=torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0]),
        cu_seqlens=torch.tensor([0, 40, 50, 100, 110, rows]),
        stats={"anchor": torch.tensor(0.3)},
    )
    recipe = recipes.get("siren").replace(max_length=9)
    found, grads = run((hidden, weight, targets, batch), recipe, plan=plan)
    wide = (hidden.double(), weight.double(), targets, batch)
    want, expected = run(wide, recipe, backend="reference")
    assert 0 < int(((found.a != 0) | (found.c != 0)).sum()) < rows - 32
    torch.testing.assert_close(found.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-7)


MEASURE = """
import sys, torch
from eapo_fast import ops, recipes
rows, width, vocab, dtype = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
dtype = getattr(torch, dtype)

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) << 10 for l in file if l.startswith(name))

def build(n, v):
    hidden, weight = torch.empty(n, width, dtype=dtype), torch.empty(v, width, dtype=dtype)
    hidden.normal_(), weight.normal_(std=width ** -0.5)
    return hidden.requires_grad_(), weight.requires_grad_()

def loss(hidden, weight):
    n, v = len(hidden), len(weight)
    batch = ops.PolicyBatch(
        old_logprob=torch.full((n,), -5.0), advantages=torch.ones(4),
        cu_seqlens=torch.tensor([0, n // 4, n // 2, n * 3 // 4, n]))
    targets = torch.arange(n) * 17 % v
    recipe = recipes.get(sys.argv[5]).replace(max_length=9)
    ops.linear_policy_loss(hidden, weight, targets, batch, recipe).loss.backward()

loss(*build(8, 64))
leaves = build(rows, vocab)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident("VmRSS")
loss(*leaves)
gradients = sum(x.grad.nbytes for x in leaves)
print((resident("VmHWM") - before - gradients) / (1 << 20))
"""


def extra_memory(*shape: object) -> float:
    """Peak MB over inputs and gradients of one forward and backward in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *map(str, shape)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["eapo", "gspo", pytest.param("siren", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_small_head(dtype: str, name: str) -> None:
    assert extra_memory(4096, 256, 4096, dtype, name) < 64


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_large_head(dtype: str) -> None:
    assert extra_memory(1024, 896, 151_936, dtype, "eapo") < 512
