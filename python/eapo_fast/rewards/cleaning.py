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
        "\u2018": "'", "\u2032": "'", "\u00ba": "\\degree ",
        "\u00bd": "\\frac{1}{2}", "\u00bc": "\\frac{1}{4}", "\u00be": "\\frac{3}{4}",
        "\u2153": "\\frac{1}{3}", "\u2154": "\\frac{2}{3}",
    }
)  # fmt: skip
_RAISED = re.compile(r"[\u00b2\u00b3\u00b9\u2070\u2071\u2074-\u207f]+")
_LOWERED = re.compile(r"[\u2080-\u208e\u2090-\u209c]+")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]+")
_CURRENCY = re.compile(r"(?:USD|US\\?\$|Rs\.?)\s*(?=[\d.])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^|10\*\*)")
_HALF_DAY = re.compile(r"\b([AaPp])\.\s?[Mm]\.?(?![A-Za-z])")
_DOUBLE = {"**": "**", "__": "__", "\\(": "\\)", "\\[": "\\]"}
_SINGLE = {"*": "*", "_": "_", '"': '"', "'": "'", "\u201c": "\u201d"}
"""Marks of emphasis and quotation, which do not belong to an answer that they enclose."""
_UNFINISHED = re.compile(r"\d\s*(?:\.\.\.|\\[lc]?dots)[\s$]*$")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z{}])")
_CHOICE = re.compile(
    r"\s*(?:(?:\\(?:text|textbf|textrm|mathrm|mathbf)\{\s*\(?([A-J])\)?[.:)]?\s*\}"
    r"|\(?([A-J])\)[.:]?|([A-J])[.:](?=\s))(?:\\[,;: ]|\\quad|[\s:~])+"
    r"|\\(?:text|textbf)\{\(([A-J])\)[.:]?\s*\})(?=\S)"
)
_CHOICE_IN_TEXT = re.compile(r"\s*\\text(?:bf|rm)?\{\s*\(([A-J])\)[.:]?\s([^{}]*)\}\s*")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:equation|align|aligned|gather|split|cases)\*?\}")
_DECIMAL_COMMA = re.compile(r"\s*\$?\s*-?(?:0,\d+|\d+,(?:\d\d|\d{4,}))\s*(?:\\?%)?\s*\$?\s*")
_AMBIGUOUS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def clean(text: str) -> str:
    """Unify Unicode, strip outer white space, math delimiters, bold marks and end punctuation.

    Raises `Unreadable` when the text is empty or longer than `limits.MAX_CHARACTERS`.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    if not text.isascii():
        text = _in_ascii(text)
    unfinished = _UNFINISHED.search(text) is not None
    before = None
    while text != before:
        before, text = text, _without_outer_marks(text)
    if not text:
        raise Unreadable("empty")
    if unfinished:
        raise Unreadable("an unfinished decimal")
    return _respelt(text)


def _in_ascii(text: str) -> str:
    """Spell in ASCII what LaTeX can say: raised and lowered characters as a whole, symbols."""
    text = _RAISED.sub(lambda found: f"^{{{_compatible(found.group())}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{_compatible(found.group())}}}", text)
    text = _INVISIBLE.sub(" ", text).translate(_UNICODE)
    return _compatible(text)


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_UNICODE)


def _without_outer_marks(text: str) -> str:
    text = text.strip().strip("$`").rstrip(",;: \\").lstrip("= ")
    if text.endswith(".") and not text.endswith("..."):
        text = text[:-1]
    if len(text) > 4 and text[:2] in _DOUBLE and text.endswith(_DOUBLE[text[:2]]):
        text = text[2:-2]
    closing = _SINGLE.get(text[:1])
    if closing and len(text) > 2 and text.find(closing, 1) == len(text) - 1:
        text = text[1:-1]
    return text


def _respelt(text: str) -> str:
    """Replace spellings that the lexer does not know."""
    if "\\begin" in text and _ENVIRONMENT.search(text):
        text = _without_environment(text)
    if "\\\\" in text and "\\begin" not in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    if "..." in text:
        text = text.replace("...", " \\ldots ")
    if text[0] in "UR":
        text = _CURRENCY.sub("", text, count=1)
    if text[-1] in "mM" and "." in text:
        text = _HALF_DAY.sub(r"\1m", text)
    if "10" in text:
        text = _TIMES_TEN.sub(r"\\times ", text)
    return text


def _without_environment(text: str) -> str:
    """Read the lines of a display as a list; in an alignment a mark stands before each relation."""
    bare = _ENVIRONMENT.sub(" ", text)
    if "\\begin" in bare:
        return text
    lines = (line.replace("&=", "=").strip(" ,") for line in bare.split("\\\\"))
    return ", ".join(filter(None, lines)) or text


def has_ambiguous_commas(text: str) -> bool:
    """Tell whether `1,234` occurs, which may be one number or a list of two."""
    return _AMBIGUOUS.search(text) is not None


def split_choice(text: str) -> tuple[str, str] | None:
    """Split `\\textbf{(B)} 12` or `B) 12` into the letter and what stands behind it."""
    found = _CHOICE_IN_TEXT.fullmatch(text)
    if found is not None:
        return found.group(1), f"\\text{{{found.group(2)}}}"
    found = _CHOICE.match(text)
    if found is None:
        return None
    return next(filter(None, found.groups())), text[found.end() :]


def with_decimal_point(text: str) -> str | None:
    """Return `3,14` as `3.14` if the whole answer is such a number, else None.

    Three digits behind the comma are thousands (unless a 0 stands before it), and one digit is
    more often the second element of a list.
    """
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else None
