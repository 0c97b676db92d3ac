"""The LM-head losses inside torch: compiled, checkpointed, under autocast and DDP."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_policy_loss import operator as policy_operator
from eapo_fast.kernels.linear_token_stats import operator as stats_operator
from eapo_fast.recipes import Recipe

ROWS, WIDTH, VOCAB = 24, 8, 50
BACKENDS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Start every test without compiled functions."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def head(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    return hidden, weight, torch.randint(VOCAB, (rows,), generator=generator)


def batch_of(rows: int = ROWS) -> ops.PolicyBatch:
    hidden, weight, targets = head(rows)
    generator = torch.Generator().manual_seed(1)
    old = ops.linear_token_stats(hidden, weight, targets).logprob
    return ops.PolicyBatch(
        old_logprob=old + 0.2 * torch.randn(rows, generator=generator),
        advantages=torch.tensor([1.0, -0.7]),
        cu_seqlens=torch.tensor([0, 10, rows]),
        mask=torch.arange(rows) % 5 != 3,
        num_tokens=rows,
    )


def stats_loss(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
    found = ops.linear_token_stats(
        hidden, weight, targets, temperature=0.9, extras=("sum_p2",), backend=backend
    )
    return (found.logprob - 0.1 * found.entropy + found.extras["sum_p2"]).sum()


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    batch: ops.PolicyBatch,
    recipe: Recipe,
    backend: str = "auto",
) -> Tensor:
    found = ops.linear_policy_loss(
        hidden, weight, targets, batch, recipe, temperature=0.9, softcap=9.0, backend=backend
    )
    return 2 * found.loss + found.metrics["ratio_mean"]


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_statistics_compile_without_a_graph_break(backend: str) -> None:
    hidden, weight, targets = head()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(stats_loss, fullgraph=True, backend="aot_eager")
    got = gradients(compiled(hidden, weight, targets, backend), *leaves)
    wanted = gradients(stats_loss(hidden, weight, targets, backend), *leaves)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["eapo", "gspo", "kl_cov"])
def test_policy_loss_compiles_without_a_graph_break(name: str, backend: str) -> None:
    recipe, (hidden, weight, targets), batch = recipes.get(name), head(), batch_of()
    batch = replace(batch, num_tokens=None)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    got = gradients(compiled(hidden, weight, targets, batch, recipe, backend), *leaves)
    wanted = gradients(policy_loss(hidden, weight, targets, batch, recipe, backend), *leaves)
    torch.testing.assert_close(got, wanted)


def test_one_graph_serves_every_length() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(policy_loss, fullgraph=True, backend=counter)
    _, weight, _ = head()
    recipe = recipes.get("eapo")
    for rows in range(20, 70):
        hidden, _, targets = head(rows)
        compiled(hidden, weight, targets, batch_of(rows), recipe)
    assert counter.frame_count <= 2  # the first length, then all lengths


def test_another_recipe_is_not_mistaken_for_the_compiled_one() -> None:
    """torch.compile knows a recipe by its address, and by a weak reference whether it lives."""
    compiled = torch.compile(policy_loss, fullgraph=True, backend="eager")
    hidden, weight, targets = head()
    batch = batch_of()
    for epsilon in (0.3, 0.01, 0.05, 0.2):
        recipe = recipes.get("eapo").replace(epsilon=epsilon, epsilon_high=epsilon)
        got = compiled(hidden, weight, targets, batch, recipe)
        torch.testing.assert_close(got, policy_loss(hidden, weight, targets, batch, recipe))
        assert weakref.ref(recipe)() is recipe


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_torchs_rules(dtype: torch.dtype, backend: str) -> None:
    hidden, weight, targets = head(dtype=dtype)
    bias = torch.zeros(VOCAB)
    rows, ids = torch.tensor([3, 1]), torch.tensor([5, 6])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(
        stats_operator.token_stats,
        (*leaves, targets, bias, 0.9, 5.0, VOCAB, rows, ids, "sum_p2", 7, backend),
        test_utils=checks,
    )
    state = stats_operator.token_stats(
        hidden, weight, targets, None, 1.0, None, VOCAB, None, None, "", None, backend
    )[3]
    a = torch.ones(ROWS)
    torch.library.opcheck(
        stats_operator.token_stats_backward,
        (a, None, state, hidden.detach(), weight.detach(), targets, None, 1.0, None, VOCAB, None,
         None, None, backend, True, True, False),
        test_utils=checks,
    )  # fmt: skip
    batch, recipe = batch_of(), recipes.get("dapo").to_json()
    names = policy_operator.metric_names(recipe, False, "")
    torch.library.opcheck(
        policy_operator.policy_loss,
        (*leaves, targets, bias, batch.old_logprob, batch.advantages, batch.cu_seqlens, batch.mask,
         None, [], "", None, None, recipe, names, 0.9, None, VOCAB, rows, ids, 7, "auto", backend,
         True, True, False),
        test_utils=checks,
    )  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    hidden, weight, targets = head()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    batch, recipe = batch_of(), recipes.get("gspo")
    wanted = gradients(policy_loss(hidden, weight, targets, batch, recipe), *leaves)
    loss = checkpoint(policy_loss, hidden, weight, targets, batch, recipe, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close((loss.detach(), hidden.grad, weight.grad), wanted)


def test_autocast_rounds_nothing() -> None:
    hidden, weight, targets = head()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    batch, recipe = batch_of(), recipes.get("eapo")
    wanted = gradients(policy_loss(hidden, weight, targets, batch, recipe), *leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(policy_loss(hidden, weight, targets, batch, recipe), *leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = head()
    hidden.requires_grad_()
    scale = torch.ones((), requires_grad=True)
    for loss in (
        policy_loss(hidden, weight, targets, batch_of(), recipes.get("eapo")),
        stats_loss(hidden, weight, targets, "cpu"),
    ):
        (first,) = torch.autograd.grad(loss * scale, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


class Policy(nn.Module):
    """A trunk of one layer with the loss as its forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, targets: Tensor, batch: ops.PolicyBatch) -> Tensor:
        return ops.linear_policy_loss(
            self.trunk(x), self.head.weight, targets, batch, recipes.get("eapo"),
            bias=self.head.bias,
        ).loss  # fmt: skip


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_hooks_of_data_parallel_training(tmp_path: Path, wrapper: str) -> None:
    x, _, targets = head()
    plain, wrapped = Policy(), Policy()
    batch = batch_of()
    plain(x, targets, batch).backward()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        if wrapper == "ddp":
            model = nn.parallel.DistributedDataParallel(wrapped)
        else:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            model = torch.distributed.fsdp.fully_shard(wrapped, mesh=mesh)
        model(x, targets, batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        got = b.grad.full_tensor() if wrapper == "fsdp" else b.grad
        torch.testing.assert_close(got, a.grad)
