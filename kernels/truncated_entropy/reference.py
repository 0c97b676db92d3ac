"""Truncated distributions in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """Which tokens a truncated distribution keeps; see `ops.truncated_entropy`."""

    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def kept(self, log_p: Tensor) -> Tensor:
        """Return [R, V] flags."""
        return kept_tokens(log_p, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)

    def __bool__(self) -> bool:
        return any(x is not None for x in self)


def kept_tokens(
    log_p: Tensor, *, top_p: float | None, top_k: int | None, min_p: float | None
) -> Tensor:
    """Return [R, V] flags of the tokens that every cut keeps."""
    kept = torch.ones_like(log_p, dtype=torch.bool)
    if top_p is not None or top_k is not None:
        ranked, order = log_p.sort(dim=-1, descending=True, stable=True)
        inside = torch.ones_like(kept)
        if top_p is not None:
            inside = ranked.exp().cumsum(-1) < top_p
        if top_k is not None:
            inside[:, top_k:] = False
        kept = kept.scatter(1, order, inside)
    if min_p is not None and min_p > 0:
        kept &= log_p >= log_p.amax(-1, keepdim=True) + math.log(min_p)
    return kept


def truncated_entropy(log_p: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return mass and entropy [R] of the kept tokens; 0 and 0 where none is kept."""
    empty = ~kept.any(-1)
    inside = log_p.masked_fill(~(kept | empty[:, None]), -torch.inf)
    mass = torch.where(empty, 0.0, inside.exp().sum(-1))
    log_q = inside.log_softmax(-1)
    surprise = torch.where(log_q > -torch.inf, log_q, 0.0)
    entropy = -(log_q.exp() * surprise).sum(-1)
    return mass, torch.where(empty, 0.0, entropy)
