"""What a caller says to the sampler and what it gets back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eapo_fast.errors import ConfigError

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """Shape of the engine; none of it changes what is sampled."""

    block_size: int = 16
    """Tokens of one KV block."""
    num_blocks: int | None = None
    """Blocks of the KV pool; None: enough for the work at hand, within a share of free memory."""
    max_batch: int = 256
    """Rows decoded at once; parked rows don't count."""
    max_prefill_tokens: int = 2048
    """Prompt and injected tokens that may join the decode rows in one step."""
    prefix_cache: bool = True
    """Reuse the KV of prompts and turns that begin alike, as long as the weights stay."""
    host_blocks: int | None = None
    """Blocks in host memory for the KV of parked rows that the pool has no room for; None: as many
    as the pool has on a GPU, within a quarter of free memory, and none on a CPU."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs, on a GPU and where the model can be captured."""
    fused_modules: bool = True
    """On a CPU run normalisation and gated activations of known module classes fused."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_batch", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed is 1 or more")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ConfigError(f"num_blocks: got {self.num_blocks}, allowed is 2 or more, or None")
        if self.host_blocks is not None and self.host_blocks < 0:
            raise ConfigError(f"host_blocks: got {self.host_blocks}, allowed is 0 or more, or None")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; `stop` strings and `banned_strings` need a tokenizer."""

    max_tokens: int
    """Most tokens sampled per completion."""
    temperature: float = 1.0
    """0 is greedy."""
    temperature_schedule: Sequence[float] = ()
    """Temperature of the first, second, ... sampled token; the last holds for the rest. Empty:
    `temperature` throughout."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this mass; 1 is off."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the top probability; 0 is off."""
    n: int = 1
    """Completions per prompt."""
    seed: int = 0
    """Part of the key of every draw."""
    stop: Sequence[str] = ()
    """Strings that end a completion (kept in it)."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end a completion, beside the model's EOS ids."""
    banned_token_ids: Sequence[int] = ()
    """Tokens that are never sampled."""
    banned_strings: Sequence[str] = ()
    """Strings that are never completed: the token that would complete one is banned."""

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", _is_temperature(self.temperature), "0 (greedy) or more, finite"),
            (
                "temperature_schedule",
                all(map(_is_temperature, self.temperature_schedule)),
                "temperatures of 0 (greedy) or more, finite",
            ),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, up to 1"),
            ("min_p", 0.0 <= self.min_p < 1.0, "0 (off) up to below 1"),
            ("n", self.n >= 1, "1 or more"),
        )
        for name, good, allowed in checks:
            if not good:
                raise ConfigError(f"{name}: got {getattr(self, name)}, allowed is {allowed}")


def _is_temperature(value: float) -> bool:
    return math.isfinite(value) and value >= 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion."""

    token_ids: list[int]
    """Sampled tokens; a stop token is the last of them."""
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from, in nats."""
    kept_mass: list[float]
    """Probability mass that truncation kept at each token; 1.0 without truncation."""
    finish_reason: FinishReason
    """stop: EOS, stop token or stop string; length: max_tokens or the context limit; error: the
    model's next logits were not finite (or every token was banned), what came before is kept."""
