"""Checks of a recipe's fields, and how parts of recipes are copied and read."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from eapo_fast.errors import ConfigError, suggest


class Data:
    """A frozen dataclass of plain values and other such classes, to a mapping and back."""

    __slots__ = ()
    kind: ClassVar[str] = "a recipe"
    """What error messages call it."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again; unknown: `ConfigError`."""
        return type(self).from_dict(self.to_dict() | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every field by name, parts as mappings."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build from a mapping. Raises `ConfigError` for an unknown field or a bad value."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{cls.kind}: got {fields!r}, allowed is a mapping of fields")
        known = dataclasses.fields(cls)  # type: ignore[arg-type]
        names = [f.name for f in known]
        for unknown in [f for f in fields if f not in names]:
            hint = suggest(str(unknown), names)
            raise ConfigError(f"{cls.kind} has no field {unknown!r}.{hint}")
        for field in known:
            if field.name not in fields and field.default is dataclasses.MISSING:
                raise ConfigError(f"{field.name}: missing; {cls.kind} needs it")
        return cls(**fields)


def check_choice(field: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`, in type too."""
    if any(value == a and type(value) is type(a) for a in allowed):
        return
    words = ", ".join(repr(a) for a in allowed)
    hint = suggest(str(value), [a for a in allowed if isinstance(a, str)])
    raise ConfigError(f"{field}: got {value!r}, allowed is one of {words}.{hint}")


def check_number(
    field: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
) -> None:
    """Raise `ConfigError` unless `value` is finite, in [minimum, maximum] and more than `above`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = number and abs(value) <= sys.float_info.max
    if finite and minimum <= value <= maximum and value > above:
        return
    limits = " and ".join(
        f"{word} {limit:g}"
        for word, limit in (("of at least", minimum), ("above", above), ("of at most", maximum))
        if math.isfinite(limit)
    )
    raise ConfigError(f"{field}: got {value!r}, allowed is a finite number {limits}".rstrip())


def check_count(field: str, value: Any, *, minimum: int = 1) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return
    raise ConfigError(f"{field}: got {value!r}, allowed is an integer of at least {minimum}")
