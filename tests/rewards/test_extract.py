from __future__ import annotations

import pytest

from eapo_fast.rewards import extract_answer, extract_gold

CASES = {
    "last box": (r"\boxed{1} no, \boxed{2}", "2"),
    "nested braces": (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
    "escaped braces": (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    "inner box": (r"\boxed{\boxed{5}}", "5"),
    "fbox": (r"\fbox{7}", "7"),
    "box without braces": (r"$\boxed 9$", "9"),
    "unclosed last box": (r"\boxed{3} and then \boxed{4", "3"),
    "boxes joined by and": (r"\boxed{1} \text{ and } \boxed{-2}.", "1, -2"),
    "boxes in $ joined by and": (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
    "alternative box is not joined": (r"$\boxed{1.5}$, or $\boxed{\frac32}$", r"\frac32"),
    "box beats later text": (r"\boxed{3}. The answer is 4", "3"),
    "hash mark": ("16 - 3 = 13\n#### 18", "18"),
    "last hash mark": ("#### 1\ntext\n#### 1,234 \n", "1,234"),
    "hash mark beats answer is": ("The answer is 4\n#### 5", "5"),
    "answer is": ("Thus the answer is 12. I hope it is correct.", "12"),
    "answer colon in bold": ("**Answer:** 3.5", "3.5"),
    "answer is formula": (r"The final answer is $\frac{1}{2}$, as wanted.", r"\frac{1}{2}"),
    "answer is with a sentence": ("The answer is 5 because 2 + 3 = 5", "5"),
    "answer is decimal": ("the answer is 3.75.", "3.75"),
    "answer in the next paragraph": ("The answer is:\n\n5", "5"),
    "several answers": ("so the answers are 5 and 6.", "5 and 6"),
    "short for answer": ("Ans: 5", "5"),
    "price before a formula": (r"It was \$5 and so we get $x^2$ here", "x^2"),
    "several formulas": ("The answers are $x=1$ and $x=2$.", "x=1, x=2"),
    "one solution or the other": ("the answer is $x=1$ or $x=2$", "x=1, x=2"),
    "another form of the answer": (r"the answer is $0.5$ or $\frac12$", "0.5"),
    "a word before the formula": ("The answer is therefore\n\n\\[ 42 \\]", " 42 "),
    "answer word": ("The answer is Evelyn.", "Evelyn"),
    "whole text": (r"x = \frac{1}{2}", r"x = \frac{1}{2}"),
    "whole tuple": ("(1, 2)", "(1, 2)"),
    "last formula": (r"We get $x^2$, then $x^2+1$ as claimed", "x^2+1"),
    "last number": ("She has 12 apples and then buys 30 more so 42 apples", "42"),
    "last number is money": ("It costs $3.50 and then $4.50 for all of them", "$4.50"),
    "last number is negative": ("so that gives us the value -7 finally", "-7"),
    "minus between numbers is no sign": ("and that makes for us 16-3", "3"),
    "digits inside a word do not count": ("the code AZ2K of item 5 is nice", "5"),
    "escaped dollar in a formula": (r"it is $\$5 = \frac{10}{2}$ in all", r"\$5 = \frac{10}{2}"),
    "bold answer behind a rule": ("it is **7**.\n\n---\n\nFinal Answer: **73**", "73"),
    "choice with its text": ("Answer: B) twelve", "B) twelve"),
    "words as a formula": (
        r"$$\text{They form a regular hexagon}$$",
        r"$$\text{They form a regular hexagon}$$",
    ),
    "segments are no prose": ("$AB=4, CD=5$", "$AB=4, CD=5$"),
    "nothing": ("I do not know what to say here!", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(("text", "answer"), CASES.values(), ids=CASES.keys())
def test_auto_finds_the_final_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_single_methods_do_not_fall_back() -> None:
    assert extract_answer("#### 5", "boxed") is None
    assert extract_answer(r"\boxed{5}", "hash") is None
    assert extract_answer("5", "answer_is") is None
    assert extract_answer(" 5 ", "none") == "5"
    assert extract_answer("1 then 2", "last") == "2"


def test_gold_is_the_box_or_the_mark_or_all() -> None:
    assert extract_gold(r"long \boxed{5} text") == "5"
    assert extract_gold("long text\n#### 5") == "5"
    assert extract_gold(" the red one ") == "the red one"
    assert extract_gold(" ") is None
    assert extract_gold("We count. " * 30 + "The final answer is $28$. I hope so.") == "28"
