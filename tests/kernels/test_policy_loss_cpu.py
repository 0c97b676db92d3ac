"""The compiled policy loss against the float64 reference: instruction sets, sizes, dtypes."""

from __future__ import annotations

import itertools
import math

import policy_cases as cases
import pytest
import torch
from policy_cases import GRID

from eapo_fast import _core, ops, recipes
from eapo_fast.kernels.policy_loss import compiled

_LOCAL = [r for r in GRID if r.locality == "token-local" and r.entropy_band is None]
_POISON = (torch.nan, torch.inf, -torch.inf)


@pytest.fixture(params=_core.supported_isas())
def isa(request):
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def _case(rows, seed=1, dtype=torch.float32, poison=None):
    """A batch of `rows` tokens in sequences of 0 to 40, some of them masked out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size, scale=1.0, shift=0.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift

    edges = [0]
    while edges[-1] < rows:
        step = int(torch.randint(0, 41, (), generator=generator))
        edges.append(min(rows, edges[-1] + step))
    logprob = normal(rows, 0.8, -1.5)
    case = {
        "logprob": logprob,
        "old_logprob": logprob + normal(rows, 0.6),
        "advantages": normal(len(edges) - 1),
        "entropy": normal(rows).abs(),
        "ref_logprob": logprob + normal(rows, 0.5),
    }
    mask = torch.rand(rows, generator=generator) > 0.25
    if len(case["advantages"]):
        case["advantages"][0] = 0.0
    if poison is not None:
        for name in ("logprob", "old_logprob", "entropy", "ref_logprob"):
            case[name][~mask] = poison
    case = {name: values.to(dtype) for name, values in case.items()}
    return case | {"mask": mask, "cu_seqlens": torch.tensor(edges)}


def _wide(case):
    floats = {k: v.double() for k, v in case.items() if v.is_floating_point()}
    return case | floats


def _compare(case, recipe, **more):
    found = ops.policy_loss(**case, **more, recipe=recipe, backend="cpu")
    more = {k: _wide(v) if k == "stats" else v for k, v in more.items()}
    wanted = ops.policy_loss(**_wide(case), **more, recipe=recipe, backend="reference")
    assert found.loss.dtype == found.a.dtype == found.token_loss.dtype == torch.float32
    close = {"check_dtype": False, "rtol": 3e-6, "atol": 3e-6}
    for name in ("loss", "token_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), **close)
    share = max(wanted.a.abs().max().item(), 1e-30) if len(wanted.a) else 1.0
    for name in ("a", "b"):
        torch.testing.assert_close(
            getattr(found, name) / share, getattr(wanted, name) / share, **close
        )
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, **close)
    return found


@pytest.mark.parametrize("recipe", _LOCAL, ids=lambda r: r.name)
def test_against_the_reference(isa, recipe):
    for rows in (1, 63, 100):
        _compare(_case(rows), recipe)
    case = _case(2047, seed=2)
    factor = torch.linspace(0.1, 2.0, 2047)
    _compare(case | {"advantages": torch.randn(2047)}, recipe, stats={"weight": factor})


@pytest.mark.parametrize("present", list(itertools.product([0, 1], repeat=3)), ids=str)
def test_optional_inputs(isa, present):
    case = _case(333)
    for name, given in zip(("mask", "ref_logprob", "entropy"), present, strict=True):
        case = case if given else {k: v for k, v in case.items() if k != name}
    for name in ("dapo", "cispo", "rloo", "reinforce"):
        _compare(case, recipes.get(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs(dtype):
    case = _case(500, dtype=dtype)
    recipe = recipes.get("dapo").replace(beta=0.1, entropy_coef=0.01)
    _compare(case, recipe)
    case["logprob"].requires_grad_()
    ops.policy_loss(**case, recipe=recipe).loss.backward()
    assert case["logprob"].grad.dtype == dtype


@pytest.mark.parametrize("poison", _POISON, ids=str)
def test_masked_tokens_may_hold_anything(isa, poison):
    recipe = recipes.get("dapo").replace(beta=0.1, entropy_coef=0.01)
    found = _compare(_case(700), recipe)
    dirty = ops.policy_loss(**_case(700, poison=poison), recipe=recipe, backend="cpu")
    assert torch.equal(dirty.loss, found.loss)
    assert torch.equal(dirty.a, found.a)
    assert dirty.metrics == found.metrics


def test_small_kl_is_exact(isa):
    """k3 of nearly equal log-probabilities is far below 1, from which it must not be subtracted."""
    recipe = recipes.get("grpo").replace(beta=1.0)
    excess = torch.logspace(-6, 1.4, 200, dtype=torch.float64)
    excess = torch.cat([excess, -excess])
    ref = torch.zeros(400, dtype=torch.float64)
    case = {
        "logprob": excess.float(),
        "old_logprob": excess.float(),
        "ref_logprob": ref.float(),
        "advantages": torch.zeros(1),
        "cu_seqlens": torch.tensor([0, 400]),
    }
    found = ops.policy_loss(**case, recipe=recipe, backend="cpu")
    inside = case["logprob"].double().clamp(-20, 20)
    wanted = torch.expm1(-inside) + inside
    torch.testing.assert_close(found.token_loss.double(), wanted, rtol=1e-5, atol=0)


def test_ratios_and_limits(isa):
    drift = torch.tensor([0.0, 19.99, 20.0, 25.0, -19.99, -25.0, 1e-8, -0.69, 300.0, -1e4])
    case = {
        "logprob": drift,
        "old_logprob": torch.zeros(10),
        "advantages": -torch.ones(1),
        "cu_seqlens": torch.tensor([0, 10]),
    }
    found = _compare(case, recipes.get("rloo"))
    exact = drift.double().clamp(-20, 20).exp()
    torch.testing.assert_close(found.token_loss.double(), exact, rtol=4e-7, atol=0)
    assert (found.a[[3, 5, 8, 9]] == 0).all()
    assert found.a[0] == pytest.approx(0.1)


def test_same_for_any_number_of_threads(isa):
    case, recipe = _case(50_000), recipes.get("dapo").replace(beta=0.1)
    before = _core.num_threads()
    found = []
    for threads in (1, 2, 3):
        _core.set_num_threads(threads)
        found.append(ops.policy_loss(**case, recipe=recipe, backend="cpu"))
    _core.set_num_threads(before)
    assert found[0].loss == found[1].loss == found[2].loss
    assert all(torch.equal(f.a, found[0].a) for f in found)
    assert all(f.metrics == found[0].metrics for f in found)


@pytest.mark.parametrize("recipe", _LOCAL, ids=lambda r: r.name)
def test_parts_add_up(recipe):
    case = _case(900) | {"stats": {}}
    counts, last = cases.counts(case), len(case["advantages"])
    whole = ops.policy_loss(**case, recipe=recipe, backend="cpu")
    parts = [
        ops.policy_loss(**cases.part(case, *cut), **counts, recipe=recipe, backend="cpu")
        for cut in ((0, 5), (5, 5), (5, 17), (17, last))
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([p.a for p in parts]), whole.a)


def test_nothing_to_train_on(isa):
    case = _case(40)
    for recipe in _LOCAL:
        empty = ops.policy_loss(**case | {"mask": torch.zeros(40)}, recipe=recipe, backend="cpu")
        assert empty.loss == 0
        assert not empty.a.any()
        assert not any(empty.metrics.values())
    none = {k: v[:0] for k, v in case.items()} | {"cu_seqlens": torch.tensor([0])}
    assert ops.policy_loss(**none, recipe=recipes.get("eapo"), backend="cpu").loss == 0


def test_input_that_is_not_finite_is_named(isa):
    for poison in (torch.nan, torch.inf):
        case = _case(300)
        at = int(case["mask"].nonzero()[-1])
        case["old_logprob"][at] = case["logprob"][at] = poison
        with pytest.raises(ValueError, match=rf"^logprob: entry {at} is {poison}"):
            ops.policy_loss(**case, recipe=recipes.get("eapo"), backend="cpu")


def test_mask_counts():
    """Counting goes eight flags at a time, 255 words to a sum."""
    for rows in (7, 8, 9, 2040, 2041, 5000):
        mask = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) > 0.1
        zeros = torch.zeros(rows)
        recipe = recipes.get("reinforce").replace(aggregation="seq-mean-token-mean")
        found = ops.policy_loss(
            zeros, zeros, torch.ones(1), torch.tensor([0, rows]), mask=mask, recipe=recipe
        )
        assert math.isclose(found.a[mask].double().sum().item(), -1, rel_tol=1e-5)
        assert math.isclose(1 / found.a[mask][0].item(), -int(mask.sum()), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": recipes.get("gspo")}, r"recipe 'gspo' looks at more than one"),
        ({"recipe": recipes.get("epo")}, r"recipe 'epo' looks at more than one"),
        ({"logprob": torch.zeros(20, dtype=torch.float64)}, r"computes in float32, got float64"),
    ],
    ids=["gspo", "epo", "float64"],
)
def test_refusals(changes, reason):
    case = {"recipe": recipes.get("eapo"), **_case(20), **changes}
    with pytest.raises(ValueError, match=rf"policy_loss cannot run on 'cpu' here: .*{reason}"):
        ops.policy_loss(**case, backend="cpu")
    assert torch.isfinite(ops.policy_loss(**case).loss)


def test_auto_takes_the_compiled_kernel(monkeypatch):
    called = []
    kernel = compiled.policy_loss
    monkeypatch.setattr(compiled, "policy_loss", lambda *a: called.append(1) or kernel(*a))
    ops.policy_loss(**_case(20), recipe=recipes.get("eapo"))
    assert called
