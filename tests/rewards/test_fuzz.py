"""Answers drawn from a grammar, whole and damaged: a verdict always comes, and it makes sense.

The time is a minute; `EAPO_FAST_FUZZ_SECONDS=600 pytest tests/rewards/test_fuzz.py` takes longer.
"""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from eapo_fast.rewards import readable, verify

SECONDS = float(os.environ.get("EAPO_FAST_FUZZ_SECONDS", "60"))

_NUMBERS = st.one_of(
    st.integers(0, 10**6).map(str),
    st.decimals(0, 1000, places=3).map(str),
    st.sampled_from(
        [
            "1,234",
            "10,\\!000",
            "1{,}000",
            "3\\frac{1}{2}",
            "50\\%",
            "12_5",
            "1e5",
            "½",
            "2A_{16}",
            "0.(3)",
            "2¹⁰",
            "0.1\\overline{6}",
            "5!!",
            "30^\\circ",
        ]
    ),
)
_ATOMS = st.one_of(
    _NUMBERS,
    st.sampled_from(["x", "y", "n", "\\pi", "e", "i", "\\theta", "x_1", "x₁", "y'", "\\infty"]),
)


def _grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(parts, parts)
    return st.one_of(
        pair.map(lambda p: f"{p[0]}+{p[1]}"),
        pair.map(lambda p: f"{p[0]}-{p[1]}"),
        pair.map(lambda p: f"({p[0]})({p[1]})"),
        pair.map(lambda p: f"{p[0]}\\cdot {p[1]}"),
        pair.map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}}}"),
        pair.map(lambda p: f"({p[0]})^{{{p[1]}}}"),
        pair.map(lambda p: f"\\log_{{{p[0]}}}({p[1]})"),
        pair.map(lambda p: f"\\binom{{{p[0]}}}{{{p[1]}}}"),
        parts.map(lambda p: f"\\sqrt{{{p}}}"),
        parts.map(lambda p: f"\\sqrt[3]{{{p}}}"),
        parts.map(lambda p: f"|{p}|"),
        parts.map(lambda p: f"({p})!"),
        parts.map(lambda p: f"({p})!!"),
        parts.map(lambda p: f"\\overline{{{p}}}"),
        pair.map(lambda p: f"{p[0]}\\pm {p[1]}"),
        pair.map(lambda p: f"{{{p[0]} \\choose {p[1]}}}"),
        st.tuples(st.sampled_from(["\\sin", "\\cos", "\\tan", "\\ln", "\\arctan"]), parts).map(
            lambda p: f"{p[0]}({p[1]})"
        ),
    )


VALUES = st.recursive(_ATOMS, _grown, max_leaves=6)
_ENDS = st.one_of(
    _NUMBERS, st.sampled_from(["\\infty", "-\\infty", "\\sqrt{2}", "\\pi", "-3", "0"])
)
_SETS = st.recursive(
    st.one_of(
        st.tuples(st.sampled_from("(["), _ENDS, _ENDS, st.sampled_from(")]")).map(
            lambda v: f"{v[0]}{v[1]}, {v[2]}{v[3]}"
        ),
        st.lists(_ENDS, min_size=1, max_size=3).map(lambda v: f"\\{{{', '.join(v)}\\}}"),
        st.tuples(st.sampled_from(["<", "\\ge", "\\ne", "\\in \\mathbb{R}, x >"]), _ENDS).map(
            lambda v: f"\\{{x : x {v[0]} {v[1]}\\}}"
        ),
        st.sampled_from(["\\mathbb{R}", "\\emptyset", "\\mathbb{Z}"]),
    ),
    lambda parts: st.tuples(parts, st.sampled_from(["\\cup", "\\cap", "\\setminus"]), parts).map(
        " ".join
    ),
    max_leaves=4,
)
ANSWERS = st.one_of(
    VALUES,
    _SETS,
    st.lists(
        st.tuples(st.sampled_from("xy"), st.sampled_from("<>="), _ENDS).map("".join),
        min_size=1,
        max_size=3,
    ).map(" and ".join),
    st.lists(
        st.tuples(st.sampled_from("xy"), st.sampled_from(["<", ">", "=", "\\ne "]), _ENDS).map(
            "".join
        ),
        min_size=1,
        max_size=3,
    ).map(", ".join),
    st.lists(VALUES, min_size=2, max_size=4).map(", ".join),
    st.lists(VALUES, min_size=2, max_size=4).map(lambda v: f"({', '.join(v)})"),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda v: f"\\{{{', '.join(v)}\\}}"),
    st.tuples(VALUES, VALUES).map(lambda v: f"[{v[0]}, {v[1]})"),
    st.tuples(st.sampled_from(["=", "<", "\\le", ">", ":"]), VALUES, VALUES).map(
        lambda v: f"{v[1]} {v[0]} {v[2]}"
    ),
    st.tuples(VALUES, VALUES).map(lambda v: f"\\begin{{pmatrix}}{v[0]}\\\\{v[1]}\\end{{pmatrix}}"),
    st.tuples(VALUES, st.sampled_from(["cm", "\\text{ km}", "^\\circ", "dollars"])).map("".join),
    st.sampled_from(["\\text{yes}", "\\text{(B)}", "east", "no solution"]),
)
_DAMAGE = st.text("{}()[]\\^_$,;:!%&|=+-*/.0123456789abxyz \n\u00b2\u221a\u2212", max_size=3)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An answer with a piece cut out or put in."""
    text = draw(ANSWERS)
    start, stop = (draw(st.integers(0, len(text))) for _ in range(2))
    return text[: min(start, stop)] + draw(_DAMAGE) + text[max(start, stop) :]


def check(a: str, b: str) -> None:
    start = time.process_time()
    left, right = verify(a, b, extract="none"), verify(b, a, extract="none")
    assert left.status == right.status or "" in (a.strip(), b.strip()), (left, right)
    if readable(a) is None:
        assert verify(a, a, extract="none").correct
    assert time.process_time() - start < 3.0


@pytest.mark.slow
def test_a_verdict_comes_and_does_not_depend_on_the_order() -> None:
    examples = settings(
        max_examples=200,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        seed(count)(examples(given(ANSWERS, ANSWERS)(check)))()
        seed(count)(examples(given(damaged(), ANSWERS)(check)))()
        count += 1
