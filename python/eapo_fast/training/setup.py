"""From what the user passed to a loaded, checked policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eapo_fast.config import EAPOConfig
from eapo_fast.errors import ConfigError, ModelError
from eapo_fast.training.quiet import without_progress_bars

_RUNS = "runs"
"""Folder of runs without a name; a model in it is never one of the hub."""


def load_model(model: str | Path | PreTrainedModel, args: EAPOConfig) -> PreTrainedModel:
    """Return the policy on its device.

    Raises:
        ModelError: `model` is neither a model nor a place that holds one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    given: Any = model if isinstance(model, torch.nn.Module) else _from_path(str(model))
    loaded: PreTrainedModel = given.to(device)
    if args.gradient_checkpointing:
        enable_checkpointing(loaded)
    return loaded


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in backward (transformers renames the switch in version 6)."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable()


def load_tokenizer(processing_class: Any | None, model: PreTrainedModel) -> Any:
    """Return the tokenizer, with a padding token.

    Raises:
        ModelError: none is found beside the model, or it has no EOS token.
    """
    tokenizer = processing_class
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"processing_class: no tokenizer found at {model.name_or_path!r}; pass one"
            ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "processing_class: the tokenizer has no EOS token, so no rollout could ever end; set "
            "tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_adapter(model: PreTrainedModel, peft_config: Any | None, args: EAPOConfig) -> Any:
    """Wrap the model in a PEFT adapter when one is asked for; dropout off as `args` says."""
    wrapped = model if peft_config is None else _adapter(model, peft_config)
    if args.disable_dropout:
        _disable_dropout(wrapped)
    return wrapped


def _adapter(model: PreTrainedModel, peft_config: Any) -> Any:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConfigError("peft_config needs the package peft: pip install peft") from error
    return get_peft_model(model, peft_config)


def output_folder(args: EAPOConfig, model: PreTrainedModel) -> Path:
    """Return the run's folder, made and proven writable.

    Raises:
        ConfigError: it cannot be written.
    """
    name = Path(model.name_or_path or "model").name
    folder = Path(args.output_dir or f"{_RUNS}/{name}-EAPO")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be written ({error.strerror}); choose another folder or "
            f"mend its permissions"
        ) from error
    return folder


def _from_path(path: str) -> PreTrainedModel:
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _with_saved_adapter(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model: {path} has no config.json, so it is not a transformers model directory"
        )
    if folder.is_file() or (folder.parts[:1] == (_RUNS,) and not folder.exists()):
        state = "is a file" if folder.is_file() else "does not exist"
        raise ModelError(f"model: {path} {state}; a transformers model directory is needed")
    try:
        with without_progress_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model: {path!r} is neither a transformers model directory nor a model that the hub "
            f"or its cache gives ({reason})"
        ) from error
    return model


def _with_saved_adapter(folder: Path) -> PreTrainedModel:
    """Load the base model that an adapter names and merge the adapter into it."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelError(f"model: {folder} is an adapter; it needs pip install peft") from error
    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    wrapped: Any = PeftModel.from_pretrained(_from_path(base), str(folder))
    model: PreTrainedModel = wrapped.merge_and_unload()
    if (folder / "tokenizer.json").is_file():
        model.name_or_path = str(folder)
    return model.requires_grad_()


def _disable_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010
