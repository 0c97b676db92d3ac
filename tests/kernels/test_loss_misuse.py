"""What a careless caller gives the losses: every op says what is wrong, and none crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_token_stats.finite import NonFiniteError
from eapo_fast.recipes import Recipe

ROWS, WIDTH, VOCAB = 10, 6, 11
CU = torch.tensor([0, 4, 4, 10])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT = draw(ROWS, WIDTH), draw(VOCAB, WIDTH, seed=1)
TARGETS = torch.arange(ROWS)
BATCH = ops.PolicyBatch(
    old_logprob=-draw(ROWS, seed=2).abs(), advantages=draw(3, seed=3), cu_seqlens=CU
)
EAPO = recipes.get("eapo")


def linear(batch: Any = BATCH, recipe: Recipe = EAPO, **changes: Any) -> ops.LossOutput:
    head = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | changes
    return ops.linear_policy_loss(batch=batch, recipe=recipe, **head)


def logits(batch: Any = BATCH, recipe: Recipe = EAPO, **changes: Any) -> ops.LossOutput:
    given = {"logits": HIDDEN @ WEIGHT.T, "targets": TARGETS} | changes
    return ops.logits_policy_loss(batch=batch, recipe=recipe, **given)


LOSSES = pytest.mark.parametrize("loss", [linear, logits])
Loss = Callable[..., ops.LossOutput]


def spoilt(values: Tensor, at: int, value: float) -> Tensor:
    return torch.where(torch.arange(len(values)) == at, value, values)


@LOSSES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": BATCH.advantages.clone().requires_grad_()}, r"advantages: requires a grad"),
        ({"group_ids": torch.zeros(5).long()}, r"group_ids: got shape \[5\], allowed is \[3\]"),
        ({"group_ids": torch.zeros(3)}, r"group_ids: got torch.float32, allowed is"),
        ({"group_ids": [0, 0, 1]}, r"group_ids: got list, a torch tensor is needed"),
        ({"num_tokens": -5}, r"num_tokens: got -5, allowed is a number of 0 or more"),
        ({"num_tokens": "9"}, r"num_tokens: got '9', allowed is a number"),
        ({"num_tokens": torch.tensor(torch.nan)}, r"num_tokens: got tensor\(nan\)"),
        ({"num_tokens": torch.tensor([3, 4])}, r"num_tokens: got shape \[2\], allowed is \[\]"),
        ({"num_sequences": -1}, r"num_sequences: got -1, allowed"),
        ({"stats": [1]}, r"stats: got list, a mapping from names to tensors"),
        ({"stats": {"weight": [1.0] * 10}}, r"stats\['weight'\]: got list, a torch tensor"),
        ({"stats": {3: BATCH.old_logprob}}, r"stats: got 3, known: weight"),
        ({"cu_seqlens": [0, 10]}, r"cu_seqlens: got list, a torch tensor is needed"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_a_batch_that_does_not_fit(loss: Loss, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        loss(replace(BATCH, **changes))


@LOSSES
def test_totals_may_be_numbers_of_any_kind(loss: Loss) -> None:
    want = loss(replace(BATCH, num_tokens=20)).loss
    for total in (20.0, torch.tensor(20), torch.tensor(20.0)):
        torch.testing.assert_close(loss(replace(BATCH, num_tokens=total)).loss, want)


@LOSSES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("field", ["advantages", "old_logprob", "ref_logprob", "weight"])
@pytest.mark.parametrize("name", ["eapo", "gspo", "kl_cov"])
def test_numbers_that_are_not_finite_are_named(
    loss: Loss, value: float, field: str, name: str
) -> None:
    at = 0 if field == "advantages" else 3
    source = BATCH.advantages if field == "advantages" else BATCH.old_logprob
    bad = spoilt(source, at, value)
    label = {"weight": r"stats\['weight'\]"}.get(field, field)
    given = {"stats": {"weight": bad}} if field == "weight" else {field: bad}
    with pytest.raises(NonFiniteError, match=rf"^{label}: entry {at} is {value} \(1 such"):
        loss(replace(BATCH, **given), recipes.get(name).replace(kl="k1"))  # k3 has a limit


@LOSSES
def test_what_is_not_finite_may_lie_where_nobody_looks(loss: Loss) -> None:
    """In a sequence without tokens, in masked tokens; and p = 0 is a probability."""
    empty = replace(BATCH, advantages=spoilt(BATCH.advantages, 1, torch.nan))
    assert loss(empty).loss == loss().loss
    mask = torch.arange(ROWS) != 3
    masked = replace(BATCH, mask=mask, old_logprob=spoilt(BATCH.old_logprob, 3, torch.nan))
    assert loss(masked).loss == loss(replace(BATCH, mask=mask)).loss
    assert loss(
        replace(BATCH, old_logprob=spoilt(BATCH.old_logprob, 3, -torch.inf))
    ).loss.isfinite()


@LOSSES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"advantages": None}}, r"batch: got dict, a PolicyBatch is needed"),
        ({"temperature": "1"}, r"temperature: got '1', allowed is a finite number above 0"),
        ({"temperature": None}, r"temperature: got None, allowed"),
        ({"temperature": 1e-300}, r"temperature: got 1e-300, allowed"),
        ({"temperature": 1e300}, r"temperature: got 1e\+300, allowed"),
    ],
)
def test_arguments_that_do_not_fit(loss: Loss, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        loss(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": "3"}, r"softcap: got '3', allowed is a finite number above 0, or None"),
        ({"softcap": float("inf")}, r"softcap: got inf, allowed"),
        ({"vocab_size": 10.0}, r"vocab_size: got 10.0, allowed is 1 to 11"),
        ({"chunk_size": 2.0}, r"chunk_size: got 2.0, allowed is 1 or more rows"),
        ({"plan": None}, r"plan: got None, allowed is one of auto"),
        ({"banned": 3}, r"banned: got int, allowed is a pair"),
        ({"weight": WEIGHT[:0]}, r"weight: got an empty vocabulary"),
        ({"hidden": HIDDEN[:, :0], "weight": WEIGHT[:, :0]}, r"hidden: got shape \[N, 0\]"),
        ({"recipe": recipes.get("steer")}, r"stats: recipe 'steer' reads 'old_entropy'; pass it"),
        ({"recipe": EAPO.replace(beta=0.1)}, r"ref_logprob: recipe 'eapo' has beta 0.1; pass it"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_a_head_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        linear(**changes)


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_logits_of_no_vocabulary(name: str) -> None:
    none = torch.zeros(ROWS, 0, requires_grad=True)
    with pytest.raises(ValueError, match=r"^logits: got an empty vocabulary"):
        logits(replace(BATCH, mask=torch.zeros(ROWS)), recipes.get(name), logits=none)


@pytest.mark.parametrize("view", [False, True])
def test_leaves_are_not_overwritten(view: bool) -> None:
    leaf = (HIDDEN @ WEIGHT.T).requires_grad_()
    with pytest.raises(ValueError, match=r"^in_place: logits are, or are a view of, a leaf"):
        logits(logits=leaf.view(ROWS, VOCAB) if view else leaf, in_place=True)
    assert torch.equal(leaf, HIDDEN @ WEIGHT.T)


def test_autograd_knows_of_logits_that_an_error_left_behind() -> None:
    leaf = (HIDDEN @ WEIGHT.T).requires_grad_()
    given = leaf * 1
    late = given.square().sum()
    with pytest.raises(NonFiniteError):
        logits(
            replace(BATCH, old_logprob=spoilt(BATCH.old_logprob, 3, torch.nan)),
            logits=given,
            in_place=True,
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_upstream_gradients_keep_their_digits() -> None:
    given = (draw(ROWS, 200) * 3).bfloat16().requires_grad_()
    loss = logits(logits=given).loss
    (whole,) = torch.autograd.grad(loss, given, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, given)
    live = whole != 0
    bias = (third[live].double() * 3 / whole[live].double()).mean() - 1
    assert abs(float(bias)) < 4e-4  # 1 / 3 rounded to bfloat16 is off by 2e-3


def test_gradients_are_not_constants() -> None:
    """Also behind an upstream gradient that is one: `create_graph` must not go unnoticed."""
    weight = WEIGHT.clone().requires_grad_()
    log_p = (HIDDEN @ weight.T).log_softmax(-1)[:, 0]
    for loss in (
        linear(weight=weight).loss,
        logits(logits=HIDDEN @ weight.T).loss,
        ops.policy_loss(log_p, BATCH.old_logprob, BATCH.advantages, CU, recipe=EAPO).loss,
        ops.linear_token_stats(HIDDEN, weight, TARGETS).logprob.sum(),
    ):
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (first.square().sum() + weight.sum()).backward()


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_torch_func_are_refused(transform: str) -> None:
    def policy(x: Tensor) -> Tensor:
        return ops.policy_loss(x[:, 0], BATCH.old_logprob, BATCH.advantages, CU, recipe=EAPO).loss

    def stack(x: Tensor) -> Tensor:
        return x if transform == "grad" else torch.stack([x, x])

    apply = torch.func.grad if transform == "grad" else torch.vmap
    for name, function in (
        ("hidden", lambda x: linear(hidden=x).loss),
        ("logits", lambda x: logits(logits=x @ WEIGHT.T).loss),
        ("logprob", policy),
        ("rewards", lambda x: ops.group_advantages(x[:, 0], TARGETS).sum()),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got a tensor of a torch.func transform"):
            apply(function)(stack(HIDDEN))


def test_autocast_rounds_a_wider_head_as_it_does_for_torch() -> None:
    weight, hidden = WEIGHT.clone().requires_grad_(), HIDDEN.bfloat16()
    with pytest.raises(ValueError, match=r"^weight: got torch.float32, allowed is torch.bfloat16"):
        linear(hidden=hidden, weight=weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear(hidden=hidden, weight=weight).loss
        stats = ops.linear_token_stats(hidden, weight, TARGETS)
    rounded = weight.detach().bfloat16().requires_grad_()
    want = linear(hidden=hidden, weight=rounded).loss
    assert torch.equal(loss, want)
    assert torch.equal(stats.logprob, ops.linear_token_stats(hidden, rounded, TARGETS).logprob)
    loss.backward()
    want.backward()
    assert weight.grad is not None
    assert rounded.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, rounded.grad.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "epo"}, r"recipe: got 'epo', a Recipe is needed"),
        ({"entropy": BATCH.old_logprob[:3]}, r"entropy: got shape \[3\], allowed is \[10\]"),
        ({"entropy": [1.0]}, r"entropy: got list, a torch tensor is needed"),
        ({"stats": [1]}, r"stats: got list, a mapping"),
        ({"logprob": spoilt(BATCH.old_logprob, 3, torch.nan)}, r"logprob: entry 3 is nan"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_statistics_of_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    given = {
        "logprob": BATCH.old_logprob,
        "old_logprob": BATCH.old_logprob,
        "advantages": BATCH.advantages,
        "cu_seqlens": CU,
        "recipe": recipes.get("epo"),
        "entropy": -BATCH.old_logprob,
    }
    with pytest.raises(ValueError, match="^" + message):
        ops.policy_statistics(**given | changes)  # type: ignore[arg-type]


def test_metrics_that_are_not_finite_are_named_too() -> None:
    """The recipe reads no entropy, but the log would."""
    entropy = spoilt(-BATCH.old_logprob, 3, torch.nan)
    with pytest.raises(NonFiniteError, match=r"^entropy: entry 3 is nan \(1 such"):
        ops.policy_loss(
            BATCH.old_logprob, BATCH.old_logprob, BATCH.advantages, CU, recipe=EAPO, entropy=entropy
        )


BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BACKENDS
@pytest.mark.parametrize("scale", ["std", "batch_std"])
def test_rewards_of_any_size(backend: str, scale: str) -> None:
    rewards, groups = torch.tensor([1e25, -1e25, 3e25, 0.0]), torch.zeros(4).long()
    want = ops.group_advantages(rewards.double() / 1e25, groups, scale=scale, eps=0.0)
    got = ops.group_advantages(rewards, groups, scale=scale, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    flat = ops.group_advantages(torch.full((4,), 0.1), groups, eps=0.0, backend=backend)
    assert torch.equal(flat, torch.zeros(4))
    tall = ops.token_advantages(rewards, torch.arange(5), whiten=True)
    torch.testing.assert_close(tall.double(), want, rtol=1e-5, atol=1e-6)


@BACKENDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rewards_that_are_not_finite_are_named(backend: str, value: float) -> None:
    rewards = torch.tensor([1.0, value, 0.0, 2.0])
    with pytest.raises(NonFiniteError, match=rf"^rewards: entry 1 is {value} \(1 such entries\)"):
        ops.group_advantages(rewards, torch.tensor([0, 0, 1, 1]), backend=backend)
    with pytest.raises(NonFiniteError, match=rf"^rewards: entry 1 is {value}"):
        ops.token_advantages(rewards, torch.tensor([0, 4]), whiten=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": "a"}, r"eps: got 'a', allowed is a finite number of 0 or more"),
        ({"eps": float("inf")}, r"eps: got inf, allowed"),
        ({"ddof": True}, r"ddof: got True, allowed is 0 or 1"),
        ({"lengths": torch.tensor([1, -2])}, r"lengths: entry 1 is -2, allowed is 0 or more"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_groups_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        ops.group_advantages(torch.ones(2), torch.zeros(2).long(), **changes)


def test_returns_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens: got list, a torch tensor is needed"):
        ops.token_advantages(torch.ones(3), [0, 3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^gamma: got '1', allowed is 0 to 1"):
        ops.token_advantages(torch.ones(3), torch.tensor([0, 3]), gamma="1")  # type: ignore[arg-type]
