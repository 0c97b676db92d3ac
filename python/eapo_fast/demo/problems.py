"""Problems of the demo: `a=48/2;b=a+48;c=b*3?`, to be solved step by step and answered in a box."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypedDict

from eapo_fast.demo.chains import LETTERS, Chain, Split, keyed_generator, load_chains, resample
from eapo_fast.errors import DataError

MAX_VALUE = 150
"""Largest operand or result: one-step sums and products up to here fit a 0.8 M-parameter model."""
STEPS = (4, 8)
"""Fewest and most steps of a problem, both included."""
MAX_DRAWS = 1000


class Problem(TypedDict):
    """A row of the demo data set."""

    prompt: str
    """The steps, `a=48/2;b=a+48;c=b*3?`."""
    answer: str
    """The last result."""
    steps: int
    """Number of steps."""
    id: str
    """GSM8K id of the chain; a resampled one has `-r<index>` at its end."""


def build_dataset(
    split: Split, size: int | None, seed: int, *, steps: tuple[int, int] = STEPS
) -> list[Problem]:
    """Return `size` problems with `steps[0]..steps[1]` steps.

    `test`: held-apart chains with their own figures, a seeded choice without replacement (all of
    them for `size=None`). `train`: train chains with operands resampled, item i a pure function
    of (seed, i); none equals a held-apart chain of any length.
    Raises DataError if `size` is more than there is, or for a train split without a size.
    """
    structures = _structures(split, steps)
    if split == "test":
        return _held_apart(structures, size, seed)
    if size is None:
        raise DataError("size: a train split is generated, so give the number of problems")
    return [_train_problem(structures, seed, index) for index in range(size)]


def problem_of(chain: Chain, suffix: str = "") -> Problem:
    """Return the data set row of one chain."""
    return Problem(
        prompt=prompt_of(chain),
        answer=str(chain.answer),
        steps=len(chain.steps),
        id=chain.id + suffix,
    )


def prompt_of(chain: Chain) -> str:
    """Return the prompt, `a=48/2;b=a+48;c=b*3?`."""
    steps = (f"{LETTERS[i]}={step.text}" for i, step in enumerate(chain.steps))
    return ";".join(steps) + "?"


def _structures(split: Split, steps: tuple[int, int]) -> Sequence[Chain]:
    chosen = [c for c in load_chains(split) if steps[0] <= len(c.steps) <= steps[1]]
    if not chosen:
        raise DataError(f"steps: no {split} chain has {steps[0]} to {steps[1]} steps")
    return chosen


def _held_apart(structures: Sequence[Chain], size: int | None, seed: int) -> list[Problem]:
    chains = [chain for chain in structures if max(chain.values) <= MAX_VALUE]
    size = len(chains) if size is None else size
    if not 0 < size <= len(chains):
        raise DataError(f"size: got {size}; {len(chains)} held-apart chains have these steps")
    order = keyed_generator(seed, 0).permutation(len(chains))
    return [problem_of(chains[i]) for i in order[:size]]


@cache
def _held_apart_figures() -> frozenset[tuple[str, ...]]:
    return frozenset(chain.figures for chain in load_chains("test"))


def _train_problem(structures: Sequence[Chain], seed: int, index: int) -> Problem:
    rng = keyed_generator(seed, index)
    for _ in range(MAX_DRAWS):
        source = structures[int(rng.integers(len(structures)))]
        chain = resample(source, rng, max_value=MAX_VALUE)
        if chain is not None and chain.figures not in _held_apart_figures():
            return problem_of(chain, f"-r{index}")
    raise DataError("steps: no chain of these could be resampled within the value limit")
