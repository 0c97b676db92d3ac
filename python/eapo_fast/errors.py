"""The failure model, in four sentences.

1. A bad configuration, data set or model is an error before step 1; it names field and remedy.
2. A bad rollout, reply or reward is data (a status, a notice, a metric), never an exception.
3. Numbers that are not finite stop the update, not the run: weights stay as they were.
4. What reaches the user is one of the classes below; anything else is a bug in eapo_fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EapoError(Exception):
    """Base class of every error that eapo_fast raises on purpose."""


class ConfigError(EapoError, ValueError):
    """A setting cannot work: the message names the field, what was got and what is allowed."""


class DataError(EapoError, ValueError):
    """A data set or a row of it cannot be used."""


class ModelError(EapoError, ValueError):
    """A model or tokenizer cannot be used."""


class NonFiniteError(EapoError, ValueError):
    """A loss is no number: logits of a token or other inputs hold a NaN or an infinity."""


class ExpertError(EapoError, RuntimeError):
    """An expert failed; inside the consult scheduler this becomes a status, not an exception."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest allowed name, or `""` if none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
