"""Are two answers of words the same, or words and a value?"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from fractions import Fraction

from eapo_fast.rewards.scalars import Arena, Outcome
from eapo_fast.rewards.tree import (
    COLLECTIONS,
    REALS,
    Constant,
    Node,
    Number,
    Product,
    SetOf,
    Symbol,
    Text,
)

_EMPTY = frozenset(
    ("no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set",
     "empty")
)  # fmt: skip
_UNDEFINED = frozenset(("dne", "does not exist"))
_ALL = frozenset(("all real numbers", "all reals", "real numbers"))
_WORDS: dict[str, int | Fraction] = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "half": Fraction(1, 2), "one half": Fraction(1, 2),
}  # fmt: skip
_NUMBER_WORDS = {word: Number(Fraction(value)) for word, value in _WORDS.items()}
_LABELS = re.compile(r"(?:option|choice|answer) (?=[a-j]$)")
_ARTICLES = re.compile(r"\b(?:the|a|an)\b")


def compare_texts(
    a: Node, b: Node, arena: Arena, compare: Callable[[Node, Node, Arena], Outcome]
) -> Outcome:
    """Compare two answers of which one at least is words; `compare` compares values."""
    if isinstance(a, Text) and isinstance(b, Text):
        words = normal_text(a.text), normal_text(b.text)
        letters = [sorted(node.text) for node in (a, b) if _is_letters(node)]
        same = words[0] == words[1] or (len(letters) == 2 and letters[0] == letters[1])
        same = same or _EMPTY.issuperset(words) or _UNDEFINED.issuperset(words)
        return Outcome(same, "the same words" if same else "different words")
    text, other = (a, b) if isinstance(a, Text) else (b, a)
    assert isinstance(text, Text)
    value = _NUMBER_WORDS.get(normal_text(text.text))
    if value is not None and not isinstance(other, (*COLLECTIONS, Symbol)):
        return compare(value, other, arena)
    if isinstance(other, (Symbol, Constant)):
        letter = _LABELS.sub("", text.text.strip().lower())
        same = other.name.lower() in (letter, normal_text(text.text))
        return Outcome(same, "the same choice" if same else "a text against a symbol")
    if other == REALS and normal_text(text.text) in _ALL:
        return Outcome(True, "all real numbers")
    if isinstance(other, SetOf) and not other.items:
        same = normal_text(text.text) in _EMPTY
        return Outcome(same, "no solution" if same else "a text against the empty set")
    if _is_letters(text):
        product = Product(tuple(Symbol(letter) for letter in text.text))
        return compare(product, other, arena)
    return Outcome(False, "a text against an expression")


def _is_letters(node: Node) -> bool:
    """Tell whether a text may be a product of variables."""
    return isinstance(node, Text) and len(node.text) <= 3 and node.text.isalpha()


def normal_text(text: str) -> str:
    """Lower-case, without punctuation, articles and extra white space."""
    kept = "".join(c if c not in string.punctuation else " " for c in text.lower())
    words = kept.split()
    return " ".join(words) if len(words) <= 1 else " ".join(_ARTICLES.sub(" ", kept).split())
