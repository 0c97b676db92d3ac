"""Before an answer is read: one spelling of Unicode, no outer marks, and readings of its form."""

from __future__ import annotations

import re
import unicodedata

from eapo_fast.rewards.limits import MAX_CHARACTERS
from eapo_fast.rewards.tree import Unreadable

_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u2010": "-", "\u00d7": "*", "\u00b7": "*",
        "\u22c5": "*", "\u2217": "*", "\u00f7": "/", "\u2215": "/", "\u2044": "/",
        "\u00b1": "\\pm ",
        "\u2213": "\\mp ", "\u2264": "<=", "\u2265": ">=", "\u2260": "!=", "\u221e": "\\infty ",
        "\u03c0": "\\pi ", "\u03b8": "\\theta ", "\u03b1": "\\alpha ", "\u03b2": "\\beta ",
        "\u222a": "\\cup ", "\u2208": "\\in ", "\u00b0": "\\degree ", "\u221a": " sqrt ",
        "\u2248": "\\approx ", "\u2205": "\\emptyset ", "\u211d": "\\mathbb{R}", "\u00a0": " ",
        "\u2009": " ", "\u202f": " ", "\u20ac": "", "\u00a3": "", "\u00a5": "", "\u2019": "'",
        "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}",
        "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}", "\u00b2": "^{2}", "\u00b3": "^{3}",
        "\u00b9": "^{1}", "\u2070": "^{0}", "\u2074": "^{4}", "\u2075": "^{5}", "\u2076": "^{6}",
        "\u2077": "^{7}", "\u2078": "^{8}", "\u2079": "^{9}",
    }
)  # fmt: skip
_UNFINISHED = re.compile(r"\.\d+\s*(?:\.\.\.|\\[lc]?dots)\s*\$?\s*$")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z{}])")
_CHOICE = re.compile(
    r"\s*(?:\\(?:text|textbf|textrm|mathrm|mathbf)\{\s*\(?([A-J])\)?[.:)]?\s*\}|\(?([A-J])\)[.:]?)"
    r"(?:\\[,;: ]|\\quad|[\s:~])+(?=\S)"
)
_DECIMAL_COMMA = re.compile(r"\s*\$?\s*-?(?:0,\d+|\d+,(?:\d\d|\d{4,}))\s*(?:\\?%)?\s*\$?\s*")
_AMBIGUOUS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def clean(text: str) -> str:
    """Unify Unicode, strip outer white space, math delimiters, bold marks and end punctuation.

    Raises `Unreadable` when the text is empty or longer than `limits.MAX_CHARACTERS`.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    unfinished = _UNFINISHED.search(text) is not None
    before = None
    while text != before:
        before, text = text, text.strip().strip("$`").rstrip(",;:").strip()
        if text.endswith(".") and not text.endswith("\\."):
            text = text[:-1]
        for opening, closing in (("**", "**"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(text) > 4 and text.startswith(opening) and text.endswith(closing):
                text = text[2:-2]
    if not text:
        raise Unreadable("empty")
    if unfinished:
        raise Unreadable("an unfinished decimal")
    if "\\\\" in text and "\\begin" not in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    return text


def has_ambiguous_commas(text: str) -> bool:
    """Tell whether `1,234` occurs, which may be one number or a list of two."""
    return _AMBIGUOUS.search(text) is not None


def split_choice(text: str) -> tuple[str, str] | None:
    """Split `\\textbf{(B)} 12` or `B) 12` into the letter and what stands behind it."""
    found = _CHOICE.match(text)
    return (found.group(1) or found.group(2), text[found.end() :]) if found else None


def with_decimal_point(text: str) -> str | None:
    """Return `3,14` as `3.14` if the whole answer is such a number, else None.

    Three digits behind the comma are thousands (unless a 0 stands before it), and one digit is
    more often the second element of a list.
    """
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else None
