"""Coefficients against finite differences through the logits, and what must not matter."""

from __future__ import annotations

import itertools

import policy_cases as cases
import pytest
import torch
from policy_cases import DOUBLE, GRID

from eapo_fast import ops
from eapo_fast.kernels.policy_loss import reference
from eapo_fast.kernels.policy_loss.rows import trained_rows
from eapo_fast.kernels.policy_loss.statistics import missing_statistics, resolve

_CU = [0, 4, 4, 9, 10, 13, 15, 19, 22]
_GROUPS = [0, 0, 1, 1, 2, 3, 3, 3]  # 1 is constant, 2 has one member
_REWARDS = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 1.0, 0.25]
_VOCAB = 6
_STEP = 1e-5


class _Problem:
    """Logits of packed tokens; sequence 1 is empty, sequence 5 all masked out."""

    def __init__(self, recipe, seed=5):
        generator = torch.Generator().manual_seed(seed)
        rows = _CU[-1]

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=DOUBLE)

        self.recipe, self.logits = recipe, normal(rows, _VOCAB) * 1.5
        self.targets = torch.randint(_VOCAB, (rows,), generator=generator)
        target = recipe.entropy_target
        self.top_p = None if target is None else target.top_p
        self.kept = ops.truncated_entropy(self.logits, top_p=self.top_p).kept
        mask = torch.rand(rows, generator=generator) > 0.2
        mask[_CU[5] : _CU[6]] = False
        logprob, entropy, truncated = self.statistics(self.logits)
        old = logprob + 0.4 * normal(rows)
        self.case = {
            "logprob": logprob,
            "old_logprob": old,
            "advantages": ops.group_advantages(
                torch.tensor(_REWARDS, dtype=DOUBLE),
                torch.tensor(_GROUPS),
                center=recipe.center,
                scale=recipe.scale,
                lengths=torch.tensor(_CU).diff(),
            ),
            "cu_seqlens": torch.tensor(_CU),
            "mask": mask,
            "entropy": entropy,
            "ref_logprob": logprob + 0.3 * normal(rows),
            "stats": {
                "old_entropy": entropy * 1.1,
                "max_logprob": old + normal(rows).abs(),
                "kept_mass": 1 - 0.3 * torch.rand(rows, generator=generator, dtype=DOUBLE),
                "truncated_entropy": truncated,
                "anchor": torch.tensor(0.2, dtype=DOUBLE),
            },
        }
        self.case = cases.forced(self.case, recipe)

    def statistics(self, logits):
        """l, H and Ht, the truncated set being the one of the unmoved logits."""
        log_p = logits.log_softmax(-1)
        logprob = log_p.gather(1, self.targets[:, None]).squeeze(1)
        empty = ~self.kept.any(-1)
        inside = logits.masked_fill(~(self.kept | empty[:, None]), -1e30).log_softmax(-1)
        truncated = -(inside.exp() * inside).sum(-1).masked_fill(empty, 0.0)
        return logprob, -(log_p.exp() * log_p).sum(-1), truncated

    def loss(self, logits):
        """The oracle's loss, with all that the method does not differentiate held in place."""
        logprob, entropy, truncated = self.statistics(logits)
        stats = self.case["stats"] | {"truncated_entropy": truncated}
        moved = self.case | {"logprob": logprob, "entropy": entropy, "stats": stats}
        held = {
            "logprob": self.case["logprob"],
            "entropy": self.case["entropy"],
            "truncated_entropy": self.case["stats"]["truncated_entropy"],
        }
        return cases.wanted(self.recipe, moved, held=held)[0].item()

    def slope(self, found):
        """dloss/dlogits from the coefficients: `DESIGN.md`, idea 2."""
        log_p = self.logits.log_softmax(-1)
        onehot = torch.nn.functional.one_hot(self.targets, _VOCAB)
        slope = found.a[:, None] * (onehot - log_p.exp())
        entropy = self.case["entropy"][:, None]
        slope += found.b[:, None] * (-log_p.exp() * (log_p + entropy))
        if found.c is not None:
            inside = self.logits.masked_fill(~self.kept, -torch.inf).log_softmax(-1)
            truncated = self.case["stats"]["truncated_entropy"][:, None]
            extra = found.c[:, None] * (-inside.exp() * (inside + truncated))
            slope += torch.where(self.kept, extra, 0.0)
        return slope


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_finite_differences_through_the_logits(recipe):
    problem = _Problem(recipe)
    found = ops.policy_loss(**problem.case, recipe=recipe)
    slope = problem.slope(found)
    generator = torch.Generator().manual_seed(9)
    for _ in range(5):
        way = torch.randn(problem.logits.shape, generator=generator, dtype=DOUBLE)
        up, down = (problem.loss(problem.logits + s * way) for s in (_STEP, -_STEP))
        assert (slope * way).sum().item() == pytest.approx(
            (up - down) / (2 * _STEP), rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_expert_tokens_of_any_length_change_nothing(recipe):
    case = _Problem(recipe).case
    plain = ops.policy_loss(**case, recipe=recipe)
    generator = torch.Generator().manual_seed(2)
    cu, places, lengths = case["cu_seqlens"].tolist(), [], []
    for start, stop in itertools.pairwise(cu):
        for row in range(start, stop):
            places += [-1] * int(torch.randint(0, 4, (), generator=generator)) + [row]
        places += [-1] * int(torch.randint(0, 30, (), generator=generator))
        lengths.append(len(places))
    index = torch.tensor(places)

    def spread(values):
        whole = isinstance(values, torch.Tensor) and values.shape[:1] == case["mask"].shape
        if not whole:
            return values
        fill = torch.nan if values.is_floating_point() else 0
        return torch.where(index < 0, fill, values[index]).to(values.dtype)

    longer = {k: spread(v) for k, v in case.items() if k != "stats"}
    longer["stats"] = {k: spread(v) for k, v in case["stats"].items()}
    longer["cu_seqlens"] = torch.tensor([0, *lengths])
    found = ops.policy_loss(**longer, recipe=recipe)
    assert torch.equal(found.loss, plain.loss)
    own = index >= 0
    for name in ("a", "b", "token_loss", *([] if plain.c is None else ["c"])):
        assert torch.equal(getattr(found, name)[own], getattr(plain, name))
        assert not getattr(found, name)[~own].any()
    assert found.metrics == plain.metrics


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: r.name)
def test_resolved_rows_can_be_evaluated_in_any_pieces(recipe):
    case = _Problem(recipe).case
    batch = ops.PolicyBatch(
        **{k: v for k, v in case.items() if k not in ("logprob", "entropy")},
    )
    rows = trained_rows(batch, recipe, DOUBLE)
    own = [rows.gather(case[k]) for k in ("logprob", "entropy")]
    rows, _ = resolve(rows, recipe, *own, rows.gather(case["stats"]["truncated_entropy"]))
    assert not missing_statistics(recipe, {**rows.stats, **rows.shared})
    whole = reference.token_terms(rows, recipe, *own)
    sequence = recipe.ratio != "token" or recipe.surrogate == "geo_mean"
    if sequence or (recipe.entropy_band and recipe.entropy_band.level == "sequence"):
        return
    pieces = [
        reference.token_terms(rows.part(i, i + 3), recipe, *(x[i : i + 3] for x in own))
        for i in range(0, len(own[0]), 3)
    ]
    for name in ("loss", "a", "b", "c"):
        found = [getattr(p, name) for p in pieces]
        if getattr(whole, name) is None:
            assert all(f is None for f in found)
        else:
            assert torch.equal(torch.cat(found), getattr(whole, name))


@pytest.mark.parametrize("recipe", [r for r in GRID if not r.entropy_target], ids=lambda r: r.name)
def test_fused_head_fills_the_same_gradient(recipe):
    problem = _Problem(recipe)
    hidden = problem.logits.clone().requires_grad_()
    batch = ops.PolicyBatch(
        **{k: v for k, v in problem.case.items() if k not in ("logprob", "entropy")},
    )
    eye = torch.eye(_VOCAB, dtype=DOUBLE)
    fused = ops.linear_policy_loss(hidden, eye, problem.targets, batch, recipe, chunk_size=4)
    fused.loss.backward()
    apart = ops.policy_loss(**problem.case, recipe=recipe)
    torch.testing.assert_close(fused.loss.detach(), apart.loss)
    torch.testing.assert_close(hidden.grad, problem.slope(apart))


def test_oracle_and_op_see_the_same_truncated_entropy():
    recipe = next(r for r in GRID if r.entropy_target)
    problem = _Problem(recipe)
    cut = ops.truncated_entropy(problem.logits, top_p=problem.top_p)
    torch.testing.assert_close(cut.entropy, problem.statistics(problem.logits)[2])
