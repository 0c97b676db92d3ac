"""Every environment variable that eapo_fast reads: typed, documented, and loud when it is wrong.

`python -m eapo_fast.env` prints the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from eapo_fast.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable(Generic[T]):
    """One environment variable; unset or empty means the default."""

    name: str
    """The name in the environment."""
    default: T
    """Value when the variable is unset or empty."""
    parse: Callable[[str], T]
    """Text to value; raises `ValueError` (or `KeyError`) for text that is not allowed."""
    allowed: str
    """What is allowed, in words, for the table and for the error."""
    doc: str
    """What the variable does."""

    def get(self) -> T:
        """The value now; raises `ConfigError` that names the variable and what is allowed."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except (ValueError, KeyError):
            raise ConfigError(
                f"environment variable {self.name}={text!r} is not allowed: "
                f"use {self.allowed}, or unset it"
            ) from None


def _one_of(*names: str) -> Callable[[str], str]:
    table = {name: name for name in names}
    return lambda text: table[text.lower()]


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
        text.lower()
    ]


def _set(text: str) -> bool:
    return text.lower() not in {"0", "false", "no"}


DEBUG = Variable(
    name="EAPO_FAST_DEBUG",
    default=False,
    parse=_flag,
    allowed="0 or 1",
    doc="Show the traceback of an error that the command line would print as one line.",
)
LIVE = Variable(
    name="EAPO_FAST_LIVE",
    default="auto",
    parse=_one_of("auto", "live", "plain", "off"),
    allowed="auto, live, plain or off",
    doc="Progress display: refreshed in place, one line a step, or nothing; auto looks at stdout.",
)
ISA = Variable(
    name="EAPO_FAST_ISA",
    default="auto",
    parse=_one_of("auto", "scalar", "avx2", "avx512", "avx512bf16"),
    allowed="scalar, avx2, avx512 or avx512bf16 (one that this CPU has)",
    doc="Instruction set of the CPU kernels; the native module reads it at the first kernel call.",
)
CUDA_BUILD = Variable(
    name="EAPO_FAST_CUDA",
    default="AUTO",
    parse=lambda text: _one_of("auto", "on", "off")(text).upper(),
    allowed="AUTO, ON or OFF",
    doc="Read by `pip install`: build the CUDA module when nvcc is there, always, or never.",
)
CI = Variable(
    name="CI",
    default=False,
    parse=_set,
    allowed="0 or 1",
    doc="Set by most CI services: progress is printed as plain lines.",
)
TERM = Variable(
    name="TERM",
    default="",
    parse=str,
    allowed="a terminal name",
    doc="`dumb` (or `unknown`): progress is printed as plain lines.",
)

VARIABLES: tuple[Variable[str] | Variable[bool], ...] = (DEBUG, LIVE, ISA, CUDA_BUILD, CI, TERM)
"""All of them, in the order of the table."""


def table() -> str:
    """The variables as a Markdown table."""
    lines = ["| variable | default | allowed | what it does |", "|---|---|---|---|"]
    for variable in VARIABLES:
        value = variable.default
        default = str(int(value)) if isinstance(value, bool) else value or "(unset)"
        lines.append(f"| `{variable.name}` | {default} | {variable.allowed} | {variable.doc} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
