from __future__ import annotations

import ast
import random
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import eapo_fast.rewards as rewards
from eapo_fast.rewards import verify

PACKAGE = Path(rewards.__file__).parent

ANSWERS = {
    "tower": "9^{9^{9^{9^9}}}",
    "factorial tower": "(((9!)!)!)!",
    "huge factorial": "(10^{10})!",
    "factorial ratio": "5000!/4998!",
    "long number": "9" * 3999,
    "huge exponent": "1e999999",
    "symbolic power": "x^{10^9}",
    "trinomial power": "(x+y+z)^{2000}",
    "deep brackets": "(" * 2000 + "1" + ")" * 2000,
    "deep roots": "\\sqrt{" * 38 + "2" + "}" * 38,
    "deep fractions": "\\frac{1}{" * 30 + "3" + "}" * 30,
    "many signs": "-" * 3000 + "1",
    "many roots": "1" + "+\\sqrt{2}" * 400,
    "many items": ",".join(["1"] * 1500),
    "many equal roots": ",".join(f"\\sqrt{{{n}}}" for n in range(120)),
    "huge angle": "\\sin(10^{1000})",
    "pole": "\\tan(\\pi/2)",
    "log of zero": "\\log(0)",
    "zero power": "0^{-1}",
    "root of degree zero": "\\sqrt[0]{5}",
    "exponential tower": "e^{e^{e^{e^{10}}}}",
    "irrational tower": "\\pi^{\\pi^{\\pi^\\pi}}",
    "slow root": "3^{0.0001}+" * 50 + "1",
    "long chain": "1" + "<2" * 300,
    "open texts": "\\text{" * 300,
    "nested texts": "\\text{" * 100 + "}" * 100,
    "backslashes": "\\" * 3000,
    "open matrix": "\\begin{pmatrix}" * 50,
    "wide matrix": "\\begin{pmatrix}" + " & ".join(["1"] * 400) + "\\end{pmatrix}",
    "harmonic": "+".join(f"1/{n}" for n in range(10**6, 10**6 + 180)),
    "other digits": "\u0661\u0662",
    "control characters": "\x00\x1b",
    "python call": "__import__('os').system('touch pwned')",
    "python attribute": "().__class__.__bases__[0]",
    "sympy call": "Integer(1).func",
}
GOLDS = ["5", r"\sqrt{2}+\sqrt{3}", "x^2+1", r"\{1,2\}", r"\sin(1)+\pi", "e^{e}", "(1,2)"]


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_a_hostile_answer_is_never_correct_and_takes_little_time(answer: str) -> None:
    start = time.perf_counter()
    for gold in GOLDS:
        assert verify(f"\\boxed{{{answer}}}", gold).status != "correct"
        assert verify(gold, answer, extract="none").status != "correct"
    assert time.perf_counter() - start < 8.0


TEXTS = {
    "open boxes": "\\boxed{" * 100_000,
    "braces": "{" * 300_000 + "\\boxed{5}",
    "marks": "####\n" * 100_000,
    "announcements": "answer is " * 50_000,
    "dollars": "$" * 300_000,
    "digits": "1" * 300_000,
    "minus signs": "- " * 200_000,
    "fractions": "9/9" * 100_000,
    "inline maths": "\\( " * 100_000,
    "commas": "1," * 200_000,
    "spaces": " " * 300_000 + "x",
    "box and spaces": "\\boxed" + " " * 300_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_extraction_is_linear_in_the_text(text: str) -> None:
    start = time.perf_counter()
    verify(text, "41")
    assert time.perf_counter() - start < 2.0


def test_random_bytes_never_raise() -> None:
    draw = random.Random(7)
    pieces = [*string.printable, "\\frac", "\\sqrt", "\\boxed{", "\\text{", "\\left(", "^{", "}"]
    for _ in range(1500):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 40)))
        assert verify(text, "5", extract="none").status in ("correct", "incorrect", "undecided")
        verify("5", text)


def test_the_package_evaluates_no_text() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "literal_eval"}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = getattr(function, "id", getattr(function, "attr", ""))
                owner = getattr(getattr(function, "value", None), "id", "")
                assert name not in forbidden or (name, owner) == ("compile", "re"), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "sympy" not in ast.dump(node)


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import sys, eapo_fast.rewards; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'sympy', 'mpmath', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_verdicts_do_not_depend_on_threads() -> None:
    pairs = [(r"\sqrt{12}", r"2\sqrt{3}"), (r"\sin 1", r"\cos 1"), ("(x+1)^2", "x^2+2x+1")] * 5
    expected = [verify(a, b).status for a, b in pairs]
    results: dict[int, list[str]] = {}

    def work(worker: int) -> None:
        results[worker] = [verify(a, b).status for a, b in pairs]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == expected for result in results.values())
