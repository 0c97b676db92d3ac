"""The way to a loss on a GPU never waits for it.

Inputs are on torch's "meta" device, whose tensors have no data: whoever asks for a number, or for
a shape that depends on one (`item`, `nonzero`, `bincount`, a mask as an index), gets an error. A
copy from or to the host is one too. Kernels are noted instead of launched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import triton_aot

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_policy_loss import operator, triton_slabs
from eapo_fast.kernels.linear_token_stats import operator as stats_operator
from eapo_fast.kernels.linear_token_stats import triton_products as products
from eapo_fast.kernels.linear_token_stats import triton_row_pass as row_pass
from eapo_fast.kernels.logits_policy_loss import triton_kernel as given
from eapo_fast.kernels.policy_loss import operator as losses
from eapo_fast.kernels.policy_loss import triton_kernel as policy

ROWS, WIDTH, VOCAB = 40, 8, 50
RECIPES = ["eapo", "cispo", "gspo", "gmpo", "clip_cov", "kl_cov", "steer", "lp_reg", "epo", "siren"]


class NoCopies(TorchDispatchMode):
    """Raises for an operator that takes tensors of the host and of the device, or makes both."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [x for x in (*args, *(kwargs or {}).values(), result) if isinstance(x, Tensor)]
        if len({x.device.type for x in found}) > 1:
            raise AssertionError(f"{func} goes between the host and the device")
        return result


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def batch_of(*, masked: bool, counted: bool) -> ops.PolicyBatch:
    stats = {name: empty(ROWS) for name in ("old_entropy", "max_logprob", "kept_mass")}
    return ops.PolicyBatch(
        old_logprob=empty(ROWS),
        advantages=empty(5),
        cu_seqlens=empty(6, dtype=torch.int32),
        mask=empty(ROWS, dtype=torch.bool) if masked else None,
        ref_logprob=empty(ROWS),
        stats={**stats, "step": torch.empty((), dtype=torch.int64, device="meta")},
        num_tokens=torch.tensor(33) if counted else None,
        num_sequences=4 if counted else None,
    )


def test_the_check_sees_what_waits() -> None:
    x = empty(3)
    waits = [
        lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: x.cpu(),
        lambda: x.nonzero(), lambda: x[x > 0], lambda: torch.bincount(x.long()),
        lambda: torch.tensor(3.0).to("meta"), lambda: x.copy_(torch.zeros(3)),
    ]  # fmt: skip
    for wait in waits:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), NoCopies():
            wait()


@pytest.mark.parametrize("name", RECIPES)
def test_linear_policy_loss(name: str) -> None:
    recipe = recipes.get(name).replace(beta=0.1, max_length=20)
    hidden, weight = empty(ROWS, WIDTH), empty(VOCAB, WIDTH)
    targets = empty(ROWS, dtype=torch.int64)
    banned = empty(3, dtype=torch.int64), empty(3, dtype=torch.int64)
    launched = set()
    for masked, counted, plan, chunk in (
        (True, True, "auto", None), (True, False, "auto", 8), (False, True, "prepass", 8),
        (True, False, "slab", 8), (False, False, "auto", 8),
    ):  # fmt: skip
        settings = {
            "bias": None, "temperature": 0.7, "softcap": 3.0, "vocab_size": VOCAB,
            "chunk_size": chunk, "wanted": (True, True, False),
        }  # fmt: skip
        batch = batch_of(masked=masked, counted=counted)
        modules = (row_pass, products, policy, triton_slabs)
        with triton_aot.recorded(*modules) as launches, NoCopies():
            found, of_hidden, of_weight, _ = operator._on_device(
                hidden, weight, targets, batch, recipe, banned, plan, "triton", settings
            )
        assert found.loss.shape == ()
        assert of_hidden is not None
        assert of_weight is not None
        launched |= {launch.name for launch in launches}
    assert {"logits", "run_rows", "to_hidden", "to_weight"} <= launched


@pytest.mark.parametrize("name", RECIPES)
def test_policy_loss(name: str) -> None:
    """Its kernel; and plain torch, which is what recipes that look at a batch take."""
    recipe, x = recipes.get(name).replace(beta=0.1, max_length=20), empty(ROWS)
    backends = ["reference"]
    if recipe.locality != "batch-global" and recipe.entropy_band is None:
        backends.append("triton")
    for masked, counted in ((True, False), (True, True), (False, True)):
        batch = batch_of(masked=masked, counted=counted)
        for backend in backends:
            with triton_aot.recorded(policy) as launches, NoCopies():
                losses.evaluate(x, x, x, batch, recipe, backend)
            assert bool(launches) == (backend == "triton")


def test_linear_token_stats() -> None:
    inputs = empty(ROWS, WIDTH), empty(VOCAB, WIDTH), empty(ROWS, dtype=torch.int64)
    more = (None, 1.0, None, VOCAB, None, None)
    forward = stats_operator.token_stats._init_fn
    backward = stats_operator.token_stats_backward._init_fn
    with triton_aot.recorded(row_pass, products) as launches, NoCopies():
        _, entropy, extras, state = forward(
            *inputs, *more, "kept_mass truncated_entropy", 8, "triton", 0.8, 9
        )
        backward(entropy, None, state, *inputs, *more, 8, "triton", True, True, False)
    assert extras.shape == (2, ROWS)
    assert {launch.name for launch in launches} >= {"logits", "run_rows", "to_weight"}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_policy_loss(name: str, in_place: bool) -> None:
    recipe = recipes.get(name).replace(beta=0.1, max_length=20)
    for masked, counted in ((True, False), (True, True), (False, True)):
        batch = batch_of(masked=masked, counted=counted)
        leaf = empty(ROWS, VOCAB, dtype=torch.bfloat16).requires_grad_()
        targets = empty(ROWS, dtype=torch.int64)
        with triton_aot.recorded(row_pass, given, policy) as launches, NoCopies():
            found = given.logits_policy_loss(leaf * 1, targets, batch, recipe, 0.7, in_place)
            found.loss.backward()
        assert {launch.name for launch in launches} >= {"run_rows", "scale_rows"}
        assert leaf.grad is not None
