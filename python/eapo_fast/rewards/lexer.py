"""From answer text (LaTeX, plain or mixed) to tokens.

Formatting that does not change the meaning (`\\left`, `\\,`, `$`, `\\displaystyle`, ...) is dropped
here, spellings are unified (`\\dfrac` and `\\tfrac` are `frac`, a Unicode root is `sqrt`).
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from eapo_fast.rewards.limits import MAX_CHARACTERS, MAX_TOKENS
from eapo_fast.rewards.tree import Unreadable


class Token(NamedTuple):
    """One lexical unit."""

    kind: str
    """number, symbol, word, command, text, mark, begin, close (of a matrix) or end."""
    text: str
    """Spelling after unification."""
    spaced: bool
    """Whether white space stands before it."""


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


END = Token("end", "", False)

FUNCTIONS = _names(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt abs "
    "max min gcd lcm det"
)
_GREEK = _names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi "
    "Omega ell"
)
_DROPPED = _names(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle scriptstyle limits angle triangle quad qquad boxed fbox thinspace hfill nonumber "
    ", ; : ! ( ) [ ] $ > - / &"
) | {" ", "\n", "\t"}
_MARKS = {
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "ne": "!=", "neq": "!=", "lt": "<", "gt": ">", "cdot": "*", "times": "*", "ast": "*",
    "div": "/", "pm": "+-", "mp": "-+", "in": "in", "cup": "cup", "circ": "deg", "degree": "deg",
    "%": "%", "{": "\\{", "}": "\\}", "lbrace": "\\{", "rbrace": "\\}", "langle": "(",
    "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|", "colon": ":", "approx": "approx",
    "\\": "\\\\", "_": "_", "land": "and", "lor": "or", "lbrack": "[", "rbrack": "]",
    "to": "to", "rightarrow": "to",
}  # fmt: skip
_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "infty": "inf", "infinity": "inf",
    "oo": "inf", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "varnothing": "emptyset",
    "tg": "tan", "ctg": "cot", "cosec": "csc", "dbinom": "binom", "tbinom": "binom",
}  # fmt: skip
_WORD_COMMANDS = (
    FUNCTIONS | _GREEK | {"pi", "inf", "infty", "infinity", "oo", "asin", "acos", "atan"}
)
_TEXTS = _names(
    "text textnormal textbf textit textrm textsf texttt mbox hbox mathrm mathbf mathit mathsf emph "
    "operatorname boldsymbol bm"
)
_LETTER_STYLES = _names("mathrm mathbf mathit boldsymbol bm")
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

_GROUPED = r"[1-9]\d{0,2}(?:(?:\s?\{\s?,\s?\}|,\\!\s?|\\,|\\!\s?,)\d{3})+(?!\d)"
_THOUSANDS = r"[1-9]\d{0,2}(?:(?:,\d{3})+(?![\d,])|(?: \d{3})+(?!\d|\s?/))"
_DIGITS = r"(?:\d+\.\d*|\.\d+|\d+)"
_NUMBER = re.compile(rf"(?:{_GROUPED}(?:\.\d+)?|{_DIGITS}(?:[eE][+-]?\d{{1,6}}(?![\w.]))?)")
_LOOSE_NUMBER = re.compile(rf"(?:{_GROUPED}|{_THOUSANDS})(?:\.\d+)?")
_SPACE = re.compile(r"\s+|~|\$")
_WORD = re.compile(r"[A-Za-z]+")
_COMMAND = re.compile(r"\\([A-Za-z]+|[\s\S])\*?")
_MARK = re.compile(r"\*\*|<=|>=|!=|==|[-+*/^_=<>()\[\]{}|,;:!%&]")
_ARITHMETIC = re.compile(r"[\s\d.,+\-*/()^%$]*\d[\s\d.,+\-*/()^%$]*")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z{}])")
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
    if "\\\\" in text and "\\begin" not in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    return text


def has_ambiguous_commas(text: str) -> bool:
    """Tell whether `1,234` occurs, which may be one number or a list of two."""
    return _AMBIGUOUS.search(text) is not None


def with_decimal_point(text: str) -> str | None:
    """Return `3,14` as `3.14` if the whole answer is such a number, else None.

    Three digits behind the comma are thousands (unless a 0 stands before it), and one digit is
    more often the second element of a list.
    """
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else None


def tokenize(text: str, *, thousands: bool = True) -> list[Token]:
    """Split a cleaned answer into tokens; the last one is `END`.

    With `thousands` a comma between groups of three digits outside brackets belongs to a number.
    Raises `Unreadable` on a character or command that answers do not have.
    """
    return _Lexer(text, thousands).run()


class _Lexer:
    def __init__(self, text: str, thousands: bool) -> None:
        self.text = text
        self.thousands = thousands
        self.position = 0
        self.nesting = 0
        self.tokens: list[Token] = []
        self.spaced = False

    def run(self) -> list[Token]:
        while self.position < len(self.text):
            self.step()
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable(f"more than {MAX_TOKENS} tokens")
        return [*self.tokens, END]

    def add(self, kind: str, text: str) -> None:
        self.tokens.append(Token(kind, text, self.spaced))
        self.spaced = False

    def take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.position)
        if found is None or found.end() == self.position:
            return None
        self.position = found.end()
        return found.group()

    def step(self) -> None:
        if self.take(_SPACE) is not None:
            self.spaced = True
        elif (number := self.number()) is not None:
            self.add("number", re.sub(r"[^\d.eE+-]", "", number))
        elif (word := self.take(_WORD)) is not None:
            self.word(word)
        elif self.text[self.position] == "\\":
            self.command()
        elif (mark := self.take(_MARK)) is not None:
            self.mark({"**": "^", "==": "="}.get(mark, mark))
        else:
            raise Unreadable(f"unexpected character {self.text[self.position]!r}")

    def number(self) -> str | None:
        if self.thousands and not self.nesting:
            loose = self.take(_LOOSE_NUMBER)
            if loose is not None:
                return loose
        return self.take(_NUMBER)

    def mark(self, mark: str) -> None:
        if mark in ("(", "[", "\\{"):
            self.nesting += 1
        elif mark in (")", "]", "\\}"):
            self.nesting -= 1
        self.add("mark", mark)

    def word(self, word: str) -> None:
        if word.lower() in ("or", "and"):
            self.add("mark", word.lower())
        elif word in _WORD_COMMANDS:
            self.named("surd" if word == "sqrt" else word)
        else:
            self.add("symbol" if len(word) == 1 else "word", word)

    def command(self) -> None:
        found = _COMMAND.match(self.text, self.position)
        if found is None:
            raise Unreadable("ends in a backslash")
        name, self.position = found.group(1), found.end()
        if name.startswith(("quad", "qquad")):  # \\quadx is a slip for \\quad x
            self.position = found.start(1) + name.index("quad") + len("quad")
            name = "quad"
        if name in _TEXTS:
            self.literal(name, self.group())
        elif name == "mathbb":
            self.add("command", f"mathbb {self.group().strip()}")
        elif name in ("begin", "end"):
            self.add("begin" if name == "begin" else "close", self.group().strip().rstrip("*"))
            self.nesting += 1 if name == "begin" else -1
        elif name in _DROPPED:
            self.spaced = self.spaced or name not in ("left", "right", "!")
        elif name in _MARKS:
            self.mark(_MARKS[name])
        else:
            self.named(name)

    def named(self, name: str) -> None:
        name = _COMMANDS.get(name, name)
        self.add("symbol" if name in _GREEK else "command", name)

    def group(self) -> str:
        """Take a balanced `{...}` verbatim, or the next character."""
        self.take(_SPACE)
        if self.position >= len(self.text):
            raise Unreadable("a command lacks its argument")
        if self.text[self.position] != "{":
            self.position += 1
            return self.text[self.position - 1]
        start, level = self.position + 1, 0
        for index in range(self.position, len(self.text)):
            level += {"{": 1, "}": -1}.get(self.text[index], 0)
            if level == 0:
                self.position = index + 1
                return self.text[start:index]
        raise Unreadable("unbalanced braces")

    def literal(self, name: str, content: str) -> None:
        stripped = content.strip()
        if stripped.lower() in ("or", "and"):
            self.add("mark", stripped.lower())
        elif _ARITHMETIC.fullmatch(stripped) or "\\" in stripped:
            self.text = f"{self.text[: self.position]} {stripped} {self.text[self.position :]}"
            if len(self.text) > 3 * MAX_CHARACTERS:
                raise Unreadable("nested text commands")
        elif name in _LETTER_STYLES and len(stripped) == 1 and stripped.isalpha():
            self.add("symbol", stripped)
        elif stripped in FUNCTIONS:
            self.named(stripped)
        elif stripped:
            self.add("text", stripped)
