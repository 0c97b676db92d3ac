"""The embedded default: problems, policy and settings of `make demo`."""

from __future__ import annotations

from pathlib import Path

POLICY = Path(__file__).parent / "policy"
"""The checkpoint that `python -m eapo_fast.demo.warm_start` makes, in the transformers layout."""
