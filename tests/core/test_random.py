"""Philox against the published vectors, keyed draws against plain Python."""

from __future__ import annotations

import pytest
from twin_random import keyed_uniform, philox4x32

from eapo_fast import _core

KNOWN_ANSWERS = {  # Random123 1.14, kat_vectors, "philox4x32 10"
    "zeros": (
        (0,) * 4,
        (0,) * 2,
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

INDEX_LISTS = [
    [],
    [0],
    [7, 0],
    [1, 2, 3, 4],
    [1, 2, 3, 4, 0],
    [2**40, -1, 2**63 - 1, 5, 6, 7, 8, 9],
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, block):
    assert _core.philox4x32(counter, key) == block == philox4x32(counter, key)


@pytest.mark.parametrize("indices", INDEX_LISTS, ids=str)
@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1, -5])
def test_keyed_uniform_equals_the_python_twin(seed, indices):
    got = _core.keyed_uniform(seed, "gate", indices)
    assert got == keyed_uniform(seed, "gate", indices)
    assert 0.0 <= got < 1.0


def test_every_argument_of_a_draw_matters():
    lists = [*INDEX_LISTS, [0, 7], [1, 2, 3], [1, 2, 3, 4, 0, 0]]
    draws = {
        _core.keyed_uniform(s, p, i) for s in (0, 1) for p in ("gate", "jitter") for i in lists
    }
    assert len(draws) == 4 * len(lists)


def test_draws_are_uniform():
    draws = [_core.keyed_uniform(3, "order", [i]) for i in range(20_000)]
    bins = [sum(low <= 16 * u < low + 1 for u in draws) for low in range(16)]
    chi_square = sum((count - 1250) ** 2 / 1250 for count in bins)
    assert chi_square < 37.7  # 15 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed must fit 64 bits"):
        _core.keyed_uniform(seed, "gate", [])
