"""Units that answers carry: stripped for the value, compared only when both sides have one."""

from __future__ import annotations

import re

_DIMENSIONS: dict[str, dict[str, str]] = {
    "length": {
        "cm": "centimeter centimetre",
        "mm": "millimeter millimetre",
        "km": "kilometer kilometre",
        "m": "meter metre",
        "in": "inch inches",
        "ft": "foot feet",
        "yd": "yard",
        "mi": "mile",
    },
    "mass": {"g": "gram", "kg": "kilogram", "mg": "milligram", "lb": "pound", "oz": "ounce"},
    "volume": {"l": "liter litre", "ml": "milliliter millilitre", "gal": "gallon"},
    "time": {
        "s": "second sec",
        "min": "minute",
        "h": "hour hr",
        "day": "",
        "week": "",
        "month": "",
        "year": "yr",
    },
    "angle": {"degree": "deg", "rad": "radian"},
    "money": {"cent": "", "dollar": "usd buck"},
    "speed": {"mph": ""},
    "half of the day": {"am": "", "pm": ""},
    "count": {"unit": ""},
}
_DIMENSION_OF = {unit: kind for kind, units in _DIMENSIONS.items() for unit in units}
_CANONICAL = {
    form: unit
    for units in _DIMENSIONS.values()
    for unit, spellings in units.items()
    for word in (unit, *spellings.split())
    for form in (word, f"{word}s")
}

UNIT_LETTERS = frozenset("mgsLhN")
"""Single letters that are read as a unit when they follow a number and a space."""

PERCENT = frozenset(("percent", "pct"))
"""Words for a per cent sign."""

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
    return bool(words) and all(word in _DIMENSION_OF for word in words)


def dimension(unit: str) -> str:
    """Return what a known canonical unit measures, `cm 2` as `length 2`."""
    return " ".join(_DIMENSION_OF.get(word, word) for word in unit.split())
