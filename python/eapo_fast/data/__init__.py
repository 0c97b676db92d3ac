"""Training data: read and check rows, order prompts, turn them into token ids."""

from __future__ import annotations

from eapo_fast.data.encoding import drop_long_prompts, encode_prompts
from eapo_fast.data.rows import check_golds, load_dataset, require_column
from eapo_fast.data.sampling import PromptSampler

__all__ = [
    "PromptSampler",
    "check_golds",
    "drop_long_prompts",
    "encode_prompts",
    "load_dataset",
    "require_column",
]
