"""What an evaluation is: its settings, and the digests by which a continued one is recognised."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eapo_fast.errors import ConfigError, suggest

METHODS: dict[str, str] = {
    "base": "Base model",
    "workflow": "Expert-assisted workflow",
    "distillation": "Distillation",
    "self-exploratory": "Self-exploratory RL",
    "eapo": "EAPO",
}
"""The paper's comparison rows. Only the workflow consults at evaluation; the others differ in how
the model was made and are all measured alone."""

_ROWS_AT_ONCE = 512
_AT_LEAST = {"n": 1, "max_tokens": 1, "chunk": 1, "limit": 1, "max_turns": 2, "max_queries": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """How a model is measured; the defaults are the paper's protocol as LeaP gives it (32 samples,
    temperature 0.6, top-p 0.95, 16 k tokens)."""

    method: str | None = None
    """Row of the paper's table (a key of `METHODS`), for the title and `eapo-fast table`."""
    n: int = 32
    """Samples per problem."""
    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus; 1 is off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    max_tokens: int = 16384
    """Most policy tokens of a sample; the model's context ends it earlier."""
    seed: int = 0
    """Seed of every draw, the bootstrap's too."""
    limit: int | None = None
    """First rows of the data only; None: all."""
    chunk: int | None = None
    """Problems sampled together, which is what an interruption can lose; None: 512 samples' worth.
    """
    system_prompt: str | None = None
    """System text before every problem."""
    consult_prompt: str | None = None
    """How to consult, shown in assisted evaluation; None: the protocol's text; "" shows nothing."""
    max_turns: int = 10
    """Turns of an assisted sample: one more than the consult blocks it may write."""
    max_queries: int = 3
    """Queries of one consult block."""
    expert_timeout: float = 60.0
    """Seconds after which an unanswered consult gets the notice."""

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: got {value}, allowed is {least} or more")
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(
                f"method: got {self.method!r}, allowed is one of {', '.join(METHODS)}."
                f"{suggest(self.method, METHODS)}"
            )

    @property
    def problems_at_once(self) -> int:
        """Problems of one chunk. It depends on settings alone, never on where a run stopped, so a
        continued evaluation has the same batches, and with them the same roundings."""
        return self.chunk or -(-_ROWS_AT_ONCE // self.n)

    def title(self, *, assisted: bool) -> str:
        """Return the name of the row that these settings measure."""
        return METHODS[self.method] if self.method else ("Assisted" if assisted else "Solo")


def check_mode(settings: EvalSettings, *, assisted: bool) -> None:
    """Raise ConfigError when the method and the presence of an expert contradict each other."""
    if settings.method == "workflow" and not assisted:
        raise ConfigError("method workflow consults an expert: give one (--assisted --expert ...)")
    if assisted and settings.method not in (None, "workflow"):
        raise ConfigError(
            f"method {settings.method} is measured without an expert; only workflow is assisted"
        )


def identity(
    settings: EvalSettings,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    asked: Any,
) -> dict[str, Any]:
    """Return everything that decides the result, as JSON values with digests for the large parts.

    Args:
        model: the loaded policy; its parameters are digested, so it may come from anywhere.
        rows: the problems that are evaluated.
        asked: prompts as token ids, tags and the expert's name, in any JSON-able form.
    """
    config = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("chunk", "limit")}
    return config | {
        "chunk": settings.problems_at_once,
        "problems": len(rows),
        "model": model_digest(model, tokenizer),
        "data": json_digest(rows),
        "prompts and expert": json_digest(asked),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what is not the same; [] if nothing changed."""
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old != new:
            digest = name in ("model", "data", "prompts and expert")
            lines.append(f"{name} changed" if digest else f"{name} was {old!r} and is {new!r}")
    return lines


def model_name(path: str) -> str:
    """Return the last part of a model's path; of `runs/x/final` it is `x`."""
    place = Path(path or "model")
    return place.parent.name if place.name == "final" and place.parent.name else place.name


def model_digest(model: Any, tokenizer: Any) -> str:
    """Return a digest of parameters, buffers, tokenizer and end tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        if plain.numel():
            digest.update(memoryview(plain.view(-1).view(torch.uint8).numpy()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = [
        model.config.to_json_string(use_diff=False) if hasattr(model, "config") else "",
        str(getattr(getattr(model, "generation_config", None), "eos_token_id", None)),
        backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items())),
    ]
    digest.update("\0".join(words).encode())
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """Return a digest of a JSON-able value (other leaves by their text)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
