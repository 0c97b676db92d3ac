"""Philox4x32-10 and keyed draws in plain Python integers."""

from __future__ import annotations

from collections.abc import Sequence

_LOW = 0xFFFFFFFF


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _halves(value: int) -> tuple[int, int]:
    return value & _LOW, (value >> 32) & _LOW


def _fnv1a64(text: str) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value


def keyed_bits(seed: int, purpose: str, indices: Sequence[int]) -> int:
    """64 bits that are a pure function of the arguments."""
    words = philox4x32((*_halves(_fnv1a64(purpose)), *_halves(len(indices))), _halves(seed))
    for at in range(0, len(indices), 4):
        four = [_halves(index) for index in indices[at : at + 4]]
        four += [(0, 0)] * (4 - len(four))
        words = philox4x32([low for low, _ in four], words[:2])
        words = philox4x32([high for _, high in four], words[:2])
    return words[0] | words[1] << 32


def keyed_uniform(seed: int, purpose: str, indices: Sequence[int]) -> float:
    """A float in [0, 1) from the upper 53 bits."""
    return (keyed_bits(seed, purpose, indices) >> 11) * 2.0**-53


def sample_uniform(seed: int, step: int, prompt_id: int, sample: int, position: int) -> float:
    """The uniform of one sampled token: the upper 24 bits, exact in float32."""
    return (keyed_bits(seed, "sample", [step, prompt_id, sample, position]) >> 40) * 2.0**-24
