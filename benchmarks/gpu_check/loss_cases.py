"""Random cases of training's ops: advantages, policy losses, statistics and losses of a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_check.correctness import Trial, to_device, widened
from gpu_check.records import RefusedError

STATISTICS = 1e-4
"""Bound of log-probabilities, entropies and losses, in any dtype: logits are exact sums there."""
LOSS_FLOOR = 0.05
"""A mean of terms of size 1 that cancel is compared as if it were this large."""
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-7}
"""Bound of gradients: rounded to the dtype on the way into their products and at the end."""


def _gradients(trial: Trial) -> float:
    """Return the bound of gradients; Triton's interpreter rounds bfloat16 towards zero."""
    truncates = trial.device == "cpu" and trial.dtype == torch.bfloat16
    return GRADIENTS[trial.dtype] * (2 if truncates else 1)


def group_advantages(trial: Trial) -> None:
    """All centres and scales; rewards that lie far from 0."""
    from eapo_fast import ops

    if trial.dtype != torch.float32:
        raise RefusedError("it computes in float32 whatever the rewards are stored in")
    rng = trial.random
    for center in ("mean", "loo", "length", "none"):
        for scale in ("std", "batch_std", "none"):
            count = rng.randrange(1, 40 if trial.small else 1500)
            groups = trial.integers(max(1, count // 4), count)
            rewards = trial.normal(count) + rng.choice([0.0, 100.0])
            settings = {
                "lengths": trial.integers(900, count) + 1,
                "valid": torch.rand(count, generator=trial.generator) < 0.9,
            }
            how = {"center": center, "scale": scale}
            want = ops.group_advantages(
                rewards.double(), groups, **settings, **how, backend="reference"
            )
            moved = to_device(settings, trial.device)
            inputs = [x.to(trial.device) for x in (rewards, groups)]
            got = trial.call(ops.group_advantages, *inputs, **moved, **how)
            trial.compare(f"{center}, {scale}, {count} rollouts", got, want, 1e-5)


def policy_loss(trial: Trial) -> None:
    """Every recipe that the backend takes: losses and coefficients."""
    from eapo_fast import ops, recipes

    refusal = None
    for name in recipes.names():
        case, recipe = _policy_case(trial), recipes.get(name)
        try:
            want = ops.policy_loss(**widened(case), recipe=recipe, backend="reference")
        except ValueError:
            continue  # reads statistics that only its own trainer has
        try:
            got = trial.call(ops.policy_loss, **to_device(case, trial.device), recipe=recipe)
        except RefusedError as error:
            refusal = error
            continue
        for part in ("loss", "a", "b", "token_loss"):
            trial.compare(
                f"{name}, {part}",
                getattr(got, part),
                getattr(want, part),
                STATISTICS,
                floor=LOSS_FLOOR if part == "loss" else 1e-2,
            )
    if trial.cases == 0:
        raise refusal or RefusedError("no recipe")


def _policy_case(trial: Trial) -> dict[str, Any]:
    """Packed sequences, some empty, some tokens masked out; those hold poison."""
    sizes = [0, 1, *(trial.random.randrange(2, 30 if trial.small else 2000) for _ in range(5))]
    rows = sum(sizes)
    logprob = trial.normal(rows, scale=0.8) - 1.5
    case = {
        "logprob": logprob,
        "old_logprob": (logprob + trial.normal(rows, scale=0.3)).to(trial.dtype),
        "entropy": trial.normal(rows).abs(),
        "ref_logprob": (logprob + trial.normal(rows, scale=0.3)).to(trial.dtype),
    }
    mask = torch.rand(rows, generator=trial.generator) > 0.25
    for values in case.values():
        values[~mask] = torch.nan
    edges = torch.tensor([0, *sizes]).cumsum(0)
    advantages = trial.normal(len(sizes)).float()
    return {**case, "advantages": advantages, "mask": mask, "cu_seqlens": edges}


def _head(trial: Trial, rows: int, vocab: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = trial.normal(rows, width)
    weight = trial.normal(vocab, width, scale=2 / width**0.5)
    return hidden, weight, trial.integers(vocab, rows)


def _head_sizes(trial: Trial) -> list[tuple[int, int, int]]:
    """Rows, vocabulary and width: odd ones, and two that models have."""
    if trial.small:
        return [(1, 2, 5), (19, 300, 20)]
    odd = [(trial.random.randrange(1, 300), trial.random.randrange(2, 9000), 1 + 2 * w)
           for w in (10, 63, 448)]  # fmt: skip
    return [*odd, (130, 4097, 896), (65, 151_936, 896)]


def linear_token_stats(trial: Trial) -> None:
    """Statistics, and gradients of a sum with coefficients of both signs."""
    from eapo_fast import ops

    for rows, vocab, width in _head_sizes(trial):
        hidden, weight, targets = _head(trial, rows, vocab, width)
        a = torch.randn(rows, generator=trial.generator)
        b = torch.randn(rows, generator=trial.generator)
        settings = {"temperature": 0.8, "bias": trial.normal(vocab)}
        cut = {"extras": ("kept_mass", "truncated_entropy"), "top_p": 0.8, "top_k": 10_000}
        found = []
        for place in ("want", trial.device):
            exact = place == "want"
            move = widened if exact else lambda x: to_device(x, trial.device)
            leaves = [move(x).detach().requires_grad_() for x in (hidden, weight)]
            moved = {k: move(v) for k, v in settings.items()}
            inputs = (*leaves, move(targets))
            stats = (
                ops.linear_token_stats(*inputs, **moved, **cut, backend="reference")
                if exact
                else trial.call(ops.linear_token_stats, *inputs, **moved, **cut)
            )
            loss = (move(a) * stats.logprob).sum() + (move(b) * stats.entropy).sum()
            found.append((stats, torch.autograd.grad(loss, leaves)))
        (want, wanted), (got, gradients) = found
        size = f"{rows} x {width} x {vocab}"
        for name in ("logprob", "entropy"):
            pair = getattr(got, name), getattr(want, name)
            trial.compare(f"{name}, {size}", *pair, STATISTICS, floor=0.1)
        for name, exact_extra in want.extras.items():
            trial.compare(f"{name}, {size}", got.extras[name], exact_extra, STATISTICS, floor=0.1)
        for name, ours, theirs in zip(("hidden", "weight"), gradients, wanted, strict=True):
            trial.compare(f"gradient of {name}, {size}", ours, theirs, _gradients(trial))


def linear_policy_loss(trial: Trial) -> None:
    """Loss and gradients of recipes of each kind; masked rows hold NaN."""
    from eapo_fast import ops, recipes

    names = ("eapo", "gspo", "siren", "cispo", "gmpo", "kl_cov")[: 3 if trial.small else None]
    sizes = _head_sizes(trial)[1:]
    for index, name in enumerate(names):
        rows, vocab, width = sizes[index % len(sizes)]
        hidden, weight, targets = _head(trial, rows, vocab, width)
        cuts = sorted(trial.random.sample(range(1, rows), min(4, rows - 1)))
        mask = torch.rand(rows, generator=trial.generator) > 0.3
        with torch.no_grad():
            exact = ops.linear_token_stats(*map(widened, (hidden, weight)), targets)
        noise = 0.1 * torch.randn(rows, generator=trial.generator)
        batch = {
            "old_logprob": (exact.logprob + noise).float(),
            "advantages": torch.randn(len(cuts) + 1, generator=trial.generator),
            "cu_seqlens": torch.tensor([0, *cuts, rows]),
            "mask": mask,
            "ref_logprob": (exact.logprob - noise).float(),
            "stats": {"anchor": torch.tensor(0.5)},
        }
        recipe = recipes.get(name)
        if recipe.entropy_target is not None:
            pull = recipe.entropy_target.replace(coef=0.7)
            recipe = recipe.replace(max_length=rows, entropy_target=pull)
        batch["advantages"][::3] = 0.0  # rows that are read and teach nothing
        hidden[~mask] = torch.nan
        results = []
        for exactly in (True, False):
            move = widened if exactly else lambda x: to_device(x, trial.device)
            leaves = [move(x).detach().clone().requires_grad_() for x in (hidden, weight)]
            packed = ops.PolicyBatch(**move(batch))
            inputs = (*leaves, move(targets), packed, recipe)
            out = (
                ops.linear_policy_loss(*inputs, backend="reference")
                if exactly
                else trial.call(ops.linear_policy_loss, *inputs)
            )
            results.append((out, torch.autograd.grad(out.loss, leaves)))
        (want, wanted), (got, gradients) = results
        size = f"{name}, {rows} x {width} x {vocab}"
        trial.compare(f"loss, {size}", got.loss, want.loss, 2 * STATISTICS, floor=LOSS_FLOOR)
        for part, ours, theirs in zip(("hidden", "weight"), gradients, wanted, strict=True):
            trial.compare(f"gradient of {part}, {size}", ours, theirs, _gradients(trial))


def logits_policy_loss(trial: Trial) -> None:
    """Loss and gradients of recipes of single tokens and of sequences; masked rows hold NaN."""
    from eapo_fast import ops, recipes

    sizes = [(19, 300), (5, 4097), (3, 50_257)]
    if not trial.small:
        odd = trial.random.randrange(2, 9000)
        sizes += [(150, odd), (330, 60_000), (33, 151_936)]
    names = ("eapo", "gspo", "cispo")
    for index, (rows, vocab) in enumerate(sizes):
        logits, targets = trial.normal(rows, vocab, scale=2.0), trial.integers(vocab, rows)
        cuts = sorted(trial.random.sample(range(1, rows), min(4, rows - 1)))
        mask = torch.rand(rows, generator=trial.generator) > 0.3
        own = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        noise = 0.1 * torch.randn(rows, generator=trial.generator)
        batch = {
            "old_logprob": (own + noise).float(),
            "advantages": torch.randn(len(cuts) + 1, generator=trial.generator),
            "cu_seqlens": torch.tensor([0, *cuts, rows]),
            "mask": mask,
            "ref_logprob": (own - noise).float(),
        }
        bonus = 0.01 if index % 2 else 0.0
        recipe = recipes.get(names[index % len(names)]).replace(beta=0.05, entropy_coef=bonus)
        logits[~mask] = torch.nan
        results = []
        for exactly in (True, False):
            move = widened if exactly else lambda x: to_device(x, trial.device)
            leaf = move(logits).detach().clone().requires_grad_()
            inputs = (leaf * 1, move(targets), ops.PolicyBatch(**move(batch)), recipe)
            out = (
                ops.logits_policy_loss(*inputs, backend="reference")
                if exactly
                else trial.call(ops.logits_policy_loss, *inputs, in_place=bool(index % 3))
            )
            results.append((out, torch.autograd.grad(out.loss, leaf)[0]))
        (want, wanted), (got, gradient) = results
        size = f"{recipe.name}, {rows} x {vocab}"
        trial.compare(f"loss, {size}", got.loss, want.loss, 2 * STATISTICS, floor=LOSS_FLOOR)
        trial.compare(f"gradient, {size}", gradient, wanted, _gradients(trial))


CASES = {
    "group_advantages": group_advantages,
    "policy_loss": policy_loss,
    "linear_token_stats": linear_token_stats,
    "linear_policy_loss": linear_policy_loss,
    "logits_policy_loss": logits_policy_loss,
}
"""Training's ops by name."""
