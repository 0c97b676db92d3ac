"""One rank of `test_sharded_head.py`: python sharded_worker.py RANK RANKS STORE."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_token_stats import NonFiniteError

ROWS, WIDTH, VOCAB = 30, 12, 2600
EDGES = [0, 2500, VOCAB]
"""Shards of very different size."""


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[:6] = torch.tensor([0, 2499, 2500, 2599, 17, 2550])
    rows = torch.arange(ROWS)
    return {
        "hidden": torch.randn(ROWS, WIDTH, generator=generator).to(dtype),
        "weight": (torch.randn(VOCAB, WIDTH, generator=generator) * 0.8).to(dtype),
        "bias": torch.linspace(-1, 1, VOCAB),
        "targets": targets,
        "rows": rows,
        "ids": (targets + 1 + rows) % VOCAB,
    }


def check_values(rank: int, dtype: torch.dtype) -> None:
    """Statistics, policy loss and gradients of shards are those of the whole head in float64."""
    given = inputs(dtype)
    banned = given["rows"], given["ids"]
    own = slice(EDGES[rank], EDGES[rank + 1])
    leaves = [given["hidden"].clone(), given["weight"][own].clone(), given["bias"][own].clone()]
    whole = [given[k].double() for k in ("hidden", "weight", "bias")]
    results = []
    for shard, (hidden, weight, bias) in ((True, leaves), (False, whole)):
        for x in (hidden, weight, bias):
            x.requires_grad_()
        settings = {"bias": bias, "temperature": 0.8, "softcap": 6.0, "banned": banned}
        if shard:
            found = ops.sharded_token_stats(
                hidden, weight, given["targets"], start=own.start, chunk_size=11, **settings
            )
        else:
            found = ops.linear_token_stats(hidden, weight, given["targets"], **settings)
        recipe = recipes.get("gspo").replace(epsilon=0.3, epsilon_high=0.3, entropy_coef=0.05)
        loss = ops.policy_loss(
            found.logprob,
            torch.full((ROWS,), -8.0, dtype=found.logprob.dtype),
            torch.tensor([1.0, -0.5]),
            torch.tensor([0, 14, ROWS]),
            entropy=found.entropy,
            recipe=recipe,
        ).loss
        results.append((found, loss, torch.autograd.grad(loss, (hidden, weight, bias))))
    (got, loss, gradients), (want, wanted_loss, wanted) = results
    room = 2e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=room, atol=room)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=room, atol=room)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=room, atol=room)
    for g, w in zip(gradients, (wanted[0], wanted[1][own], wanted[2][own]), strict=True):
        assert (g.double() - w).norm() <= room * w.norm() + 1e-6


def check_errors(rank: int) -> None:
    """What is wrong on one rank is reported on all, so that nobody hangs."""
    given = inputs(torch.float32)
    own = slice(EDGES[rank], EDGES[rank + 1])
    weight = given["weight"][own].clone()
    with pytest.raises(ValueError, match=r"^targets: that of token 3 lies in 0 shards"):
        ops.sharded_token_stats(
            given["hidden"], weight[:99] if rank else weight, given["targets"], start=own.start
        )
    if rank:
        weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="token 0 "):
        ops.sharded_token_stats(given["hidden"], weight, given["targets"], start=own.start)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, targets: Tensor, batch: ops.PolicyBatch) -> Tensor:
        recipe = recipes.get("rloo")
        return ops.linear_policy_loss(
            self.trunk(x), self.head.weight, targets, batch, recipe, bias=self.head.bias
        ).loss


def check_data_parallel(rank: int, ranks: int, wrapper: str) -> None:
    """Half of the batch on each rank, with counts of the whole, is the whole batch."""
    given = inputs(torch.float32)

    def loss(model: nn.Module, rows: slice, advantage: list[float]) -> Tensor:
        cu = [0, 14, ROWS] if len(advantage) == 2 else [0, rows.stop - rows.start]
        batch = ops.PolicyBatch(
            old_logprob=torch.full((cu[-1],), -8.0),
            advantages=torch.tensor(advantage),
            cu_seqlens=torch.tensor(cu),
            num_tokens=ROWS,
        )
        return model(given["hidden"][rows], given["targets"][rows], batch)

    plain, wrapped = Policy(), Policy()
    loss(plain, slice(0, ROWS), [1.0, -0.5]).backward()
    if wrapper == "ddp":
        model: nn.Module = nn.parallel.DistributedDataParallel(wrapped)
    else:
        mesh = dist.init_device_mesh("cpu", (ranks,))
        model = dist.fsdp.fully_shard(wrapped, mesh=mesh)
    part = (slice(0, 14), [1.0]) if rank == 0 else (slice(14, ROWS), [-0.5])
    (loss(model, *part) * ranks).backward()  # both average over the ranks
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        got = b.grad.full_tensor() if wrapper == "fsdp" else b.grad  # type: ignore[union-attr]
        torch.testing.assert_close(got, a.grad, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    check_values(rank, torch.float32)
    check_values(rank, torch.bfloat16)
    check_errors(rank)
    check_data_parallel(rank, ranks, "ddp")
    check_data_parallel(rank, ranks, "fsdp")
    dist.barrier()
    dist.destroy_process_group()
    print("all checks passed")
