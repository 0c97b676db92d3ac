"""Random arguments of group_advantages over every center, scale, ddof and kind of validity."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 2, 7, 63)
CENTERS = ("mean", "loo", "length", "none")
SCALES = ("std", "batch_std", "none")


def cases() -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Yield rewards (NaN where not valid), group ids and options; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    for size, center, scale, ddof, partial in product(SIZES, CENTERS, SCALES, (0, 1), (0, 1)):
        rewards = torch.randn(size, generator=generator)
        groups = torch.randint(0, size // 4 + 1, (size,), generator=generator) * 3 - 5
        lengths = torch.randint(0, 9, (size,), generator=generator)
        valid = torch.rand(size, generator=generator) > 0.3 if partial else None
        if valid is not None:
            rewards[~valid] = torch.nan
        options = {"center": center, "scale": scale, "lengths": lengths, "valid": valid}
        yield rewards, groups, {**options, "eps": 1e-6, "ddof": ddof}
    for center, scale in product(CENTERS, SCALES):  # a deviation of 0 and no eps beside it
        if center == "none" and scale != "none":
            continue  # infinite
        options = {"center": center, "scale": scale, "lengths": torch.arange(4), "valid": None}
        yield torch.full((4,), 0.1), torch.full((4,), 3), {**options, "eps": 0.0, "ddof": 1}
