"""The update against plain autograd: packing, masks, bans, global counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eapo_fast import EAPOConfig, ops
from eapo_fast.kernels import checks
from eapo_fast.rollout import Rollout, Segment
from eapo_fast.training.attention import PackedRow
from eapo_fast.training.optimizer import LearningRate
from eapo_fast.training.packing import micro_batches
from eapo_fast.training.policy import Policy
from eapo_fast.training.recipe import resolve_recipe
from eapo_fast.training.setup import enable_checkpointing
from eapo_fast.training.update import Updater

KINDS = ["qwen2", "qwen3", "llama", "mistral", "gemma2", "granite", "olmo2"]


def make_rollout(
    prompt: list[int], pieces: list[tuple[str, list[int]]], group: int, banned: list[int]
) -> Rollout:
    """A rollout of given pieces; `banned` ids had probability 0 at every policy position."""
    tokens, mask, segments, turn = [], [], [], 0
    for kind, ids in pieces:
        segments.append(Segment(kind, len(tokens), len(tokens) + len(ids), turn))  # type: ignore[arg-type]
        turn += kind != "policy"
        tokens += ids
        mask += [int(kind == "policy")] * len(ids)
    where = np.flatnonzero(mask)
    generator = np.random.default_rng(len(tokens))
    logprobs = np.where(mask, -generator.random(len(tokens)) * 4 - 1, 0)
    return Rollout(
        prompt_ids=prompt,
        token_ids=np.array(tokens, dtype=np.int64),
        loss_mask=np.array(mask, dtype=np.uint8),
        logprobs=logprobs.astype(np.float32),
        segments=segments,
        finish_reason="stop",
        group_id=group,
        sample_index=0,
        prompt_id=group,
        banned=(
            np.repeat(where, len(banned)).astype(np.int32),
            np.tile(banned, len(where)).astype(np.int32),
        ),
    )


@pytest.fixture
def rollouts() -> list[Rollout]:
    return [
        make_rollout([5, 6, 7], [("policy", [10, 11]), ("expert", [1, 2]), ("policy", [9])], 0, []),
        make_rollout([5, 6, 7], [("policy", [20, 21])], 0, [30, 31]),
        make_rollout([8], [("policy", [22]), ("notice", [3, 4, 5]), ("policy", [24, 25])], 1, [9]),
        make_rollout([8, 9, 40, 41, 42], [("policy", list(range(50, 67)))], 1, []),
    ]  # fmt: skip


ADVANTAGES = [1.0, -0.5, 0.75, -1.25]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_hidden_states_are_those_of_each_sequence_alone(
    kind: str, make_model: Callable[..., Any]
) -> None:
    changes = {"sliding_window": 4} if kind in ("mistral", "gemma2") else {}
    model = make_model(kind, **changes)
    policy = Policy(model)
    sequences = [list(range(5, 5 + n)) for n in (1, 7, 12)]
    ids = torch.tensor([t for s in sequences for t in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    borders = torch.tensor([0, 1, 8, 20], dtype=torch.int32)
    row = PackedRow(borders, [1, 7, 12])
    with torch.no_grad(), policy.attention(row):  # type: ignore[attr-defined]
        packed = policy.hidden(ids, positions, row)
    for start, sequence in zip([0, 1, 8], sequences, strict=True):
        with torch.no_grad():
            alone = model.get_decoder()(torch.tensor([sequence])).last_hidden_state[0]
        torch.testing.assert_close(
            packed[start : start + len(sequence)], alone, atol=2e-5, rtol=1e-4
        )


def plain_loss(model: Any, rollouts: list[Rollout], temperature: float) -> torch.Tensor:
    """EAPO's objective written out per rollout, with the model's own logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rollout, advantage in zip(rollouts, ADVANTAGES, strict=True):
        ids = rollout.prompt_ids + rollout.token_ids.tolist()
        logits = model(torch.tensor([ids])).logits[0] / temperature
        start = len(rollout.prompt_ids)
        for position in np.flatnonzero(rollout.loss_mask):
            row = logits[start + position - 1].double()
            where, what = rollout.banned
            row = row.index_fill(0, torch.from_numpy(what[where == position]).long(), float("-inf"))
            logprob = row.log_softmax(-1)[rollout.token_ids[position]]
            ratio = (logprob - float(rollout.logprobs[position])).exp()
            clipped = ratio.clamp(0.8, 1.28)
            total = total - torch.minimum(ratio * advantage, clipped * advantage)
            count += 1
    return total / count


def update(model: Any, rollouts: list[Rollout], **settings: Any) -> tuple[dict[str, float], Any]:
    """Run backward only; returns metrics and gradients."""
    args = EAPOConfig(bf16=False, learning_rate=0.0, **settings)
    updater = Updater(model, args, resolve_recipe(args), LearningRate(0.0, "constant", 0, 1))
    model.zero_grad(set_to_none=True)
    metrics = updater._backward(rollouts, ADVANTAGES)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return metrics, gradients


def test_loss_and_gradient_equal_plain_autograd(
    make_model: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    model = make_model()
    metrics, gradients = update(model, rollouts, temperature=0.9)
    model.zero_grad(set_to_none=True)
    loss = plain_loss(model, rollouts, 0.9)
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert set(gradients) == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("budget", [1, 9, 14, 10_000])
def test_gradient_does_not_depend_on_the_cut(
    budget: int, make_model: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    model = make_model()
    whole, expected = update(model, rollouts)
    parts, gradients = update(model, rollouts, micro_batch_tokens=budget)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


def test_only_policy_tokens_enter_the_head(rollouts: list[Rollout]) -> None:
    (batch,) = micro_batches(rollouts, ADVANTAGES, token_budget=10_000, device=torch.device("cpu"))
    assert len(batch.rows) == sum(r.num_policy_tokens for r in rollouts)
    assert batch.targets.tolist() == [t for r in rollouts for t in r.ids()]
    assert batch.input_ids.shape == batch.position_ids.shape
    following = torch.cat([batch.input_ids[1:], torch.tensor([-1])])
    inside = ~torch.isin(batch.rows + 1, batch.row.cu_seqlens[1:])
    assert torch.equal(following[batch.rows][inside], batch.targets[inside])


def test_banned_token_gets_no_probability_and_no_gradient(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(tie_word_embeddings=False)
    rollout = make_rollout([5], [("policy", [10, 11])], 0, [200])
    args = EAPOConfig(bf16=False)
    updater = Updater(model, args, resolve_recipe(args), LearningRate(0.0, "constant", 0, 1))
    updater._backward([rollout], [1.0])
    assert float(model.lm_head.weight.grad[200].abs().max()) == 0.0
    assert float(model.lm_head.weight.grad[201].abs().max()) > 0.0


def test_gradient_checkpointing_changes_nothing(
    make_model: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    model = make_model().train()
    _, expected = update(model, rollouts)
    enable_checkpointing(model)
    _, gradients = update(model, rollouts)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("waits", [True, False], ids=["cpu", "as on a GPU"])
def test_not_finite_update_leaves_the_weights(
    make_model: Callable[..., Any],
    rollouts: list[Rollout],
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the token is named where the step waits for its loss."""
    monkeypatch.setattr(checks, "may_look", lambda tensor: waits)
    model = make_model()
    args = EAPOConfig(bf16=False, learning_rate=1.0)
    updater = Updater(model, args, resolve_recipe(args), LearningRate(1.0, "constant", 0, 1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    culprit = "advantages: entry 0 is nan" if waits else "the loss is nan, first at"
    with pytest.warns(RuntimeWarning, match=f"step 1 changes nothing: {culprit}"):
        metrics = updater.step(rollouts, [float("nan"), 1.0, 1.0, 1.0], 1)
    assert metrics["skipped"] == 1.0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert updater.step(rollouts, ADVANTAGES, 2)["skipped"] == 0.0


@pytest.mark.parametrize("waits", [True, False], ids=["cpu", "as on a GPU"])
def test_logits_that_are_not_finite_skip_the_update(
    make_model: Callable[..., Any],
    rollouts: list[Rollout],
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU the token is named where the step waits for its loss."""
    monkeypatch.setattr(checks, "may_look", lambda tensor: waits)
    model = make_model(tie_word_embeddings=False)
    args = EAPOConfig(bf16=False, learning_rate=1.0)
    updater = Updater(model, args, resolve_recipe(args), LearningRate(1.0, "constant", 0, 1))
    head = model.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head[7] = torch.nan
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.warns(RuntimeWarning, match=r"step 1 changes nothing: hidden: token \d+"):
        metrics = updater.step(rollouts, ADVANTAGES, 1)
    assert metrics["skipped"] == 1.0
    assert all(torch.equal(p[:7], before[n][:7]) for n, p in model.named_parameters())
    with torch.no_grad():
        head.copy_(kept)
    assert updater.step(rollouts, ADVANTAGES, 2)["skipped"] == 0.0


def test_kl_to_the_reference_starts_at_zero(
    make_model: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    metrics, _ = update(make_model(), rollouts, beta=0.1)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "step", "rate"),
    [
        ("constant", 1, 0.1), ("constant", 10, 1.0), ("constant", 100, 1.0),
        ("linear", 10, 1.0), ("linear", 11, 1.0), ("linear", 56, 0.5), ("cosine", 56, 0.5),
    ],
)  # fmt: skip
def test_learning_rate(kind: str, step: int, rate: float) -> None:
    assert LearningRate(1.0, kind, 10, 100).at(step) == pytest.approx(rate)


def test_bf16_multiplies_the_head_in_bfloat16_and_trains_float32_weights(
    make_model: Callable[..., Any], rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autocast does with every other product; gradients near those of float32."""
    model = make_model(spread=0.15)
    given: list[tuple[torch.dtype, torch.dtype]] = []
    loss = ops.linear_policy_loss

    def noted(hidden: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append((hidden.dtype, weight.dtype))
        return loss(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(ops, "linear_policy_loss", noted)
    found = {}
    for bf16 in (False, True):
        args = EAPOConfig(bf16=bf16, learning_rate=0.0)
        updater = Updater(model, args, resolve_recipe(args), LearningRate(0.0, "constant", 0, 1))
        model.zero_grad(set_to_none=True)
        updater._backward(rollouts, ADVANTAGES)
        found[bf16] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert given == [(torch.float32,) * 2, (torch.bfloat16,) * 2]
    assert found[True].keys() == found[False].keys()
    for name, want in found[False].items():
        got = found[True][name]
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.1 * want.norm() + 1e-6, name
