"""What a model's configuration says: its context and the rows of its head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from eapo_fast.errors import ModelError

NO_LIMIT = 1 << 20
"""Context of a model that names none, in tokens."""


def context_limit(model: PreTrainedModel) -> int:
    """Return the most tokens of a sequence for which keys once computed stay right.

    That is `max_position_embeddings` (`n_positions` in GPT-2, which has no embedding beyond), with
    three cases of rotary scaling. YaRN reaches `factor` times the original context, whatever
    `max_position_embeddings` says. Dynamic and long-rope frequencies change for *all* positions
    once a sequence outgrows the original context; keys that were rotated before would be wrong, so
    these models end there. Models without a limit get `NO_LIMIT`.
    """
    config = model.config.get_text_config()
    named = (getattr(config, n, None) for n in ("max_position_embeddings", "n_positions"))
    limit = int(next((n for n in named if n and n > 0), NO_LIMIT))
    for rope in _ropes(config):
        kind = rope.get("rope_type") or rope.get("type")
        original = rope.get("original_max_position_embeddings")
        if kind == "yarn" and original and rope.get("factor"):
            limit = max(limit, int(original * rope["factor"]))
        elif kind == "longrope" and original:
            limit = min(limit, int(original))
    return limit


def vocab_size(model: PreTrainedModel) -> int:
    """Return the rows of the LM head; raises `ModelError` for a model without one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ModelError(f"model: {type(model).__name__} has no LM head; load it as a causal LM")
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary settings: one mapping, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return
    nested = [r for r in rope.values() if isinstance(r, Mapping)]
    yield from nested or [rope]
