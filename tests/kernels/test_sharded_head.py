"""An LM head spread over two processes, and data-parallel hooks over two processes (gloo)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from eapo_fast.kernels.linear_token_stats.sharded import merged

WORKER = Path(__file__).with_name("sharded_worker.py")


def test_two_processes(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(rank), "2", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    texts = [rank.communicate(timeout=240)[0] for rank in ranks]
    for text in texts:
        assert text.strip().endswith("all checks passed"), text[-4000:]


def test_states_merge_in_any_grouping() -> None:
    """Logits in three shards, one of them all banned."""
    y = torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 20
    y[2, 10:20] = -torch.inf

    def state(part: torch.Tensor) -> torch.Tensor:
        top = part.amax(1)
        distance = torch.where(part > -torch.inf, part - top[:, None], 0.0)
        e = torch.where(part > -torch.inf, distance.exp(), 0.0)
        sums = [(e * distance).sum(1), torch.zeros(5), e.square().sum(1), e.pow(3).sum(1)]
        return torch.stack([top, e.sum(1), *sums], 1)

    parts = [state(y[:, i : i + 10]) for i in (0, 10, 20)]
    torch.testing.assert_close(merged(torch.stack(parts)), state(y))
    pair = merged(torch.stack(parts[1:]))
    torch.testing.assert_close(merged(torch.stack([parts[0], pair])), state(y))
