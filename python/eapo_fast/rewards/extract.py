"""Find the final answer in a text, in time linear in its length."""

from __future__ import annotations

import re
from collections.abc import Callable

from eapo_fast.errors import ConfigError, suggest
from eapo_fast.rewards.cleaning import split_choice
from eapo_fast.rewards.grammar import parse
from eapo_fast.rewards.limits import MAX_CHARACTERS
from eapo_fast.rewards.tree import Text, Unreadable

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BOXES_TRIED = 16
_JOINT_LENGTH = 80
_GAP = r"(?:[\s$~]|\\[,;: ()\[\]]|\\q?quad)*"
_JOINT = re.compile(rf"{_GAP}(?:,|,?\s*and\b|\\text\{{\s*,?\s*and\s*\}}){_GAP}")
_TAIL = 4096
"""Characters at the end of a text in which a last expression is looked for."""
_LONG_GOLD = 200
"""Characters beyond which a reference is a worked solution."""
_MARK = re.compile(r"####[ \t]*([^\n]*)")
_ANSWER_IS = re.compile(
    r"\b(?:answers?|ans)\b[ \t*_]*(?:(?:is|are)\b|:|=)[ \t:*_]*"
    r"(?:(?:therefore|thus|hence|then|simply|exactly|given by|as follows)\b[ \t:*_]*)?"
    r"(?:\n\s{0,16})?(?=\S)",
    re.IGNORECASE,
)
_AND_MATH = re.compile(r"\s{0,4}(?:,|,?\s{0,4}and\b|(or)\b)\s{0,4}(?=[$\\])")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_MATH = re.compile(
    r"(?<!\\)\$\$([^$]+)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+)\$|\\\(([^$]+?)\\\)|\\\[([^$]+?)\\\]"
)
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-\s?)?(?:\\?\$)?(?<![\w.])(?:\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?\d+)?(?:\\?%)?"
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])(?![A-Z]{2,4}(?![A-Za-z]))[A-Za-z]{2,}(?![A-Za-z}(])")


def boxed(text: str) -> str | None:
    """Return the content of the last complete `\\boxed{...}` (or `\\fbox`), nested braces kept.

    Boxes joined by nothing but "and" or a comma are one answer: their contents form a list.
    """
    contents: list[str] = []
    end = after = len(text)
    for _ in range(_BOXES_TRIED):
        end = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if end < 0:
            break
        box = _box_at(text, end)
        if box is None:
            continue
        content, closed = box
        if contents and (
            closed > after or not _JOINT.fullmatch(text[closed:after][:_JOINT_LENGTH])
        ):
            break
        contents.insert(0, content)
        after = end
    return ", ".join(contents) if contents else None


def _box_at(text: str, start: int) -> tuple[str, int] | None:
    """Return the content of the box that starts here and where it ends."""
    found = _BOX.match(text, start)
    if found is None or found.end() >= len(text):
        return None
    if text[found.end()] != "{":
        bare = re.match(r"\s?(-?[\w.]+)", text[found.end() : found.end() + 64])
        return (bare.group(1), found.end() + bare.end()) if bare else None
    level, index = 0, found.end()
    last = min(len(text), index + MAX_CHARACTERS + 2)
    while index < last:
        character = text[index]
        if character == "\\":
            index += 1
        elif character == "{":
            level += 1
        elif character == "}":
            level -= 1
            if level == 0:
                return text[found.end() + 1 : index], index + 1
        index += 1
    return None


def boxes_of_last_line(text: str) -> list[str]:
    """Return the contents of all boxes of the last line that has one, in order."""
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return []
    stop = text.find("\n", last)
    start = max(text.rfind("\n", 0, last) + 1, last - _TAIL)
    line = text[start : stop if stop >= 0 else len(text)]
    contents: list[str] = []
    position = 0
    while (found := _BOX.search(line, position)) and len(contents) < _BOXES_TRIED:
        box = _box_at(line, found.start())
        position = box[1] if box else found.end()
        contents += [box[0]] if box else []
    return contents


def after_mark(text: str) -> str | None:
    """Return the rest of the line behind the last `####` that is followed by something."""
    start = len(text)
    for _ in range(_BOXES_TRIED):
        start = text.rfind("####", 0, start)
        if start < 0:
            return None
        found = _MARK.match(text, start)
        if found is not None and found.group(1).strip("# \t\r"):
            return found.group(1).strip("# \t\r")
    return None


def after_answer_is(text: str) -> str | None:
    """Return what the last "answer is" (or "Answer:") announces, to the end of the sentence."""
    tail = text[-_TAIL:]
    found = None
    for found in _ANSWER_IS.finditer(tail):  # noqa: B007
        pass
    if found is None:
        return None
    rest = tail[found.end() :]
    math = _MATH.match(rest)
    if math is not None:
        return _formulas(rest, math)
    end = _SENTENCE_END.search(rest)
    sentence = rest[: end.start()] if end else rest
    sentence = sentence.strip().strip("*").strip()
    if not sentence or split_choice(sentence) or _is_answer(sentence):
        return sentence or None
    return (
        first_expression(sentence.rpartition(" is ")[2]) or first_expression(sentence) or sentence
    )


def _formulas(text: str, first: re.Match[str]) -> str:
    """Return a formula, or a list of formulas joined by "and" or commas; `x=1` or `x=2` too."""
    found: re.Match[str] | None = first
    contents: list[str] = []
    while found is not None and len(contents) < _BOXES_TRIED:
        contents.append(next(group for group in found.groups() if group is not None))
        joint = _AND_MATH.match(text, found.end())
        if joint is None:
            break
        found = _MATH.match(text, joint.end())
        if joint.group(1) and not (found and "=" in contents[-1] and "=" in found.group()):
            break
    return ", ".join(contents)


def first_expression(text: str) -> str | None:
    """Return the first formula or number of a sentence."""
    math = _MATH.search(text)
    if math is not None:
        return next(group for group in math.groups() if group is not None)
    number = _LAST_NUMBER.search(text)
    return number.group() if number else None


def last_expression(text: str) -> str | None:
    """Return the last formula between math delimiters or the last number, whichever is later."""
    tail = text[-_TAIL:]
    best, best_end = None, -1
    for found in _MATH.finditer(tail):
        content = next(group for group in found.groups() if group is not None)
        if _is_answer(content):
            best, best_end = content, found.end()
    for found in _LAST_NUMBER.finditer(tail):
        if found.end() > best_end:
            best, best_end = found.group(), found.end()
    return best.strip() if best else None


def whole(text: str) -> str | None:
    """Return the text itself if it reads as an answer and not as prose."""
    return text.strip() if len(text) <= _TAIL and _is_answer(text) else None


def _is_answer(text: str) -> bool:
    """Tell a short readable answer from prose that happens to parse."""
    if len(text) > 512:
        return False
    try:
        tree = parse(text)
    except Unreadable:
        return False
    if isinstance(tree, Text):
        return len(tree.text.split()) <= 4 or text.strip(" $").startswith("\\text")
    return len(_PROSE.findall(text)) <= 1


METHODS: dict[str, tuple[Callable[[str], str | None], ...]] = {
    "auto": (boxed, after_mark, after_answer_is, whole, last_expression),
    "boxed": (boxed,),
    "hash": (after_mark,),
    "answer_is": (after_answer_is,),
    "last": (last_expression,),
    "none": (str.strip,),
}
"""Ways to find an answer: each tries its functions in order."""


def extract_answer(text: str, method: str = "auto") -> str | None:
    """Return the final answer of a text, or None.

    Args:
        text: A completion; only its end decides.
        method: `auto` (last box, else `####`, else "answer is", else the whole text if it reads
            as an answer, else the last expression), or one of them: `boxed`, `hash`, `answer_is`,
            `last`, `none` (the whole text as it is).

    Raises:
        ConfigError: Unknown method.
    """
    if method not in METHODS:
        raise ConfigError(
            f"extract: got {method!r}, allowed is one of {', '.join(METHODS)}."
            f"{suggest(method, METHODS)}"
        )
    for find in METHODS[method]:
        answer = find(text)
        if answer:
            return answer
    return None


def extract_gold(text: str) -> str | None:
    """Return the reference answer: its last box, else what follows `####`, else all of it.

    Of a long text without either it is what "the answer is" announces.
    """
    answer = boxed(text) or after_mark(text)
    if not answer and len(text) > _LONG_GOLD:
        answer = after_answer_is(text)
    return answer or text.strip() or None
