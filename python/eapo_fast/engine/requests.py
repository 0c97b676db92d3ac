"""What callers hand to the sampler, made plain: lists of token ids, parameters of every prompt."""

from __future__ import annotations

from collections.abc import Sequence

from eapo_fast.engine.params import SamplingParams, token_list
from eapo_fast.errors import ConfigError


def params_of_each(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> list[SamplingParams]:
    """Return the parameters of every prompt."""
    each = [params] * count if isinstance(params, SamplingParams) else list(params or ())
    for one in each:
        if not isinstance(one, SamplingParams):
            raise ConfigError(f"params: got {one!r:.80}, allowed is SamplingParams or a list of it")
    return each


def prompt_lists(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts (also arrays and tensors) as lists of integers."""
    lists: list[list[int]] = []
    for place, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__iter__"):
            raise ConfigError(
                f"prompt {place}: got {prompt!r:.80}, want a list of token ids for each prompt"
            )
        plain = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        lists.append(list(token_list(f"prompt {place}", plain)))
    return lists


def check_ids(name: str, ids: Sequence[int], vocabulary: int) -> None:
    """Raise `ConfigError` unless every id is below the size of the vocabulary."""
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = next(i for i in ids if not 0 <= i < vocabulary)
        raise ConfigError(f"{name}: got token {wrong}, the model has tokens 0 to {vocabulary - 1}")


def check_prompts(prompts: Sequence[Sequence[int]], context: int, vocabulary: int) -> None:
    """Raise `ConfigError` for a prompt that is empty, fills the context, or has unknown tokens."""
    for place, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ConfigError(
                f"prompt {place}: {len(prompt)} tokens, allowed are 1 to {context - 1} "
                f"(the model's context is {context})"
            )
        check_ids(f"prompt {place}", prompt, vocabulary)
