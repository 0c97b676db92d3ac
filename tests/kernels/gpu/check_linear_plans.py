"""How the Triton losses go through a batch: slabs of sequences, statistics of a batch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from check_linear_loss import BACKEND, CU, assert_close, batch_of, compare, head, loss, on

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_policy_loss import operator, triton_plan, triton_slabs
from eapo_fast.kernels.linear_policy_loss.row_lists import row_list
from eapo_fast.kernels.linear_token_stats import cuda_rows, library_head
from eapo_fast.kernels.linear_token_stats import operator as stats_operator
from eapo_fast.kernels.linear_token_stats.library_head import LibraryHead, library_refusal
from eapo_fast.kernels.linear_token_stats.triton_kernel import TritonHead
from eapo_fast.kernels.linear_token_stats.triton_row_pass import Span
from eapo_fast.recipes import Recipe

BATCH_GLOBAL = ["clip_cov", "kl_cov", "steer", "lp_reg", "epo"]


def busy(name: str) -> Recipe:
    """A recipe whose selection is not empty in a small batch."""
    recipe = recipes.get(name).replace(beta=0.05)
    if recipe.selection is None:
        return recipe
    changes: dict[str, Any] = {"fraction": 0.4, "minimum": 1}
    if recipe.selection.low is not None:
        changes |= {"low": -0.5, "high": 9.0}
    return recipe.replace(selection=recipe.selection.replace(**changes))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every slab of logits."""
    rows: list[int] = []
    kind: Any = LibraryHead if BACKEND == "cuda" else TritonHead
    make = kind._logits

    def noted(self: Any, span: Span) -> None:
        rows.append(int(span.edges[1] - span.edges[0]))
        make(self, span)

    monkeypatch.setattr(kind, "_logits", noted)
    return rows


@pytest.mark.parametrize("name", BATCH_GLOBAL)
def test_batch_statistics(name: str, device: torch.device, read: list[int]) -> None:
    """Whole, in a prepass, and from statistics that are given: then three products do."""
    recipe, inputs, batch = busy(name), head(CU[-1], 60), batch_of()
    assert batch.mask is not None
    live = int(batch.mask.sum())
    found = compare(inputs, batch, recipe, device, chunk_size=40)
    assert read == [live]
    if recipe.selection is not None:
        assert float(found.metrics["selected_mean"]) > 0
    compare(inputs, batch_of(poison=True), recipe, device, plan="prepass", chunk_size=25)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    double = on(batch, torch.float64)
    exact = ops.linear_token_stats(*wide)
    given = ops.policy_statistics(
        exact.logprob, double.old_logprob, double.advantages, double.cu_seqlens, recipe=recipe,
        mask=double.mask, entropy=exact.entropy, stats=double.stats,
    )  # fmt: skip
    batch = replace(batch, stats=dict(batch.stats or {}) | {
        k: v.float() if v.is_floating_point() else v for k, v in given.items()
    })  # fmt: skip
    read.clear()
    compare(inputs, batch, recipe, device, chunk_size=16)
    assert sum(read) == live


def test_a_part_of_a_batch_has_no_loss(device: torch.device) -> None:
    """Statistics of a part are not those of the batch; a device that nobody waits for says NaN."""
    batch = replace(batch_of(), num_tokens=1000)
    found, gradients = loss(head(CU[-1], 60), batch, busy("kl_cov"), device)
    assert found.loss.isnan()
    assert gradients[0].isnan().any()


@pytest.mark.parametrize("name", [*BATCH_GLOBAL, "siren"])
def test_nothing_to_train_on(name: str, device: torch.device) -> None:
    batch = batch_of()
    assert batch.mask is not None
    batch.mask[:] = False
    recipe = busy(name).replace(max_length=20)
    found, gradients = loss(head(CU[-1], 50), batch, recipe, device)
    assert found.loss.item() == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_micro_batches_add_up(name: str, device: torch.device) -> None:
    recipe, inputs, batch = recipes.get(name), head(CU[-1], 60), batch_of()
    assert batch.mask is not None
    assert batch.ref_logprob is not None
    want, wanted = loss(inputs, batch, recipe, device)
    lengths = torch.tensor(CU).diff().tolist()
    trained = sum(bool(part.any()) for part in batch.mask.split(lengths))
    counts = {"num_tokens": int(batch.mask.sum()), "num_sequences": trained}
    total, of_weight = torch.zeros((), device=device), torch.zeros_like(wanted[1])
    for first, last in ((0, 3), (3, 5)):
        rows = slice(CU[first], CU[last])
        part = replace(
            batch, **counts, old_logprob=batch.old_logprob[rows], mask=batch.mask[rows],
            ref_logprob=batch.ref_logprob[rows], advantages=batch.advantages[first:last],
            cu_seqlens=batch.cu_seqlens[first : last + 1] - CU[first],
            stats={k: v[rows] if v.ndim else v for k, v in (batch.stats or {}).items()},
        )  # fmt: skip
        found, got = loss((inputs[0][rows], inputs[1], inputs[2][rows]), part, recipe, device,
                          chunk_size=9)  # fmt: skip
        total += found.loss.detach()
        of_weight += got[1]
        torch.testing.assert_close(got[0], wanted[0][rows], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, want.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_weight, wanted[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "chunk"), [("gspo", 25), ("gmpo", 8)])
def test_slabs_of_sequences(name: str, chunk: int, device: torch.device, read: list[int]) -> None:
    """Rows are read once; those of sequences longer than a slab twice."""
    batch = batch_of()
    assert batch.mask is not None
    lengths = [int(part.sum()) for part in batch.mask.split(torch.tensor(CU).diff().tolist())]
    compare(head(CU[-1], 60), batch, recipes.get(name).replace(beta=0.05), device, chunk_size=chunk)
    assert sum(read) == sum(n if n <= chunk else 2 * n for n in lengths)
    assert max(read) <= chunk


@pytest.mark.parametrize("name", ["gspo", "siren"])
def test_operators(name: str, device: torch.device) -> None:
    """What they promise to `torch.compile`: shapes and dtypes, nothing overwritten, gradients."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    hidden, weight, targets = (x.to(device) for x in head(CU[-1], 30))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    more = (targets, None, 0.9, 5.0, 30, None, None)
    statistics = (*leaves, *more, "sum_p2 kept_mass", 25, BACKEND, 0.8)
    torch.library.opcheck(stats_operator.token_stats, statistics, test_utils=checks)
    batch, recipe = on(batch_of(), device), recipes.get(name).replace(max_length=9).to_json()
    names = operator.metric_names(recipe, False, "")
    torch.library.opcheck(
        operator.policy_loss,
        (*leaves, targets, None, batch.old_logprob, batch.advantages, batch.cu_seqlens, batch.mask,
         None, [], "", None, None, recipe, names, 0.9, None, 30, None, None, 25, "auto", BACKEND,
         True, True, False),
        test_utils=checks,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["eapo", "gspo", *BATCH_GLOBAL, "siren"])
def test_nothing_waits(name: str, device: torch.device) -> None:
    """On a GPU, where torch itself can tell; `test_triton_waits.py` asks without one."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    if BACKEND == "cuda":
        pytest.skip("it asks for the number of rows")
    recipe = busy(name).replace(max_length=20)
    hidden, weight, targets = (x.to(device) for x in head(CU[-1], 60))
    batch = replace(on(batch_of(), device), num_tokens=28, num_sequences=4)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for chunk in (None, 16):

        def step(chunk: int | None = chunk) -> None:
            ops.linear_policy_loss(
                *leaves, targets, batch, recipe, backend="triton", chunk_size=chunk
            ).loss.backward()

        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["eapo", "gspo", "gmpo", "cispo"])
def test_what_needs_no_gradient(
    name: str, masked: bool, per_token: bool, device: torch.device, read: list[int]
) -> None:
    """Tokens without an advantage are read, and take no part in the products behind."""
    if BACKEND != "cuda":
        pytest.skip("there they leave the list behind the logits")
    recipe, batch = recipes.get(name).replace(beta=0.0, entropy_coef=0.0), batch_of()
    assert batch.mask is not None
    batch = replace(batch, ref_logprob=None, mask=batch.mask if masked else None)
    if per_token:
        batch = replace(
            batch, advantages=batch.advantages.repeat_interleave(torch.tensor(CU).diff())
        )
    compare(head(CU[-1], 60), batch, recipe, device, chunk_size=12)
    found = row_list(on(batch, device), recipe)
    live = torch.ones(CU[-1], dtype=torch.bool) if batch.mask is None else batch.mask
    idle = torch.zeros(CU[-1], dtype=torch.bool)
    idle[CU[2] : CU[3]] = True
    assert found.known == int(live.sum()) == int(found.count)
    assert found.moving == int((live & ~idle).sum()) < found.known
    order = found.rows.cpu()
    assert sorted(order[: found.moving].tolist()) == (live & ~idle).nonzero().flatten().tolist()
    assert sorted(order[: found.known].tolist()) == live.nonzero().flatten().tolist()
    assert not found.in_order
    assert sum(found.lengths) == (0 if recipe.locality == "token-local" else found.moving)
    assert max(read) <= 12


@pytest.mark.skipif(BACKEND != "cuda", reason="the other backend has rows in Triton only")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("eapo", torch.bfloat16), ("gmpo", torch.float32), ("kl_cov", torch.bfloat16)],
    ids=str,
)
def test_rows_in_cuda(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernel in the place of Triton's, in plans of each kind."""
    monkeypatch.setattr(library_head, "ROWS_IN_CUDA", True)
    taken = []
    launch = cuda_rows.launch
    monkeypatch.setattr(cuda_rows, "launch", lambda *a, **k: taken.append(launch(*a, **k)))
    recipe = busy(name)
    for plan, chunk in (("auto", 12), ("auto", None), ("prepass", 25)):
        compare(head(CU[-1], 70, dtype=dtype), batch_of(), recipe, device, plan=plan,
                chunk_size=chunk)  # fmt: skip
    assert taken
    before = len(taken)
    bias = torch.linspace(-1, 1, 70)
    compare(head(CU[-1], 70, dtype=dtype), batch_of(), recipe, device, bias=bias)
    assert len(taken) == before, "a bias is Triton's"


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_inputs_at_a_distance(name: str, device: torch.device) -> None:
    """Targets, old log-probabilities and advantages that are columns of something, or expanded."""
    hidden, weight, targets = head(CU[-1], 60)
    batch = batch_of()
    lengths = torch.tensor(CU).diff()
    per_token = batch.advantages.repeat_interleave(lengths)

    def column(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values, values.flip(0)], 1)[:, 0]

    def on_a_device(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values, values.flip(0)], 1).to(device)[:, 0]

    for advantages in (on_a_device(per_token), torch.tensor([1.3], device=device).expand(CU[-1])):
        plain = replace(batch, advantages=advantages.cpu().contiguous())
        recipe = recipes.get(name).replace(beta=0.05)
        want, wanted = loss((hidden, weight, targets), plain, recipe, None, chunk_size=16)
        there = replace(
            on(batch, device), advantages=advantages,
            old_logprob=on_a_device(batch.old_logprob),
        )  # fmt: skip
        leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
        found = ops.linear_policy_loss(
            *leaves, on_a_device(targets), there, recipe, backend=BACKEND, chunk_size=16
        )
        assert_close(found.loss, want.loss, torch.float32)
        for got, exact in zip(torch.autograd.grad(found.loss * 3, leaves), wanted, strict=True):
            assert_close(got, exact, torch.float32)
    stats = ops.linear_token_stats(
        hidden.to(device), weight.to(device), on_a_device(targets), backend=BACKEND
    )
    exact = ops.linear_token_stats(hidden.double(), weight.double(), column(targets))
    assert_close(stats.logprob, exact.logprob, torch.float32)


def test_rows_in_order_are_not_moved() -> None:
    batch = replace(batch_of(), mask=None, ref_logprob=None)
    for name, moved_out in (("eapo", True), ("kl_cov", False)):
        assert row_list(batch, recipes.get(name)).in_order != moved_out


@pytest.mark.skipif(BACKEND != "cuda", reason="the other backend takes it")
def test_float16_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="float16 products; take 'triton'"):
        compare(head(CU[-1], 60, dtype=torch.float16), batch_of(), recipes.get("eapo"), device)
    assert library_refusal(torch.zeros(1, dtype=torch.bfloat16, device=device)) is None


@pytest.mark.parametrize("vocab", [61, 64, 300])
def test_padded_heads(vocab: int, device: torch.device) -> None:
    """Logits of any number of columns, at distances that the library likes."""
    inputs = head(CU[-1], 320, dtype=torch.bfloat16)
    inputs = (*inputs[:2], inputs[2] % vocab)
    compare(inputs, batch_of(), recipes.get("eapo"), device, vocab_size=vocab, chunk_size=9)


def packed(lengths: list[int], most: int) -> tuple[list[list[int]], list[list[int]]]:
    """The same packing, one sequence after the other."""
    whole: list[list[int]] = []
    parts: list[list[int]] = []
    edges = [0, *itertools.accumulate(lengths)]
    first = 0
    for start, stop in itertools.pairwise(edges):
        if stop - first > most and start > first:
            (whole if start - first <= most else parts).append([first, start])
            first = start
    if edges[-1] > first:
        (whole if edges[-1] - first <= most else parts).append([first, edges[-1]])
    pieces = [[i, min(i + most, stop)] for a, stop in parts for i in range(a, stop, most)]
    return whole, pieces


def test_cuts_on_the_device(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for most in (1, 3, 8, 64):
        lengths = torch.randint(0, 12, (30,), generator=generator)
        lengths[3] = 40
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        mask = torch.rand(int(edges[-1]), generator=generator) > 0.4
        for flags in (None, mask):
            live = [
                int(b - a) if flags is None else int(flags[a:b].sum())
                for a, b in itertools.pairwise(edges.tolist())
            ]
            moved = None if flags is None else flags.to(device)
            found = triton_slabs.sequence_slabs(edges.to(device), moved, most, len(mask))
            got = [[s.edges.tolist() for s in spans] for spans in found]
            assert [[x for x in spans if x[1] > x[0]] for spans in got] == list(packed(live, most))


def test_plans() -> None:
    """Which plan is taken for what."""
    batch = batch_of()
    wanted, frozen = (True, True, False), (True, False, False)

    def plan(name: str, most: int, of: tuple[bool, bool, bool] = wanted, how: str = "auto") -> str:
        return triton_plan.choose_plan(how, batch, recipes.get(name), of, fits=most >= CU[-1])

    assert plan("eapo", 4) == "rows"
    assert plan("gspo", 4) == "sequences"
    assert plan("gspo", 99) == plan("kl_cov", 99) == plan("kl_cov", 4, how="slab") == "whole"
    assert plan("kl_cov", 4) == "prepass"
    assert plan("kl_cov", 4, frozen) == "scale"
    assert plan("eapo", 4, (False, False, False)) == "read"
    with pytest.raises(ValueError, match="plan: got 'scale'"):
        plan("eapo", 4, how="scale")
