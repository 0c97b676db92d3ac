"""Scalars that follow the training step."""

from __future__ import annotations

import math

from eapo_fast.errors import ConfigError


def phase_weight(epoch: float, total: float = 150) -> float:
    """Return EPO's weight w of the smoothing penalty (arXiv 2509.22576, released code).

    With h = total / 2: `1 - 0.2 (1 - exp(-2 epoch / h))` up to h, and from there on
    `0.8 exp(-3 (epoch - h) / h)`; the two meet at 0.827 and 0.8.

    Raises `ConfigError` unless `epoch` is 0 or more and `total` above 0.
    """
    if not epoch >= 0 or not total > 0:
        raise ConfigError(
            f"phase_weight: got epoch {epoch!r} of {total!r}, allowed is 0 or more of above 0"
        )
    half = total / 2
    if epoch <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * epoch / half))
    return 0.8 * math.exp(-3 * (epoch - half) / half)
