"""What a caller says to the sampler and what it gets back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
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
    """One step takes `max_batch + max_prefill_tokens` tokens at most: decode rows first, then
    injected tokens, then prompts."""
    prefix_cache: bool = True
    """Reuse the KV of prompts and turns that begin alike, as long as the weights stay."""
    host_blocks: int | None = None
    """Blocks in host memory for the KV of parked rows that the pool has no room for; None: as many
    as the pool has on a GPU, within a quarter of free memory, and none on a CPU."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs, on a GPU and where the model can be captured."""
    fused_modules: bool = True
    """Run norms, gated activations and rotary embeddings of known module classes fused; on a GPU
    residual sums too."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_batch", "max_prefill_tokens"):
            if not _is_count(getattr(self, name), 1, _INT32):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, allowed is 1 to {_INT32}")
        for name, least in (("num_blocks", 2), ("host_blocks", 0)):
            given = getattr(self, name)
            if given is not None and not _is_count(given, least, _INT32):
                raise ConfigError(f"{name}: got {given!r}, allowed is {least} to {_INT32}, or None")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; `stop` strings and `banned_strings` need a tokenizer."""

    max_tokens: int
    """Most tokens sampled per completion."""
    temperature: float = 1.0
    """0 is greedy."""
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
    temperature_schedule: Sequence[float] = ()
    """Temperature of the first, second, ... sampled token; the last holds for the rest. Empty:
    `temperature` throughout."""

    def __post_init__(self) -> None:
        for name in ("stop", "banned_strings"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        for name in ("stop_token_ids", "banned_token_ids"):
            object.__setattr__(self, name, token_list(name, getattr(self, name)))
        object.__setattr__(self, "temperature_schedule", _numbers(self.temperature_schedule))
        checks = (
            ("max_tokens", _is_count(self.max_tokens, 1, _INT32), f"1 to {_INT32}"),
            ("temperature", _is_temperature(self.temperature), _TEMPERATURES),
            ("temperature_schedule", all(map(_is_temperature, self.temperature_schedule)),
             f"temperatures of {_TEMPERATURES}"),
            ("top_k", _is_count(self.top_k, 0, _INT32), f"0 (off) to {_INT32}"),
            ("top_p", _is_number(self.top_p) and _LEAST <= self.top_p <= 1.0, "above 0, up to 1"),
            ("min_p", _is_number(self.min_p) and 0.0 <= self.min_p < 1.0, "0 (off) up to below 1"),
            ("n", _is_count(self.n, 1, _INT32), f"1 to {_INT32}"),
            ("seed", _is_count(self.seed, 0, _UINT64), f"an integer from 0 to {_UINT64}"),
        )  # fmt: skip
        for name, good, allowed in checks:
            if not good:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, allowed is {allowed}")


_INT32, _UINT64 = (1 << 31) - 1, (1 << 64) - 1
_LEAST, _MOST = 1.2e-38, 3.4e38
"""Smallest positive (normal) and largest float32: what the kernels compute in."""
_TEMPERATURES = "0 (greedy), or 1.2e-38 to 3.4e38"


def token_list(name: str, ids: Iterable[int]) -> tuple[int, ...]:
    """Return token ids as plain integers; raises `ConfigError` that names the argument."""
    try:
        return tuple(index(i) for i in ids)
    except TypeError:
        raise ConfigError(f"{name}: got {ids!r:.80}, allowed are token ids (integers)") from None


def _strings(name: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """Return distinct strings in their order; a lone string is one of them."""
    strings = (given,) if isinstance(given, str) else tuple(given)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ConfigError(f"{name}: got {string!r}, allowed are strings that are not empty")
    return tuple(dict.fromkeys(strings))


def _numbers(given: Iterable[float]) -> tuple[float, ...]:
    return (given,) if _is_number(given) else tuple(given)  # type: ignore[return-value]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_count(value: object, least: int, most: int) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= value <= most  # type: ignore[operator]


def _is_temperature(value: object) -> bool:
    return _is_number(value) and (value == 0.0 or _LEAST <= value <= _MOST)  # type: ignore[operator]


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
