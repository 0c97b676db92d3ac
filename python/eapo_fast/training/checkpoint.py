"""Checkpoints: weights in the transformers layout, optimizer in safetensors, the rest in JSON.

A checkpoint is written into a hidden folder and renamed when it is complete, so a folder called
`checkpoint-<step>` is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eapo_fast.errors import ConfigError
from eapo_fast.training.quiet import without_progress_bars

_PREFIX = "checkpoint-"
_OPTIMIZER = "optimizer.safetensors"
_TRAINABLE = "trainable.safetensors"
_STATE = "trainer_state.json"


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest `keep`; returns its folder.

    `optimizer=None` writes a checkpoint that holds the model only.
    """
    final = output_dir / f"{_PREFIX}{step}"
    partial = output_dir / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, tokenizer, partial)
    if optimizer is not None:
        save_file(_optimizer_tensors(model, optimizer), partial / _OPTIMIZER)
        if hasattr(model, "peft_config"):
            save_file(_trainable(model), partial / _TRAINABLE)
    (partial / _STATE).write_text(json.dumps(state, indent=1))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(output_dir)
    for old in checkpoints(output_dir)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return final


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer in the transformers layout."""
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob(f"{_PREFIX}*") if (p / _STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def resolve_checkpoint(output_dir: Path, choice: bool | str | Path) -> Path:
    """Return the checkpoint to resume from: True is the newest of the run.

    Raises:
        ConfigError: there is none, or it cannot be resumed.
    """
    if choice is True:
        found = checkpoints(output_dir)
        if not found:
            raise ConfigError(f"resume_from_checkpoint: no {_PREFIX}<step> in {output_dir}")
        path = found[-1]
    else:
        path = Path(str(choice))
    for name in (_STATE, _OPTIMIZER):
        if not (path / name).is_file():
            raise ConfigError(
                f"resume_from_checkpoint: {path} has no {name}, so it is not a resumable "
                f"checkpoint (save_only_model writes none)"
            )
    return path


def load_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights and optimizer state back in place; returns the saved state."""
    if (path / _TRAINABLE).is_file():
        saved = load_file(path / _TRAINABLE)
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                parameter.copy_(saved[name])
    else:
        with without_progress_bars():
            stored = type(model).from_pretrained(path, dtype=model.dtype)
        model.load_state_dict(stored.state_dict())
    _restore_optimizer(model, optimizer, load_file(path / _OPTIMIZER))
    state: dict[str, Any] = json.loads((path / _STATE).read_text())
    return state


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.data for n, p in model.named_parameters() if p.requires_grad}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
    return {
        f"{names[p]}:{key}": torch.as_tensor(value).detach().clone().contiguous()
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(":", 1)
        parameter = parameters[name]
        device = tensor.device if key == "step" and tensor.ndim == 0 else parameter.device
        if key == "step" and parameter.is_cuda and optimizer.defaults.get("fused"):
            device = parameter.device
        optimizer.state[parameter][key] = tensor.to(device)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
