"""Published float64 values, evaluated by public functions of the installed eapo_fast.

`evaluate(method, case, inputs)` maps the inputs of a golden case to calls and returns what they
give under the names of the case's `expected`. Nothing is worked out here but shapes: padded tables
become packed tokens and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eapo_fast import ops, recipes, rewards
from eapo_fast.recipes import EntropyBand, EntropyTarget, Recipe, Reweighting

Inputs = Mapping[str, Any]
Adapter = Callable[[str, Inputs], dict[str, Any]]

_ADAPTERS: dict[str, Adapter] = {}


def evaluate(method: str, case: str | None, inputs: Inputs) -> dict[str, Any]:
    """Return floats, lists, bools or None by the names that the case expects.

    `case` tells cases of one method apart; the methods here don't need it. Raises `KeyError` for a
    method without an adapter.
    """
    return _ADAPTERS[method](method, inputs)


def methods() -> list[str]:
    """Return the names of the methods that `evaluate` knows."""
    return sorted(_ADAPTERS)


def _adapter(*names: str) -> Callable[[Adapter], Adapter]:
    def add(function: Adapter) -> Adapter:
        _ADAPTERS.update(dict.fromkeys(names, function))
        return function

    return add


class _Table:
    """Packed tokens of a padded table: every row of the table is a sequence."""

    def __init__(self, values: Sequence[Any], mask: Any = None) -> None:
        self.rows, self.width = len(values), len(values[0])
        self.cu_seqlens = torch.arange(self.rows + 1) * self.width
        live = torch.ones(self.rows, self.width) if mask is None else torch.tensor(mask)
        self.mask = live.flatten() != 0

    def rows_of(self, packed: Tensor) -> list[Any]:
        """[N, ...] as a nested list."""
        return packed.detach().unflatten(0, (self.rows, self.width)).tolist()

    def masked(self, packed: Tensor) -> list[Any]:
        """[N] as a nested list, 0 where the mask is 0."""
        return self.rows_of(torch.where(self.mask, packed.detach(), 0.0))

    def firsts(self, packed: Tensor) -> list[float | None]:
        """The value of each sequence's first live token."""
        live = [[t for t, m in enumerate(row) if m] for row in self.rows_of(self.mask)]
        table = self.rows_of(packed)
        return [row[at[0]] if at else None for row, at in zip(table, live, strict=True)]


def _flat(nested: Any) -> Tensor:
    return torch.tensor(nested, dtype=torch.float64).flatten()


def _indices(flags: Tensor) -> list[int]:
    return flags.nonzero().squeeze(1).tolist()


def _logits(nested: Any) -> Tensor:
    return torch.tensor(nested, dtype=torch.float64).flatten(0, 1).requires_grad_()


def _changes(inputs: Inputs) -> dict[str, Any]:
    """Fields of a recipe by the names that the cases have for them."""
    names = {
        "eps_low": "epsilon",
        "eps_high": "epsilon_high",
        "dual_clip": "delta",
        "norm_length": "max_length",
        "aggregation": "aggregation",
    }
    return {field: inputs[name] for name, field in names.items() if name in inputs}


# Advantages


def _group(inputs: Inputs) -> tuple[Tensor, Tensor]:
    reward = _flat(inputs["reward"])
    return reward, torch.tensor(inputs.get("group", [0] * len(reward)))


@_adapter("grpo.advantage.degenerate")
def _grpo_advantage(method: str, inputs: Inputs) -> dict[str, Any]:
    reward, group = _group(inputs)
    advantage = ops.group_advantages(reward, group, eps=inputs["eps"], ddof=inputs["std_ddof"])
    return {"advantage": advantage.tolist()}


@_adapter("grpo.advantage")
def _grpo_statistics(method: str, inputs: Inputs) -> dict[str, Any]:
    reward, group = _group(inputs)
    found = ops.group_statistics(reward, group, ddof=inputs["std_ddof"])
    one = len(group.unique()) == 1
    return {
        **_grpo_advantage(method, inputs),
        "mean": found.center[0].item() if one else found.center.tolist(),
        "std": found.std[0].item() if one else found.std.tolist(),
    }


@_adapter("dr_grpo.advantage", "rloo.advantage", "opo.advantage")
def _centred_advantage(method: str, inputs: Inputs) -> dict[str, Any]:
    recipe = recipes.get(method.removesuffix(".advantage"))
    reward, group = _group(inputs)
    lengths = torch.tensor(inputs["length"]).long() if "length" in inputs else None
    found = {
        "advantage": ops.group_advantages(
            reward, group, center=recipe.center, scale=recipe.scale, lengths=lengths
        ).tolist()
    }
    if lengths is not None:
        center = ops.group_statistics(reward, group, center=recipe.center, lengths=lengths).center
        found["baseline"] = center[0].item()
    return found


@_adapter("reinforce_pp.advantage")
def _reinforce_pp(method: str, inputs: Inputs) -> dict[str, Any]:
    table = _Table(inputs["token_reward"], inputs["mask"])
    settings = {"mask": table.mask, "gamma": inputs["gamma"], "restart": True}
    reward = _flat(inputs["token_reward"])
    whiten = recipes.get("reinforce_pp").whiten
    advantage = ops.token_advantages(reward, table.cu_seqlens, whiten=whiten, **settings)
    returns = ops.token_advantages(reward, table.cu_seqlens, **settings)
    return {"returns": table.rows_of(returns), "advantage": table.rows_of(advantage)}


@_adapter("reinforce_pp_baseline.advantage")
def _reinforce_pp_baseline(method: str, inputs: Inputs) -> dict[str, Any]:
    recipe = recipes.get("reinforce_pp_baseline")
    reward, group = _group(inputs)
    centred = ops.group_advantages(reward, group, center=recipe.center, scale=recipe.scale)
    width = int(max(inputs["length"]))
    mask = [[t < n for t in range(width)] for n in inputs["length"]]
    table = _Table(mask, mask)
    advantage = ops.token_advantages(
        centred, table.cu_seqlens, mask=table.mask, gamma=recipe.gamma, whiten=recipe.whiten
    )
    return {"centred": centred.tolist(), "advantage_per_token": table.rows_of(advantage)}


# DAPO's reward and filter


@_adapter("dapo.overlong")
def _overlong(method: str, inputs: Inputs) -> dict[str, Any]:
    penalty = rewards.overlong(inputs["max_length"], inputs["buffer"], factor=inputs["factor"])
    return {"penalty": penalty(completion_ids=[[0] * int(n) for n in inputs["length"]])}


@_adapter("dapo.dynamic_filter")
def _dynamic_filter(method: str, inputs: Inputs) -> dict[str, Any]:
    recipe, members = recipes.get("dapo"), {group: [] for group in sorted(set(inputs["group"]))}
    for metric, group in zip(inputs["metric"], inputs["group"], strict=True):
        members[group].append(metric)
    return {"keep_group": [recipe.keeps_group(m) for m in members.values()]}


# Losses over log-probabilities


def _table_loss(inputs: Inputs, recipe: Recipe, **stats: Tensor) -> tuple[_Table, ops.LossOutput]:
    table = _Table(inputs["logp"], inputs["mask"])
    found = ops.policy_loss(
        _flat(inputs["logp"]),
        _flat(inputs["logp_old"]),
        _flat(inputs["advantage"]),
        table.cu_seqlens,
        mask=table.mask,
        stats=stats,
        recipe=recipe,
        details=True,
    )
    return table, found


def _losses(table: _Table, found: ops.LossOutput) -> dict[str, Any]:
    return {
        "per_token_loss": table.rows_of(found.token_loss),
        "loss": found.loss.item(),
        "dloss_dlogp": table.rows_of(found.a),
    }


@_adapter("ppo_clip.loss", "ppo_dual_clip.loss", "dapo.loss", "gspo.loss", "cispo.loss")
def _clipped_loss(method: str, inputs: Inputs) -> dict[str, Any]:
    name = method.removesuffix(".loss")
    name = {"ppo_clip": "ppo_dual_clip", "gspo": "gspo_token"}.get(name, name)
    return _losses(*_table_loss(inputs, recipes.get(name).replace(**_changes(inputs))))


@_adapter("gmpo.loss")
def _gmpo(method: str, inputs: Inputs) -> dict[str, Any]:
    table, found = _table_loss(inputs, recipes.get("gmpo").replace(**_changes(inputs)))
    return {
        "seq_ratio": table.firsts(found.details["ratio"]),
        "loss": found.loss.item(),
        "dloss_dlogp": table.rows_of(found.a),
    }


@_adapter("aggregation.empty_sequence")
def _aggregation(method: str, inputs: Inputs) -> dict[str, Any]:
    table = _Table(inputs["per_token_loss"], inputs["mask"])
    losses = _flat(inputs["per_token_loss"])
    modes = recipes.recipe.AGGREGATIONS
    return {
        mode: ops.policy_loss(
            -losses,
            -losses,
            torch.ones(table.rows, dtype=torch.float64),
            table.cu_seqlens,
            mask=table.mask,
            recipe=recipes.get("reinforce").replace(
                aggregation=mode, max_length=inputs["norm_length"]
            ),
        ).loss.item()
        for mode in modes
    }


@_adapter("kl.k1", "kl.abs", "kl.k2", "kl.k3")
def _kl(method: str, inputs: Inputs) -> dict[str, Any]:
    table = _Table(inputs["logp"], inputs["mask"])
    logprob = _flat(inputs["logp"])
    found = ops.policy_loss(
        logprob,
        logprob,
        torch.zeros(table.rows, dtype=torch.float64),
        table.cu_seqlens,
        mask=table.mask,
        ref_logprob=_flat(inputs["logp_ref"]),
        recipe=recipes.get("reinforce").replace(
            kl=method.removeprefix("kl."), beta=1.0, aggregation="token-sum-norm", max_length=1
        ),
    )
    return {
        "value": table.rows_of(found.token_loss),
        "dvalue_dlogp": table.rows_of(found.a),
        "token_mean": found.metrics["kl"].item(),
    }


@_adapter("clip_cov.select")
def _clip_cov_select(method: str, inputs: Inputs) -> dict[str, Any]:
    recipe = recipes.get("clip_cov")
    selection = recipe.selection.replace(
        low=inputs["lower"], high=inputs["upper"], fraction=inputs["fraction"]
    )
    recipe = recipe.replace(selection=selection, **_changes(inputs))
    table, found = _table_loss(inputs, recipe)
    seen = found.details
    return {
        "covariance": table.rows_of(seen["score"]),
        "ppo_clipped": table.rows_of(seen["clipped_low"] | seen["clipped_high"]),
        "eligible": table.rows_of(seen["eligible"]),
        "number_to_drop": len(_indices(seen["selected"])),
    }


@_adapter("clip_cov.loss")
def _clip_cov(method: str, inputs: Inputs) -> dict[str, Any]:
    dropped = torch.zeros(len(inputs["logp"]), len(inputs["logp"][0]))
    dropped[tuple(inputs["dropped"])] = 1
    recipe = recipes.get("clip_cov").replace(**_changes(inputs))
    return _losses(*_table_loss(inputs, recipe, selected=dropped.flatten()))


@_adapter("kl_cov.loss")
def _kl_cov(method: str, inputs: Inputs) -> dict[str, Any]:
    recipe = recipes.get("kl_cov")
    selection = recipe.selection.replace(fraction=inputs["fraction"], coef=inputs["kl_coef"])
    recipe = recipe.replace(selection=selection, **_changes(inputs))
    return _losses(*_table_loss(inputs, recipe))


@_adapter("steer.loss")
def _steer(method: str, inputs: Inputs) -> dict[str, Any]:
    weight = Reweighting(mapping=inputs["mapping"], low=inputs["w_min"], high=inputs["w_max"])
    recipe = recipes.get("steer").replace(reweighting=weight, **_changes(inputs))
    return _losses(*_table_loss(inputs, recipe, old_entropy=_flat(inputs["entropy_old"])))


@_adapter("lp_reg.loss")
def _lp_reg(method: str, inputs: Inputs) -> dict[str, Any]:
    recipe = recipes.get("lp_reg")
    selection = recipe.selection.replace(
        fraction=inputs["neg_fraction"], coef=inputs["kl_coef"], min_p=inputs["min_p"]
    )
    old, action = _old_policy(inputs), torch.tensor(inputs["action"])
    cut = ops.truncated_entropy(old, min_p=inputs["min_p"])
    likeliest = ops.linear_token_stats(
        old, torch.eye(old.shape[1], dtype=old.dtype), action, extras=("max_logprob",)
    ).extras["max_logprob"]
    found = ops.policy_loss(
        _flat(inputs["logp"]),
        _flat(inputs["logp_old"]),
        _flat(inputs["advantage"]),
        torch.tensor([0, len(action)]),
        stats={"kept_mass": cut.mass, "max_logprob": likeliest},
        recipe=recipe.replace(selection=selection, **_changes(inputs)),
        details=True,
    )
    inside = cut.kept.gather(1, action[:, None]).squeeze(1).tolist()
    proxy = found.details["proxy_logprob"].tolist()
    return {
        "kept_vocab": cut.kept.tolist(),
        "kept_mass": cut.mass.tolist(),
        "proxy_logp_of_kept": [q if kept else None for q, kept in zip(proxy, inside, strict=True)],
        "candidates": _indices(found.details["picked"]),
        "regularised": _indices(found.details["selected"]),
        "per_token_loss": found.token_loss.tolist(),
        "loss": found.loss.item(),
        "dloss_dlogp": found.a.tolist(),
    }


def _old_policy(inputs: Inputs) -> Tensor:
    """Logits [N, V] of the old distribution, finite where a probability is 0."""
    return torch.tensor(inputs["prob_old"], dtype=torch.float64).log().clamp(min=-1e4)


# Entropies


@_adapter("entropy_bonus")
def _entropy_bonus(method: str, inputs: Inputs) -> dict[str, Any]:
    table, logits = _Table(inputs["logits"], inputs["mask"]), _logits(inputs["logits"])
    stats = ops.linear_token_stats(
        logits,
        torch.eye(logits.shape[1], dtype=logits.dtype),
        torch.zeros(len(logits), dtype=torch.long),
    )
    recipe = recipes.get("reinforce").replace(entropy_coef=inputs["coef"], **_changes(inputs))
    found = ops.policy_loss(
        stats.logprob,
        stats.logprob.detach(),
        torch.zeros(table.rows, dtype=torch.float64),
        table.cu_seqlens,
        mask=table.mask,
        entropy=stats.entropy,
        recipe=recipe,
    )
    found.loss.backward()
    return {
        "entropy": table.masked(stats.entropy),
        "loss": found.loss.item(),
        "dloss_dlogits": table.rows_of(logits.grad),
    }


@_adapter("unified.backward")
def _unified_backward(method: str, inputs: Inputs) -> dict[str, Any]:
    table, logits = _Table(inputs["logits"]), _logits(inputs["logits"])
    stats = ops.linear_token_stats(
        logits,
        torch.eye(logits.shape[1], dtype=logits.dtype),
        torch.tensor(inputs["action"]).flatten(),
    )
    cut = ops.truncated_entropy(logits, top_p=inputs["top_p"])
    outputs = (stats.logprob, stats.entropy, cut.entropy)
    coefficients = [
        _flat(inputs[name]) for name in ("coef_logp", "coef_entropy", "coef_top_p_entropy")
    ]
    (slope,) = torch.autograd.grad(outputs, logits, coefficients)
    return {
        "logp": table.rows_of(stats.logprob),
        "entropy": table.rows_of(stats.entropy),
        "kept_vocab": table.rows_of(cut.kept),
        "top_p_entropy": table.rows_of(cut.entropy),
        "dloss_dlogits": table.rows_of(slope),
    }


@_adapter("epo.phase_weight")
def _phase_weight(method: str, inputs: Inputs) -> dict[str, Any]:
    total = inputs["total_epochs"]
    return {"weight": [recipes.phase_weight(epoch, total) for epoch in inputs["epoch"]]}


def _epo(inputs: Inputs, **stats: Tensor) -> tuple[_Table, ops.LossOutput]:
    table = _Table(inputs["entropy"], inputs.get("mask"))
    entropy = _flat(inputs["entropy"])
    sequence = inputs["mode"] == "seq"
    padded = sequence and inputs.get("mean_over") == "padded width"
    band = EntropyBand(
        low=inputs["kappa_low"],
        high=inputs["kappa_high"],
        penalty=inputs["alpha"],
        coef=inputs.get("smooth_coef", 1.0),
        level="sequence" if sequence else "token",
        width=table.width if padded else None,
    )
    changes = _changes(inputs)
    if "entropy_coef" in inputs:
        changes["entropy_coef"] = inputs["entropy_coef"]
    found = ops.policy_loss(
        torch.zeros_like(entropy),
        torch.zeros_like(entropy),
        torch.zeros(table.rows, dtype=torch.float64),
        table.cu_seqlens,
        mask=table.mask,
        entropy=entropy,
        stats={"entropy_history": _flat(inputs["history_step_mean_entropy"]), **stats},
        recipe=recipes.get("epo").replace(entropy_band=band, **changes),
        details=True,
    )
    return table, found


@_adapter("epo.regulariser")
def _epo_regulariser(method: str, inputs: Inputs) -> dict[str, Any]:
    weight = recipes.phase_weight(inputs["epoch"], inputs["total_epochs"])
    table, found = _epo(inputs, smoothing=torch.tensor(weight, dtype=torch.float64))
    return {
        "history_mean": found.details["entropy_mean"][table.mask][0].item(),
        "penalty": table.rows_of(found.details["entropy_penalty"]),
        "mean_penalty": found.metrics["entropy_penalty"].item(),
        "mean_entropy": found.metrics["entropy"].item(),
        "weight": weight,
        "loss_term": found.loss.item(),
        "dterm_dentropy": table.rows_of(found.b),
    }


@_adapter("epo.penalty.seq_mode")
def _epo_sequence_penalty(method: str, inputs: Inputs) -> dict[str, Any]:
    table, found = _epo(inputs)
    return {
        "seq_mean": table.firsts(found.details["entropy_level"]),
        "penalty": table.firsts(found.details["entropy_penalty"]),
    }


@_adapter("siren.regulariser")
def _siren(method: str, inputs: Inputs) -> dict[str, Any]:
    table, logits = _Table(inputs["logits"], inputs["mask"]), _logits(inputs["logits"])
    target = EntropyTarget(
        coef=inputs["beta"],
        top_p=inputs["top_p"],
        top_k=inputs["top_k"],
        quantile=inputs["quantile"],
    )
    cut = ops.truncated_entropy(logits, top_p=target.top_p, top_k=target.top_k)
    zeros = torch.zeros(len(logits), dtype=torch.float64)
    found = ops.policy_loss(
        zeros,
        zeros,
        zeros,
        table.cu_seqlens,
        mask=table.mask,
        stats={"truncated_entropy": cut.entropy, "anchor": torch.tensor(inputs["anchor"])},
        recipe=recipes.get("siren").replace(entropy_target=target, max_length=1),
        details=True,
    )
    found.loss.backward()
    return {
        "kept_vocab": table.rows_of(cut.kept),
        "entropy_top_p": table.masked(cut.entropy),
        "threshold": table.firsts(found.details["threshold"]),
        "kept_tokens": table.rows_of(found.details["selected"]),
        "aggregate": found.metrics["truncated_entropy"].item(),
        "loss": found.loss.item(),
        "dloss_dlogits": table.rows_of(logits.grad),
    }
