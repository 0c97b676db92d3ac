"""The KV pool's tensors."""

from __future__ import annotations

import pytest
import torch

from eapo_fast.engine.cache import PagedCache
from eapo_fast.errors import ModelError


def test_layers_are_allocated_once_after_their_keys() -> None:
    cache = PagedCache(num_blocks=3, block_size=4)
    keys, values = cache.layer((0, 0), torch.zeros(7, 2, 8, dtype=torch.bfloat16))
    assert keys.shape == values.shape == (3, 4, 2, 8)
    assert keys.dtype == torch.bfloat16
    again = cache.layer((0, 0), torch.zeros(1, 2, 8, dtype=torch.bfloat16))
    assert again[0] is keys
    assert again[1] is values
    other, _ = cache.layer((0, 1), torch.zeros(7, 2, 8))
    assert other.data_ptr() != keys.data_ptr()


@pytest.mark.parametrize(
    "like",
    [torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 8), torch.zeros(1, 2, 16)],
    ids=["dtype", "heads", "width"],
)
def test_keys_of_another_kind_are_refused(like: torch.Tensor) -> None:
    cache = PagedCache(num_blocks=3, block_size=4)
    cache.layer((0, 0), torch.zeros(7, 2, 8))
    with pytest.raises(ModelError, match=r"holds torch.float32 \[heads 2, width 8\] on cpu, now"):
        cache.layer((0, 0), like)
