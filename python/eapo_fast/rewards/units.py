"""Units that answers carry: stripped for the value, compared only when both sides have one."""

from __future__ import annotations

import re

_SPELLINGS = {
    "cm": "centimeter centimetre cms",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre kms",
    "m": "meter metre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram gramme",
    "kg": "kilogram kilo kgs",
    "mg": "milligram",
    "lb": "pound lbs",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "gal": "gallon",
    "s": "second sec secs",
    "min": "minute mins",
    "h": "hour hr hrs",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr yrs",
    "degree": "deg",
    "cent": "",
    "dollar": "usd buck",
    "mph": "",
    "unit": "",
}
_CANONICAL = {
    form: unit
    for unit, spellings in _SPELLINGS.items()
    for word in (unit, *spellings.split())
    for form in (word, f"{word}s")
}

UNIT_LETTERS = frozenset("mgsLhN")
"""Single letters that are read as a unit when they follow a number and a space."""

SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
"""Words that multiply the number before them."""

_WORDS = re.compile(r"[a-z]+|\^?\d+|/")
_POWERS = {"square": "2", "squared": "2", "sq": "2", "cubic": "3", "cubed": "3", "cu": "3"}


def canonical_unit(text: str) -> str:
    """Return one spelling for equal units: `square inches`, `inches^2` and `in^2` agree."""
    words = _WORDS.findall(text.lower())
    powers = [_POWERS[word] for word in words if word in _POWERS]
    rest = [_CANONICAL.get(word, word) for word in words if word not in _POWERS]
    rest = ["/" if word == "per" else word.lstrip("^") for word in rest]
    return " ".join(rest + powers)


def is_known(unit: str) -> bool:
    """Tell whether every word of a canonical unit is in the table."""
    words = [word for word in unit.split() if word != "/" and not word.isdigit()]
    return bool(words) and all(word in _SPELLINGS for word in words)
