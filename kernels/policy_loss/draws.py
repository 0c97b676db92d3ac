"""Keyed random numbers for many keys at once: `_core.keyed_uniform`, vectorised."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eapo_fast._core import philox4x32

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def keyed_uniform(seed: int, purpose: str, indices: tuple[Tensor, ...]) -> Tensor:
    """Return [n] float64 in [0, 1), row i equal to `_core.keyed_uniform` of `indices[...][i]`.

    `indices` are one to four [n] int64 tensors.
    """
    first = philox4x32((*_halves(_fnv1a64(purpose)), *_halves(len(indices))), _halves(seed % 2**64))
    spare = torch.zeros_like(indices[0])
    four = [*indices, *[spare] * (4 - len(indices))]
    key = (torch.full_like(spare, first[0]), torch.full_like(spare, first[1]))
    words = _philox4x32(tuple(x & _LOW for x in four), key)
    words = _philox4x32(tuple((x >> 32) & _LOW for x in four), words[:2])
    return ((words[1] << 21) | (words[0] >> 11)).to(torch.float64) * 2.0**-53


def fingerprints(
    values: Tensor,
    position: Tensor,
    sequence: Tensor,
    sequences: int,
    live: Tensor | None = None,
) -> Tensor:
    """Return [sequences] int64: a hash of each sequence's numbers, rounded to float32.

    values, position, sequence: [n] rows; `live`: which count. It does not depend on the order of
    the sequences.
    """
    bits = (values.to(torch.float32) + 0.0).contiguous().view(torch.int32).long()
    mixed = (bits ^ (position * 0x9E3779B97F4A7C1)) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
    mixed = mixed ^ (mixed >> 32)
    if live is not None:
        mixed = torch.where(live, mixed, 0)
    return mixed.new_zeros(sequences).index_add_(0, sequence, mixed)


def _philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Words:
    """One block of Philox4x32-10 a row, words in int64; products wrap, so their bits are right."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _LOW, (p1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _LOW, high0 ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _fnv1a64(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value


def _halves(value: int) -> tuple[int, int]:
    low, high = struct.unpack("<II", struct.pack("<Q", value))
    return low, high
