"""The Triton kernels of the losses compile for GPUs that are not here, one variant for all lengths.

Hot kernels keep their values in registers: no stack at all for a row of logits and for a sequence
of tokens, and none for products in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton_aot
from triton_aot import Launch, compiled, recorded

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_policy_loss import triton_plan, triton_slabs
from eapo_fast.kernels.linear_token_stats import triton_kernel as heads
from eapo_fast.kernels.linear_token_stats import triton_products as products
from eapo_fast.kernels.linear_token_stats import triton_row_pass as row_pass
from eapo_fast.kernels.logits_policy_loss import triton_kernel as given
from eapo_fast.kernels.policy_loss import triton_kernel as losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_aot.interpreted(), reason="TRITON_INTERPRET is set"),
]

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def launches_of(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 24,
    plan: str = "auto",
    vocab: int = 1024,
    chunk: int = 16,
    everything: bool = False,
    **changes: Any,
) -> list[Launch]:
    """Launches of one loss with gradients; `everything`: of a head with all that it can have."""
    recipe = recipes.get(name).replace(**changes)
    target = recipe.entropy_target
    batch = ops.PolicyBatch(
        old_logprob=torch.zeros(rows),
        advantages=torch.ones(2),
        cu_seqlens=torch.tensor([0, 9, rows]),
        mask=torch.ones(rows, dtype=torch.bool),
        ref_logprob=torch.zeros(rows) if recipe.beta else None,
    )
    wanted = (True, True, False)
    with recorded(row_pass, products, losses, triton_slabs) as launches:
        assert batch.mask is not None
        head = heads.TritonHead(
            torch.zeros(rows, 64, dtype=dtype), torch.zeros(vocab, 64, dtype=dtype),
            torch.zeros(rows, dtype=torch.int64), bias=torch.zeros(vocab) if everything else None,
            temperature=0.7, softcap=3.0 if everything else None, vocab_size=vocab,
            banned=(torch.arange(3), torch.arange(3)) if everything else None, chunk_size=chunk,
            wanted=wanted,
            live=products.listed(batch.mask),
        )  # fmt: skip
        head.logprob, head.entropy = torch.zeros(rows), torch.zeros(rows)
        head.truncation = None if target is None else row_pass.Cut(target.top_p, target.top_k)
        triton_plan.run(head, batch, recipe, plan, wanted)
    return launches


def variants(launches: Sequence[Launch]) -> set[str]:
    return {triton_aot.variant(launch) for launch in launches}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_policy_loss(dtype: torch.dtype, capability: int) -> None:
    launches = launches_of("eapo", dtype=dtype, entropy_coef=0.01, beta=0.1, delta=2.0)
    by_variant = {triton_aot.variant(launch): launch for launch in launches}
    names = {launch.name for launch in by_variant.values()}
    assert names == {"logits", "run_rows", "to_hidden", "to_weight", "evaluate", "count_live"}
    for launch in by_variant.values():
        found = compiled(launch, capability)
        assert found.shared <= SHARED_LIMIT[capability], launch.name
        assert ".f64" not in found.ptx, launch.name
        if launch.name in ("run_rows", "evaluate", "count_live") or dtype == torch.bfloat16:
            assert found.stack == 0, launch.name
        if launch.name in ("logits", "to_hidden", "to_weight") and dtype == torch.bfloat16:
            assert "wgmma" in found.ptx or "mma.sync.aligned.m16n8k16" in found.ptx


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_third_coefficient(capability: int, everything: bool) -> None:
    """The search for a border keeps its eight sums in registers."""
    launches = launches_of(
        "siren", plan="prepass", max_length=100, vocab=151_936, everything=everything
    )
    by_variant = {triton_aot.variant(x): x for x in launches if x.name == "run_rows"}
    assert len(by_variant) == 2
    for launch in by_variant.values():
        found = compiled(launch, capability)
        assert found.stack == 0
        assert found.registers <= (168 if everything else 128)
        assert ".f64" not in found.ptx


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_sequence_level_recipes(name: str) -> None:
    launches = launches_of(name)
    hot = {x.name: x for x in launches if x.name in ("evaluate", "cut_slabs")}
    assert len(hot) == 2
    for launch in hot.values():
        found = compiled(launch, 90)
        assert found.stack == 0
        assert ".f64" not in found.ptx


@pytest.mark.parametrize("name", ["eapo", "gspo", "kl_cov", "siren"])
def test_lengths_do_not_recompile(name: str) -> None:
    length = {"max_length": 100} if name == "siren" else {}
    want = variants(launches_of(name, rows=24, chunk=16, **length))
    for rows in range(25, 75):
        assert variants(launches_of(name, rows=rows, chunk=16, **length)) <= want


def given_launches(dtype: torch.dtype, *, vocab: int = 151_936, rows: int = 6) -> list[Launch]:
    """Launches of a loss over given logits and of its way back."""
    batch = ops.PolicyBatch(
        old_logprob=torch.zeros(rows), advantages=torch.ones(2), cu_seqlens=torch.tensor([0, 4, 6]),
        mask=torch.ones(rows, dtype=torch.bool),
    )  # fmt: skip
    logits = torch.zeros(rows, vocab, dtype=dtype, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with recorded(row_pass, given, losses) as launches:
        given.logits_policy_loss(
            logits, targets, batch, recipes.get("eapo"), 0.7, False
        ).loss.backward()
    return launches


def library_rows(*, vocab: int = 151_936, rows: int = 6) -> Launch:
    """The launch between the library's products: a bfloat16 gradient over float32 logits."""
    own = row_pass.RowPass(torch.zeros(rows, dtype=torch.int64), vocab_size=vocab)
    batch = ops.PolicyBatch(
        old_logprob=torch.zeros(rows), advantages=torch.ones(2), cu_seqlens=torch.tensor([0, 4, 6])
    )
    slab = torch.zeros(rows, vocab)
    with recorded(row_pass, losses) as launches:
        own.launch(
            slab, slab.view(torch.bfloat16), own.span(0, rows), statistics=True, gradient=True,
            program=triton_plan.program_of(batch, recipes.get("eapo")), zeros=True,
        )  # fmt: skip
    return next(x for x in launches if x.name == "run_rows")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_policy_loss(dtype: torch.dtype, capability: int) -> None:
    """Rows of a large vocabulary: statistics are read ahead, 16 bytes at a time; no stack."""
    by_name = {launch.name: launch for launch in given_launches(dtype)}
    assert set(by_name) == {"run_rows", "evaluate", "count_live", "clear_rows", "scale_rows"}
    for name in ("run_rows", "clear_rows", "scale_rows"):
        found = compiled(by_name[name], capability)
        assert found.stack == 0, name
        assert ".f64" not in found.ptx
        assert "st.global.v4" in found.ptx or "st.global.b128" in found.ptx, name
        if name == "run_rows":
            assert "cp.async.cg.shared.global" in found.ptx
            assert found.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_of_the_library(capability: int) -> None:
    found = compiled(library_rows(), capability)
    assert found.stack == 0
    assert found.registers <= 64
