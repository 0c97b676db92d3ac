"""The loss of a policy-optimization step from given logits."""

from __future__ import annotations

import torch
from torch import Tensor

from eapo_fast.kernels.backend import choose_backend
from eapo_fast.kernels.checks import (
    FLOATS,
    INTEGERS,
    check_positive,
    check_tensor,
    refuse_transforms,
)
from eapo_fast.kernels.linear_token_stats import cuda_rows
from eapo_fast.kernels.logits_policy_loss import cpu, reference
from eapo_fast.kernels.native import GPU_STORAGE, triton_refusal
from eapo_fast.kernels.policy_loss.batch import (
    LossOutput,
    PolicyBatch,
    check_batch,
    check_constants,
)
from eapo_fast.recipes import Recipe

__all__ = ["logits_policy_loss"]


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    batch: PolicyBatch,
    recipe: Recipe,
    *,
    temperature: float = 1.0,
    in_place: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """Return `policy_loss` of the tokens `targets` under `logits`, differentiable in them.

    For models whose logits exist anyway; where the LM head is at hand, `linear_policy_loss` needs
    no room for them. Rows whose mask is 0 may hold anything and get gradient 0.

    Args:
        logits: [N, V] that predict `targets`; float32, float64, bfloat16 or float16. The
            distribution is softmax(logits / temperature); -inf bans a token.
        targets: [N] token ids.
        batch: what the policy loss needs, N rows of S sequences; see `PolicyBatch`.
        recipe: what to compute; see `Recipe`.
        temperature: above 0.
        in_place: whether all but the reference may overwrite `logits` with their gradient, which
            saves their size in memory; nothing else may read them afterwards (autograd notices who
            does), also after an error. They must be the result of a computation: no leaf.
        backend: "cpu" (float32 and bfloat16: one pass over memory for recipes that look at single
            tokens, two for others), "triton" (float16 too, on a GPU; waits for nothing), "cuda"
            (the same, and one read less; all recipes but SIREN; when it is named) or "reference".
            "auto": the first that can.

    Raises `ValueError` for arguments that do not fit and for a backend that cannot run here;
    `NonFiniteError`, on a CPU, for a token whose logits hold a NaN, an infinity, or -inf alone; on
    a GPU the loss is NaN then, and `LossOutput.check` raises. "triton" and "cuda" scale the
    gradient where it lies: a second way back through one loss is a `RuntimeError`.
    """
    check_tensor("logits", logits, ["N", "V"], FLOATS)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: got {recipe!r}, a Recipe is needed; see recipes.get(name)")
    refuse_transforms("logits", logits)
    rows, vocab = logits.shape
    if not vocab:
        raise ValueError("logits: got an empty vocabulary, allowed is one column or more")
    check_tensor("targets", targets, [rows], INTEGERS, logits.device)
    check_positive("temperature", temperature)
    check_constants(batch)
    refusals = {"cpu": cpu.refusal, "triton": _triton_refusal}
    chosen = choose_backend(
        "logits_policy_loss", backend, refusals, logits, recipe, on_request={"cuda": _cuda_refusal}
    )
    if not torch.compiler.is_compiling():
        check_batch(batch, recipe, rows, logits.device)
        if logits.device.type == "cpu":
            _check_targets(targets, batch.mask, vocab)
    arguments = logits, targets, batch, recipe, float(temperature)
    if chosen == "reference":
        return reference.logits_policy_loss(*arguments)
    if in_place:
        _check_writable(logits)
    if chosen == "cpu":
        return cpu.logits_policy_loss(*arguments, in_place)
    if chosen == "cuda":
        from eapo_fast.kernels.logits_policy_loss import cuda_kernel

        return cuda_kernel.logits_policy_loss(*arguments, in_place)
    from eapo_fast.kernels.logits_policy_loss import triton_kernel

    return triton_kernel.logits_policy_loss(*arguments, in_place)


def _triton_refusal(logits: Tensor, recipe: Recipe) -> str | None:
    if torch.compiler.is_compiling():
        return "it is no operator of torch, which torch.compile would need"
    return triton_refusal(logits, GPU_STORAGE)


def _cuda_refusal(logits: Tensor, recipe: Recipe) -> str | None:
    if recipe.entropy_target is not None:
        return f"recipe {recipe.name!r} reads the truncated entropy, which it does not compute"
    return _triton_refusal(logits, recipe) or cuda_rows.refusal(logits)


def _check_writable(logits: Tensor) -> None:
    """Raise `ValueError` for logits whose own values are what is to be trained."""
    base = logits if logits._base is None else logits._base
    if base.requires_grad and base.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "in_place: logits are, or are a view of, a leaf that requires a gradient, and would "
            "be overwritten with it; use in_place=False"
        )


def _check_targets(targets: Tensor, mask: Tensor | None, vocab: int) -> None:
    wrong = (targets < 0) | (targets >= vocab)
    if mask is not None:
        wrong &= mask != 0
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets: entry {at} is {int(targets[at])}, allowed is 0 to {vocab - 1}, the columns "
            "of logits"
        )
