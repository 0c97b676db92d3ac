from __future__ import annotations

import itertools
from dataclasses import fields, replace

import policy_oracle as oracle
import pytest
import torch

from eapo_fast import ops, recipes

_DOUBLE = torch.float64
_CU = [0, 5, 5, 9, 10, 17]
_WIDTH, _VOCAB = 4, 13


def _problem(seed=1, dtype=_DOUBLE):
    """Head and batch whose ratios lie around 1, with masked rows in every place."""
    generator = torch.Generator().manual_seed(seed)
    rows, sequences = _CU[-1], len(_CU) - 1

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=_DOUBLE)

    hidden, weight = normal(rows, _WIDTH), normal(_VOCAB, _WIDTH)
    targets = torch.randint(_VOCAB, (rows,), generator=generator)
    logprob, _ = oracle.naive_stats(hidden, weight, targets)
    batch = ops.PolicyBatch(
        old_logprob=logprob + 0.4 * normal(rows),
        advantages=normal(sequences),
        cu_seqlens=torch.tensor(_CU),
        mask=torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0]),
        ref_logprob=logprob + 0.4 * normal(rows),
    )
    return hidden.to(dtype), weight.to(dtype), targets, batch


def _everything():
    yield from (recipes.get(name).replace(max_length=6) for name in oracle.plain_recipes())
    yield recipes.get("eapo").replace(name="kl and entropy", beta=0.2, entropy_coef=0.05, delta=1.5)
    yield recipes.get("gspo").replace(name="gspo with both", beta=0.2, entropy_coef=0.05)


_RECIPES = list(_everything())


def _naive(recipe, hidden, weight, targets, batch, **head):
    logprob, entropy = oracle.naive_stats(hidden, weight, targets, **head)
    loss, _ = oracle.policy_loss(
        recipe, logprob, batch.old_logprob, batch.advantages, batch.cu_seqlens.tolist(),
        batch.mask.bool(), entropy, batch.ref_logprob,
    )  # fmt: skip
    return loss


@pytest.mark.parametrize("chunk", [1, 5, None], ids="chunk {}".format)
@pytest.mark.parametrize("recipe", _RECIPES, ids=lambda r: r.name)
def test_against_autograd_through_all_logits(recipe, chunk):
    hidden, weight, targets, batch = _problem()
    head = {
        "bias": torch.linspace(-1, 1, _VOCAB, dtype=_DOUBLE),
        "temperature": 0.8,
        "softcap": 4.0,
    }
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), head["bias"].requires_grad_()]
    found = ops.linear_policy_loss(hidden, weight, targets, batch, recipe, chunk_size=chunk, **head)
    wanted = _naive(recipe, hidden, weight, targets, batch, **head)
    torch.testing.assert_close(found.loss, wanted.detach())
    got = torch.autograd.grad(found.loss * 0.5, leaves)
    for g, w in zip(got, torch.autograd.grad(wanted * 0.5, leaves), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("recipe", _RECIPES, ids=lambda r: r.name)
def test_equals_stats_then_policy_loss(recipe):
    hidden, weight, targets, batch = _problem(2)
    stats = ops.linear_token_stats(hidden, weight, targets)
    given = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "group_ids"}
    apart = ops.policy_loss(stats.logprob, entropy=stats.entropy, recipe=recipe, **given)
    for trained in (False, True):
        fused = ops.linear_policy_loss(
            hidden.requires_grad_(trained), weight, targets, batch, recipe, chunk_size=3
        )
        assert fused.loss.requires_grad == trained
        for name in ("loss", "a", "b", "token_loss"):
            torch.testing.assert_close(getattr(fused, name).detach(), getattr(apart, name))
        assert fused.metrics.keys() == apart.metrics.keys()
        for name, value in apart.metrics.items():
            torch.testing.assert_close(fused.metrics[name], value)


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_masked_rows_may_hold_anything(name):
    hidden, weight, targets, batch = _problem(3)
    live = batch.mask.bool()
    banned = (torch.tensor([0, 4, 16, 9]), torch.tensor([1, 2, 3, 4]))
    clean = ops.linear_policy_loss(hidden, weight, targets, batch, recipes.get(name), banned=banned)
    hidden[~live] = torch.nan
    targets[~live] = -100
    hidden.requires_grad_(), weight.requires_grad_()
    dirty = ops.linear_policy_loss(hidden, weight, targets, batch, recipes.get(name), banned=banned)
    dirty.loss.backward()
    torch.testing.assert_close(dirty.loss.detach(), clean.loss)
    assert not hidden.grad[~live].any()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("recipe", _RECIPES, ids=lambda r: r.name)
def test_banned_entries_follow_their_rows(recipe):
    hidden, weight, targets, batch = _problem(4)
    banned = (torch.arange(17), (targets + 1 + torch.arange(17) % 5) % _VOCAB)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    found = ops.linear_policy_loss(
        hidden, weight, targets, batch, recipe, banned=banned, chunk_size=4
    )
    wanted = _naive(recipe, hidden, weight, targets, batch, banned=banned)
    got = torch.autograd.grad(found.loss, leaves)
    for g, w in zip(got, torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("recipe", _RECIPES, ids=lambda r: r.name)
def test_micro_batches_add_up(recipe):
    hidden, weight, targets, batch = _problem(5)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    whole = ops.linear_policy_loss(hidden, weight, targets, batch, recipe)
    wanted = torch.autograd.grad(whole.loss, leaves)
    sums = [torch.zeros_like(x) for x in leaves]
    total = torch.zeros((), dtype=_DOUBLE)
    for first, last in ((0, 1), (1, 4), (4, 5)):
        rows = slice(_CU[first], _CU[last])
        part = replace(
            batch,
            old_logprob=batch.old_logprob[rows],
            advantages=batch.advantages[first:last],
            cu_seqlens=batch.cu_seqlens[first : last + 1] - _CU[first],
            mask=batch.mask[rows],
            ref_logprob=batch.ref_logprob[rows],
            num_tokens=int(batch.mask.sum()),
            num_sequences=torch.tensor(4),
        )
        found = ops.linear_policy_loss(hidden[rows], weight, targets[rows], part, recipe)
        total += found.loss.detach()
        for gathered, g in zip(sums, torch.autograd.grad(found.loss, leaves), strict=True):
            gathered += g
    torch.testing.assert_close(total, whole.loss.detach())
    for g, w in zip(sums, wanted, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["dapo", "gmpo"])
def test_gradcheck(name):
    hidden, weight, targets, batch = _problem(6)
    recipe = recipes.get(name).replace(beta=0.1, entropy_coef=0.02)

    def loss(h, w):
        return ops.linear_policy_loss(h, w, targets, batch, recipe, chunk_size=7).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_frozen_parts_get_no_gradient(name, frozen):
    hidden, weight, targets, batch = _problem(7)
    both = {"hidden": hidden, "weight": weight}
    trained = next(x for key, x in both.items() if key != frozen).requires_grad_()
    ops.linear_policy_loss(hidden, weight, targets, batch, recipes.get(name)).loss.backward()
    assert both[frozen].grad is None
    assert trained.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_no_worse_than_its_inputs(dtype):
    hidden, weight, targets, batch = _problem(8, dtype)
    recipe = recipes.get("eapo").replace(entropy_coef=0.01)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = ops.linear_policy_loss(hidden, weight, targets, batch, recipe, backend="reference")
    exact = ops.linear_policy_loss(*wide, targets, batch, recipe)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(found.loss, leaves)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    for g, w in zip(got, torch.autograd.grad(exact.loss, wide), strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), w, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize(
    "recipe", [*_RECIPES, recipes.get("siren").replace(max_length=9)], ids=lambda r: r.name
)
def test_nothing_to_train_on_is_a_loss_of_zero(recipe):
    hidden, weight, targets, batch = _problem()
    batch = replace(batch, mask=torch.zeros(17))
    hidden.requires_grad_(), weight.requires_grad_()
    found = ops.linear_policy_loss(hidden * torch.nan, weight, targets, batch, recipe)
    found.loss.backward()
    assert found.loss.item() == 0
    assert not weight.grad.any()
    assert all(value == 0 for value in found.metrics.values())


def test_the_same_bits_again():
    hidden, weight, targets, batch = _problem(9, torch.float32)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    runs = [
        torch.autograd.grad(
            ops.linear_policy_loss(hidden, weight, targets, batch, recipes.get("eapo")).loss, leaves
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_retained_graph_can_be_walked_twice():
    hidden, weight, targets, batch = _problem(9)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for name in ("eapo", "gspo"):
        loss = ops.linear_policy_loss(hidden, weight, targets, batch, recipes.get(name)).loss
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(itertools.starmap(torch.equal, zip(first, second, strict=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.zeros(16).long()}, r"targets: got shape \[16\], allowed is \[17\]"),
        ({"targets": torch.full((17,), 99)}, r"targets: got values from 99 to 99"),
        ({"hidden": torch.zeros(3, 4)}, r"targets: got shape \[17\], allowed is \[3\]"),
        ({"backend": "flash"}, r"linear_policy_loss has no 'flash' implementation"),
        ({"recipe": recipes.get("dr_grpo")}, r"divides by max_length"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    names = ("hidden", "weight", "targets", "batch")
    arguments = dict(zip(names, _problem(), strict=True)) | {"recipe": recipes.get("eapo")}
    with pytest.raises(ValueError, match=message):
        ops.linear_policy_loss(**arguments | changes)
