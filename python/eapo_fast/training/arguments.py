"""What the trainer makes of its arguments before anything is built."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from eapo_fast.config import EAPOConfig
from eapo_fast.data import check_golds, load_dataset, require_column
from eapo_fast.engine import SamplingParams
from eapo_fast.errors import ConfigError

_GOLDS_SHOWN = 50
_GRADED = ("accuracy", "exact", "paper_f1")


def eval_params(args: EAPOConfig, tokenizer: Any) -> SamplingParams:
    """Return how evaluation samples; eapo's defaults are LeaP's (spec 12)."""
    eapo = args.recipe_name == "eapo"
    temperature = 0.6 if eapo else args.temperature
    top_p = 0.95 if eapo else args.top_p
    return SamplingParams(
        max_tokens=args.eval_max_completion_length or args.max_completion_length,
        temperature=temperature if args.eval_temperature is None else args.eval_temperature,
        top_p=top_p if args.eval_top_p is None else args.eval_top_p,
        n=args.num_generations_eval,
        seed=args.seed,
        stop_token_ids=(tokenizer.eos_token_id,),
    )


def check_unsupported(reward_processing_classes: Any, optimizers: tuple[Any, Any]) -> None:
    if reward_processing_classes is not None:
        raise ConfigError(
            "reward_processing_classes: models as rewards are not supported; pass None"
        )
    if any(o is not None for o in optimizers):
        raise ConfigError(
            "optimizers: only (None, None) is accepted; learning_rate, optim and lr_scheduler_type "
            "of EAPOConfig choose the optimizer"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "WORLD_SIZE is above 1, but one process trains the whole model; start one"
        )


def reward_list(functions: Any) -> list[Any]:
    if functions is None:
        return ["exact"]
    listed = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if not listed:
        raise ConfigError("reward_funcs: the list is empty; None means rewards.exact")
    return listed


def load_rows(dataset: Any, name: str, functions: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Load and check a data set: gold answers are needed by the stock rewards that grade."""
    if dataset is None:
        return None
    rows = load_dataset(dataset, name=name)
    graded = [name for f in functions if (name := _stock_name(f)) in _GRADED]
    if graded:
        require_column(rows, "answer", needed_by=graded[0])
        _warn_about_golds(check_golds(rows), name)
    return rows


def _stock_name(function: Any) -> str:
    """Return the name of one of our own reward functions; "" for a user's."""
    if isinstance(function, str):
        return function
    ours = str(getattr(function, "__module__", "")).startswith("eapo_fast.rewards")
    return str(getattr(function, "__name__", "")) if ours else ""


def _warn_about_golds(problems: Sequence[str], name: str) -> None:
    """List references that no answer can be compared with; their rows earn nothing."""
    if problems:
        listed = "\n  ".join(problems[:_GOLDS_SHOWN])
        more = f"\n  and {len(problems) - _GOLDS_SHOWN} more" * (len(problems) > _GOLDS_SHOWN)
        warnings.warn(
            f"{name}: {len(problems)} unreadable answers:\n  {listed}{more}", stacklevel=4
        )


def for_device(args: EAPOConfig, device: torch.device) -> EAPOConfig:
    """Fill in the settings that depend on the device."""
    gpu = device.type == "cuda"
    bf16 = gpu and torch.cuda.is_bf16_supported() if args.bf16 is None else args.bf16
    tokens = args.micro_batch_tokens or (16384 if gpu else 4096)
    return args.replace(bf16=bf16, micro_batch_tokens=tokens)


def seed_everything(args: EAPOConfig) -> None:
    torch.manual_seed(args.seed)
    if args.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
