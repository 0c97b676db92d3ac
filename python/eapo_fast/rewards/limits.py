"""Bounds on the work of one verdict, counted in steps so that load cannot change a verdict."""

from __future__ import annotations

from eapo_fast.rewards.tree import Unreadable

MAX_CHARACTERS = 4096
"""Longest answer that is read."""
MAX_TOKENS = 1024
"""Most lexical tokens of an answer."""
MAX_DEPTH = 40
"""Deepest nesting of brackets, fractions, exponents and functions."""
MAX_DIGITS = 2000
"""Most digits of one literal, and the largest decimal exponent."""
MAX_BITS = 1 << 16
"""Largest numerator or denominator of an exact value."""
MAX_FACTORIAL = 5000
"""Largest argument of a factorial."""
MAX_PRECISION = 8192
"""Most bits of a numeric comparison."""
MAX_ITEMS = 128
"""Most elements of a list, set or matrix that is compared."""
MAX_STEPS = 40_000
"""Steps of one verdict: one step is about a microsecond of arithmetic on small numbers."""

MAX_CALLS = 150_000
"""Python calls of one symbolic check, about 0.1 seconds; this limit alone decides as a rule."""
CPU_SECONDS = 0.3
"""CPU time of one symbolic check, for work that its calls do not measure."""
WALL_SECONDS = 2.0
"""Wall time of one symbolic check, the backstop when its worker gets no CPU or stands still."""


class Meter:
    """Counts the steps of one verdict and stops it with `Unreadable` when they are used up."""

    __slots__ = ("left",)

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps

    def spend(self, steps: int = 1) -> None:
        """Take `steps` off the budget; raises `Unreadable` when none are left."""
        self.left -= steps
        if self.left < 0:
            raise Unreadable("the comparison exceeds its work limit")
