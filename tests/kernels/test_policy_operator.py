"""The policy loss under `torch.compile`, fake tensors, checkpointing and torch's own checks."""

from __future__ import annotations

import policy_cases as cases
import pytest
import torch
from policy_cases import random_case
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from eapo_fast import ops, recipes
from eapo_fast.kernels.policy_loss import operator, recipe_text

_NAMES = ["eapo", "gspo", "kl_cov", "lp_reg", "steer", "siren", "epo"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def _recipe(name):
    return recipes.get(name).replace(max_length=9, beta=0.1)


def _leaves(case, recipe):
    leaves = [case["logprob"].requires_grad_()]
    if recipe.needs_entropy:
        leaves.append(case["entropy"].requires_grad_())
    if recipe.entropy_target:
        leaves.append(case["stats"]["truncated_entropy"].requires_grad_())
    return leaves


def _scaled(case, recipe):
    found = ops.policy_loss(**case | {"logprob": case["logprob"] * 1.0}, recipe=recipe)
    return found.loss * 2 + 1, found


@pytest.mark.parametrize("name", ["eapo", "gspo", "lp_reg", "siren"])
def test_compiles_without_graph_breaks(name):
    recipe, case = _recipe(name), random_case()
    leaves = _leaves(case, recipe)
    wanted, plain = _scaled(case, recipe)
    got, found = torch.compile(_scaled, fullgraph=True, backend="aot_eager")(case, recipe)
    assert torch.equal(got, wanted)
    assert found.metrics == plain.metrics
    for key in ("a", "b", "token_loss"):
        assert torch.equal(getattr(found, key), getattr(plain, key))
    slopes = torch.autograd.grad(wanted, leaves)
    for slope, other in zip(slopes, torch.autograd.grad(got, leaves), strict=True):
        torch.testing.assert_close(other, slope)


def test_compiled_code_follows_the_recipe():
    case = random_case()
    compiled = torch.compile(_scaled, fullgraph=True, backend="eager")
    for epsilon in (0.2, 0.05):
        recipe = recipes.get("eapo").replace(epsilon=epsilon, epsilon_high=epsilon)
        assert torch.equal(compiled(case, recipe)[0], _scaled(case, recipe)[0])


def test_one_graph_for_many_lengths():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(_scaled, fullgraph=True, dynamic=True, backend=count)
    case, recipe = random_case(), _recipe("eapo")
    case["stats"] = {}
    for last in (6, 5, 4, 3):
        part = {k: v if k == "stats" else v.clone() for k, v in cases.part(case, 0, last).items()}
        assert torch.equal(compiled(part, recipe)[0], _scaled(part, recipe)[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("name", _NAMES)
def test_fake_tensors_have_the_real_shapes(name):
    recipe, case = _recipe(name), random_case()
    real = ops.policy_loss(**case, recipe=recipe)
    with FakeTensorMode() as mode:
        fake_case = {k: mode.from_tensor(v) for k, v in case.items() if k != "stats"}
        fake_case["stats"] = {k: mode.from_tensor(v) for k, v in case["stats"].items()}
        fake = ops.policy_loss(**fake_case, recipe=recipe)
    for key in ("loss", "a", "b", "token_loss", *(["c"] if recipe.entropy_target else [])):
        assert getattr(fake, key).shape == getattr(real, key).shape
        assert getattr(fake, key).dtype == getattr(real, key).dtype
    assert fake.metrics.keys() == real.metrics.keys()


@pytest.mark.parametrize(
    ("name", "backend"),
    [("eapo", "reference"), ("gspo", "reference"), ("siren", "reference"), ("eapo", "cpu")],
)
def test_operator_is_sound(name, backend):
    """torch's own checks of schema, fake tensors and autograd registration."""
    recipe, case = _recipe(name), random_case()
    if backend == "cpu":
        del case["stats"]
        case = {k: v.float() if v.is_floating_point() else v for k, v in case.items()}
        case["stats"] = {}
    _leaves(case, recipe)
    stats = case["stats"]
    arguments = (
        case["logprob"],
        case["entropy"],
        stats.get("truncated_entropy") if recipe.entropy_target else None,
        case["old_logprob"],
        case["advantages"],
        case["cu_seqlens"],
        case["mask"],
        case["ref_logprob"],
        [values.detach() for values in stats.values()],
        " ".join(stats),
        torch.tensor(15),
        None,
        recipe_text(recipe),
        backend,
    )
    torch.library.opcheck(
        operator.policy_loss,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_checkpointing_and_hooks():
    case, recipe = random_case(), _recipe("eapo")
    plain = torch.randn(21, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return ops.policy_loss(**case | {"logprob": case["old_logprob"] + x}, recipe=recipe).loss

    (wanted,) = torch.autograd.grad(loss(plain), plain)
    seen = []
    plain.register_hook(seen.append)
    checkpoint(loss, plain, use_reentrant=False).backward()
    assert torch.equal(plain.grad, wanted)
    assert torch.equal(seen[0], wanted)


def test_autocast_does_not_round():
    case, recipe = random_case(), _recipe("gspo")
    wanted = ops.policy_loss(**case, recipe=recipe)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.policy_loss(**case, recipe=recipe)
    assert torch.equal(found.a, wanted.a)


def test_without_gradients_nothing_is_recorded():
    found = ops.policy_loss(**random_case(), recipe=_recipe("eapo"))
    assert not found.loss.requires_grad
    with torch.no_grad():
        case = random_case()
        case["logprob"].requires_grad_()
        assert not ops.policy_loss(**case, recipe=_recipe("eapo")).loss.requires_grad
    assert cases.counts(random_case())["num_tokens"] == 15
