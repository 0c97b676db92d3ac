"""From answer text (LaTeX, plain or mixed) to tokens.

Formatting that does not change the meaning (`\\left`, `\\,`, `$`, `\\displaystyle`, ...) is dropped
here, spellings are unified (`\\dfrac` and `\\tfrac` are `frac`, a Unicode root is `sqrt`).
"""

from __future__ import annotations

import re
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
    "textstyle scriptstyle limits angle triangle vec overrightarrow hat widehat quad "
    "qquad boxed fbox thinspace hfill nonumber underline tiny small normalsize large Large LARGE "
    "huge Huge rm bf it sf tt "
    ", ; : ! ( ) [ ] $ > - / &"
) | {" ", "\n", "\t"}
_MARKS = {
    "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "ne": "!=", "neq": "!=", "lt": "<", "gt": ">", "cdot": "*", "times": "*", "ast": "*",
    "div": "/", "pm": "+-", "mp": "-+", "in": "in", "cup": "cup", "bigcup": "cup",
    "circ": "deg", "degree": "deg",
    "%": "%", "{": "\\{", "}": "\\}", "lbrace": "\\{", "rbrace": "\\}", "langle": "(",
    "rangle": ")", "lvert": "|", "rvert": "|", "vert": "|", "colon": ":", "approx": "approx",
    "\\": "\\\\", "_": "_", "land": "and", "lor": "or", "lbrack": "[", "rbrack": "]",
    "to": "to", "rightarrow": "to", "mid": "|", "prime": "'", "setminus": "setminus",
    "backslash": "setminus", "cap": "cap", "bigcap": "cap",
}  # fmt: skip
_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "infty": "inf", "infinity": "inf",
    "oo": "inf", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "varnothing": "emptyset",
    "tg": "tan", "ctg": "cot", "cosec": "csc", "dbinom": "binom", "tbinom": "binom",
    "dots": "ldots", "cdots": "ldots", "bar": "overline",
}  # fmt: skip
_WORD_COMMANDS = (
    FUNCTIONS | _GREEK | {"pi", "inf", "infty", "infinity", "oo", "asin", "acos", "atan"}
)
_TEXTS = _names(
    "text textnormal textbf textit textrm textsf texttt mbox hbox mathrm mathbf mathit mathsf emph "
    "operatorname boldsymbol bm"
)
_WITH_ARGUMENT = _names("color textcolor phantom hphantom vphantom hspace vspace label tag")
"""Commands that are dropped with their argument."""
_LETTER_STYLES = _names("mathrm mathbf mathit boldsymbol bm")
_GROUPED = r"[1-9]\d{0,2}(?:(?:\s?\{\s?,\s?\}|,\\!\s?|\\,|\\!\s?,)\d{3})+(?!\d)"
_THOUSANDS = r"[1-9]\d{0,2}(?:(?:,\d{3})+(?![\d,])|(?: \d{3})+(?!\d|\s?/))"
_DIGITS = r"(?:\d+\.\d*|\.\d+|\d+)"
_NUMBER = re.compile(rf"(?:{_GROUPED}(?:\.\d+)?|{_DIGITS}(?:[eE][+-]?\d{{1,6}}(?![\w.]))?)")
_LOOSE_NUMBER = re.compile(rf"(?:{_GROUPED}|{_THOUSANDS})(?:\.\d+)?")
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar)\s*\{(\d{1,40})\}|\\dot\s*\{?(\d)\}?"
    r"(?:(\d*)\\dot\s*\{?(\d)\}?)?"
    r"|\((\d{1,40})\)(?![\w(^!.]))"
)
_NUMERAL = re.compile(
    r"(?:(?=[A-Z]*\d)[0-9A-Z]{1,64}(?=_\{?(?:1[1-9]|2\d|3[0-6])(?!\d))"
    r"|[A-F]{2,64}(?=_\{?16(?!\d)))"
)
"""Digits of a base above ten, which is written behind them."""
_CHOICES = re.compile(r"\(?[A-J]\)?(?:\s*,\s*(?:and\s+)?\(?[A-J]\)?)+")
_MEASURE = re.compile(r"[-+]?[\d.,]*\d\s*[A-Za-z]+")
_FUNCTIONS_OR_UNITS = ("min", "sec")
_ARGUMENT = re.compile(r"\s*[\w({\\^]")
_SPACE = re.compile(r"\s+|~|\$")
_WORD = re.compile(r"[A-Za-z]+")
_COMMAND = re.compile(r"\\([A-Za-z]+|[\s\S])\*?")
_MARK = re.compile(r"\*\*|<=|>=|!=|==|!!|[-+*/^_=<>()\[\]{}|,;:!%&']")
_NOT_OF_NUMBERS = re.compile(r"[^\d.eE+-]")
_ARITHMETIC = re.compile(r"[\s\d.,+\-*/()^%$]*\d[\s\d.,+\-*/()^%$]*")


def tokenize(text: str, *, thousands: bool = True) -> list[Token]:
    """Split a cleaned answer into tokens; the last one is `END`.

    With `thousands` a comma between groups of three digits outside brackets belongs to a number.
    Raises `Unreadable` on a character or command that answers do not have.
    """
    return _Lexer(text, thousands).run()


def _is_formula(text: str) -> bool:
    """Tell whether the argument of a text command is no text: numbers, letters of choices."""
    patterns = (_ARITHMETIC, _CHOICES, _MEASURE)
    return "\\" in text or any(pattern.fullmatch(text) for pattern in patterns)


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
            self.add("number", number)
        elif (word := self.take(_WORD)) is not None:
            self.word(word)
        elif self.text[self.position] == "\\":
            self.command()
        elif (mark := self.take(_MARK)) is not None:
            self.mark({"**": "^", "==": "="}.get(mark, mark))
        else:
            raise Unreadable(f"unexpected character {self.text[self.position]!r}")

    def number(self) -> str | None:
        """Take a literal; a repeating decimal is spelt `0.1r6`."""
        if (found := _REPEATING.match(self.text, self.position)) is not None:
            self.position = found.end()
            whole, part, *repeated = found.groups()
            return f"{whole}.{part}r{''.join(filter(None, repeated))}"
        if "_" in self.text and (numeral := self.take(_NUMERAL)) is not None:
            return numeral
        number = self.plain_number()
        return None if number is None else _NOT_OF_NUMBERS.sub("", number)

    def plain_number(self) -> str | None:
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
        elif word in _FUNCTIONS_OR_UNITS and not _ARGUMENT.match(self.text, self.position):
            self.add("word", word)
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
        elif name in _WITH_ARGUMENT:
            self.group()
            self.spaced = True
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
        elif _is_formula(stripped):
            self.text = f"{self.text[: self.position]} {stripped} {self.text[self.position :]}"
            if len(self.text) > 3 * MAX_CHARACTERS:
                raise Unreadable("nested text commands")
        elif name in _LETTER_STYLES and len(stripped) == 1 and stripped.isalpha():
            self.add("symbol", stripped)
        elif stripped in FUNCTIONS or stripped.lower() == "infinity":
            self.named(stripped.lower())
        elif stripped:
            self.add("text", stripped)
