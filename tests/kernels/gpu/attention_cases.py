"""Steps of paged attention: arguments on any device, and what float64 makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eapo_fast.kernels.paged_attention import reference


@dataclass(frozen=True, kw_only=True)
class Step:
    """Segments of (query rows, keys); spans of (first segment, segments, keys in common).

    A segment with rows but without keys is padding. Values are random and fresh for every seed;
    what is not written is NaN.
    """

    segments: Sequence[tuple[int, int]]
    spans: Sequence[tuple[int, int, int]] = ()
    q_heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    seed: int = 0

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Arguments of `paged_attention`, all but the backend."""
        generator = torch.Generator().manual_seed(self.seed)
        tables, blocks = self._tables()
        heads = (self.kv_heads, self.dim)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        rows = sum(q for q, _ in self.segments)
        shape = (blocks, self.block_size, *heads)
        caches = [torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2)]
        slots = []
        for (q_len, kv_len), table in zip(self.segments, tables, strict=True):
            slot = self._slots(table, kv_len)
            old = slot[: max(kv_len - q_len, 0)]
            for cache in caches:
                flat = cache.flatten(0, 1)
                fresh = flat[old].isnan().all(-1).all(-1)
                flat[old[fresh]] = random(int(fresh.sum()), *heads)
            padding = torch.full((q_len,), -1)
            slots.append(slot[kv_len - q_len :] if kv_len > 0 else padding)
        arguments: dict[str, Any] = {
            "q": random(rows, self.q_heads, self.dim),
            "k": random(rows, *heads),
            "v": random(rows, *heads),
            "k_cache": caches[0],
            "v_cache": caches[1],
            "slots": torch.cat(slots),
            "cu_q": torch.tensor([0, *[q for q, _ in self.segments]]).cumsum(0).int(),
            "kv_lens": torch.tensor([kv for _, kv in self.segments], dtype=torch.int32),
            "block_tables": tables,
            "scale": self.dim**-0.5,
            **self.options,
        }
        if self.sinks:
            arguments["sinks"] = random(self.q_heads)
        if self.spans:
            spans = torch.tensor([span[:2] for span in self.spans], dtype=torch.int32)
            lens = torch.tensor([span[2] for span in self.spans], dtype=torch.int32)
            arguments["shared"] = (spans, lens)
        return {name: _moved(value, device) for name, value in arguments.items()}

    def _tables(self) -> tuple[Tensor, int]:
        """Blocks of the segments in random places, -1 behind their end; and how many there are."""
        widths = [-(-kv // self.block_size) for _, kv in self.segments]
        count = sum(widths) + 3
        free = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        tables = torch.full((len(widths), max(widths) + 1), -1, dtype=torch.int32)
        for s, width in enumerate(widths):
            tables[s, :width] = torch.tensor([free.pop() for _ in range(width)])
        for first, members, length in self.spans:
            common = length // self.block_size
            tables[first : first + members, :common] = tables[first, :common].clone()
        return tables, count

    def _slots(self, table: Tensor, kv_len: int) -> Tensor:
        position = torch.arange(kv_len)
        block = table[position // self.block_size].long()
        return block * self.block_size + position % self.block_size


def expected(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Result in float64, and the same mix of the values' sizes: what rounding errors scale with."""
    inputs = {name: _moved(value, "cpu") for name, value in arguments.items()}
    for unused in ("shared", "longest"):
        inputs.pop(unused, None)
    wide = {
        name: value.double().clone()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    wide = {"softcap": 0.0, "window": 0, **wide}
    sizes = {**wide, "v": wide["v"].abs(), "v_cache": wide["v_cache"].abs()}
    sizes["k_cache"] = wide["k_cache"].clone()
    return reference.paged_attention(**wide), reference.paged_attention(**sizes)


def assert_close(got: Tensor, arguments: dict[str, Any]) -> None:
    """Compare with float64; see `worst_error`."""
    worst = worst_error(got, arguments)
    assert worst <= 1, f"error is {worst:.2f} times its bound"


def worst_error(got: Tensor, arguments: dict[str, Any]) -> float:
    """Return the largest error against float64 as a share of its bound; NaN counts as infinite.

    Weights and result may each be rounded to the storage once. On the CPU rounding may be towards
    zero: Triton's interpreter makes bfloat16 so.
    """
    want, size = expected(arguments)
    unit = torch.finfo(got.dtype).eps / (2 if got.is_cuda else 1)
    slack = 32 if got.dtype == torch.float32 else 1
    bound = 1.1 * slack * unit * (want.abs() + size) + 2e-6
    error = (got.cpu().double() - want).abs()
    return float((error / bound).nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return (
        tuple(part.to(device) for part in value)
        if isinstance(value, tuple) and isinstance(value[0], Tensor)
        else value
    )
