"""Sets of numbers against membership, point by point."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

from eapo_fast.rewards import verify

POINTS = [Fraction(n, 2) for n in range(-9, 10)]
Member = Callable[[Fraction], bool]


def drawn(draw: random.Random, depth: int) -> tuple[str, Member]:
    """Return a set as text and as a test of membership; its ends are whole numbers of -3 to 3."""
    kind = draw.choice(["interval", "ray", "points", "condition"] + ["pair"] * 4 * (depth > 0))
    a, b = sorted(draw.sample(range(-3, 4), 2))
    if kind == "interval":
        left, right = draw.choice("(["), draw.choice(")]")
        return (
            f"{left}{a},{b}{right}",
            lambda x: (a < x < b) or (left == "[" and x == a) or (right == "]" and x == b),
        )
    if kind == "ray":
        return rf"(-\infty,{a}]", lambda x: x <= a
    if kind == "points":
        return rf"\{{{b},{a},{b}\}}", lambda x: x in (a, b)
    if kind == "condition":
        return rf"\{{x \mid x \ne {a}\}}", lambda x: x != a
    left_text, in_left = drawn(draw, depth - 1)
    right_text, in_right = drawn(draw, 0)
    match draw.choice(["cup", "cap", "setminus"]):
        case "cup":
            return rf"{left_text}\cup {right_text}", lambda x: in_left(x) or in_right(x)
        case "cap" if "cup" not in left_text:
            return rf"{left_text}\cap {right_text}", lambda x: in_left(x) and in_right(x)
        case "setminus" if "cup" not in left_text:
            return rf"{left_text}\setminus {right_text}", lambda x: in_left(x) and not in_right(x)
    return left_text, in_left


def test_sets_are_equal_exactly_when_their_members_are() -> None:
    draw = random.Random(3)
    seen = {True: 0, False: 0}
    while min(seen.values()) < 150:
        (a, in_a), (b, in_b) = drawn(draw, 3), drawn(draw, 3)
        joined = (r"\cup", r"\cap", r"\setminus", r"\ne")
        if not any(word in a + b for word in joined):
            continue
        same = all(in_a(x) == in_b(x) for x in POINTS)
        if seen[same] < 400:
            seen[same] += 1
            assert verify(a, b, extract="none").correct == same, (a, b)
