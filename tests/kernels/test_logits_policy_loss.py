"""`ops.logits_policy_loss` against autograd in float64, and what it does with bad rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eapo_fast import _core, ops, recipes
from eapo_fast.kernels.linear_token_stats.finite import NonFiniteError
from eapo_fast.recipes import Recipe

CU = [0, 5, 5, 12, 21]
RECIPES = ("eapo", "dapo", "gspo", "gmpo", "cispo", "ppo_dual_clip", "clip_cov", "siren")
LOCAL = ("eapo", "cispo", "ppo_dual_clip")


def case(vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, ops.PolicyBatch]:
    """Logits with an outlier, a banned token and far more than one block of columns."""
    g = torch.Generator().manual_seed(seed)
    rows = CU[-1]
    logits = torch.randn(rows, vocab, generator=g) * 3
    logits[1, vocab // 2] = 20.0
    logits[2, vocab // 3] = -torch.inf
    logits[3] -= 20.0
    logits[4, : vocab // 2] = torch.finfo(torch.bfloat16).min
    logits = logits.to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    targets[2], targets[4] = 0, vocab - 1
    own = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    batch = ops.PolicyBatch(
        old_logprob=own.float() + 0.3 * torch.randn(rows, generator=g),
        advantages=torch.randn(len(CU) - 1, generator=g),
        cu_seqlens=torch.tensor(CU),
        mask=torch.rand(rows, generator=g) > 0.2,
        ref_logprob=own.float() + 0.2 * torch.randn(rows, generator=g),
    )
    return logits, targets, batch


def exact(
    logits: Tensor, targets: Tensor, batch: ops.PolicyBatch, recipe: Recipe, temperature: float
) -> tuple[ops.LossOutput, Tensor]:
    leaf = logits.double().requires_grad_()
    found = ops.logits_policy_loss(
        leaf, targets, batch, recipe, temperature=temperature, backend="reference"
    )
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    return found, gradient


def variants(name: str) -> Recipe:
    recipe = recipes.get(name)
    if recipe.entropy_target is not None:
        return recipe
    return recipe.replace(beta=0.1, kl="k3", entropy_coef=0.01 if name == "eapo" else 0.0)


def test_the_reference_is_policy_loss_behind_a_softmax() -> None:
    logits, targets, batch = case(300, torch.float64)
    leaf = logits.requires_grad_()
    log_p = (leaf / 0.7).log_softmax(-1)
    want = ops.policy_loss(
        log_p.gather(1, targets[:, None])[:, 0],
        batch.old_logprob,
        batch.advantages,
        batch.cu_seqlens,
        recipe=recipes.get("eapo"),
        mask=batch.mask,
    ).loss
    (expected,) = torch.autograd.grad(want, leaf)
    found, gradient = exact(logits, targets, batch, recipes.get("eapo"), 0.7)
    torch.testing.assert_close(found.loss, want)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "siren"])
@pytest.mark.parametrize("vocab", [7, 33, 2048, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_losses_and_gradients_are_those_of_autograd(
    name: str, vocab: int, dtype: torch.dtype, temperature: float
) -> None:
    logits, targets, batch = case(vocab, dtype)
    recipe = variants(name)
    want, slope = exact(logits, targets, batch, recipe, temperature)
    leaf = logits.clone().requires_grad_()
    found = ops.logits_policy_loss(
        leaf, targets, batch, recipe, temperature=temperature, backend="cpu"
    )
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), want.loss, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.a.double(), want.a, rtol=1e-4, atol=1e-6)
    for metric, value in want.metrics.items():
        torch.testing.assert_close(found.metrics[metric].double(), value, rtol=1e-4, atol=1e-5)
    assert leaf.grad is not None
    room = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    error = (leaf.grad.double() - slope).norm(dim=1)
    lost = (2 * (found.a - want.a).abs() + 2e-7 * want.a.abs()) / temperature  # a, and 1 - p
    assert bool((error <= room * slope.norm(dim=1) + lost).all())
    torch.testing.assert_close(leaf.detach(), logits, rtol=0, atol=0)  # not overwritten


@pytest.mark.parametrize("name", ["eapo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_gives_the_same_bits_and_says_so_to_autograd(
    name: str, dtype: torch.dtype
) -> None:
    logits, targets, batch = case(5001, dtype)
    recipe = recipes.get(name)
    apart = logits.clone().requires_grad_()
    ops.logits_policy_loss(apart, targets, batch, recipe).loss.backward()
    leaf = logits.clone().requires_grad_()
    copy = leaf * 1
    late = copy.square().sum()
    loss = ops.logits_policy_loss(copy, targets, batch, recipe, in_place=True).loss
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert apart.grad is not None
    assert torch.equal(gradient, apart.grad)
    assert gradient.data_ptr() == copy.data_ptr() or torch.equal(copy.detach(), gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("vocab", [31, 2049, 6000])
def test_every_instruction_set_agrees(vocab: int) -> None:
    logits, targets, batch = case(vocab, torch.bfloat16)
    want, slope = exact(logits, targets, batch, recipes.get("eapo"), 1.0)
    leaf = logits.clone().requires_grad_()
    found = ops.logits_policy_loss(leaf, targets, batch, recipes.get("eapo"), backend="cpu")
    found.loss.backward()
    torch.testing.assert_close(found.loss.double(), want.loss, rtol=2e-5, atol=2e-5)
    assert leaf.grad is not None
    assert float((leaf.grad.double() - slope).norm() / slope.norm()) < 2**-8


@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_threads_change_no_bit(name: str) -> None:
    logits, targets, batch = case(70_001, torch.bfloat16)  # several calls of a parallel body
    found = []
    before = _core.num_threads()
    try:
        for threads in (1, 2, 5):
            _core.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            ops.logits_policy_loss(leaf, targets, batch, recipes.get(name)).loss.backward()
            found.append(leaf.grad)
    finally:
        _core.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["eapo", "gspo"])
def test_masked_rows_may_hold_anything(backend: str, name: str) -> None:
    logits, targets, batch = case(300, torch.float32)
    assert batch.mask is not None
    leaf = logits.clone().requires_grad_()
    want = ops.logits_policy_loss(leaf, targets, batch, recipes.get(name), backend=backend).loss
    (expected,) = torch.autograd.grad(want, leaf)
    out = ~batch.mask
    logits[out], targets[out] = torch.nan, -100
    leaf = logits.clone().requires_grad_()
    found = ops.logits_policy_loss(leaf, targets, batch, recipes.get(name), backend=backend).loss
    (gradient,) = torch.autograd.grad(found, leaf)
    assert torch.equal(found, want)
    assert torch.equal(gradient, expected)
    assert not gradient[out].any()


def test_the_linear_loss_is_this_one_behind_a_product() -> None:
    g = torch.Generator().manual_seed(1)
    _, targets, batch = case(777, torch.float32)
    hidden = torch.randn(CU[-1], 24, generator=g, requires_grad=True)
    weight = torch.randn(777, 24, generator=g, requires_grad=True)
    recipe = recipes.get("dapo")
    ops.linear_policy_loss(hidden, weight, targets, batch, recipe).loss.backward()
    want = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    ops.logits_policy_loss(logits, targets, batch, recipe, in_place=True).loss.backward()
    torch.testing.assert_close((hidden.grad, weight.grad), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["eapo", "gspo"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_without_a_distribution_is_named(
    dtype: torch.dtype, value: float, name: str, backend: str
) -> None:
    logits, targets, batch = case(2500, dtype)
    batch = ops.PolicyBatch(
        old_logprob=batch.old_logprob, advantages=batch.advantages, cu_seqlens=batch.cu_seqlens
    )
    logits[7, 2400] = value
    with pytest.raises(NonFiniteError, match=r"logits: row 7 has no distribution"):
        ops.logits_policy_loss(
            logits.requires_grad_(), targets, batch, recipes.get(name), backend=backend
        )


def test_only_minus_infinity_is_no_distribution() -> None:
    logits, targets, batch = case(50, torch.bfloat16)
    assert batch.mask is not None
    row = int(batch.mask.nonzero()[0])
    logits[row] = -torch.inf
    with pytest.raises(NonFiniteError, match=f"row {row} has"):
        ops.logits_policy_loss(logits.requires_grad_(), targets, batch, recipes.get("eapo"))


def test_without_gradients_nothing_is_written() -> None:
    logits, targets, batch = case(100, torch.float32)
    kept = logits.clone()
    found = ops.logits_policy_loss(logits, targets, batch, recipes.get("eapo"), in_place=True)
    assert not found.loss.requires_grad
    assert torch.equal(logits, kept)


def test_torch_compile_takes_the_reference_without_a_break() -> None:
    logits, targets, batch = case(64, torch.float32)
    recipe = recipes.get("eapo")

    def loss(x: Tensor) -> Tensor:
        return ops.logits_policy_loss(x, targets, batch, recipe).loss

    want = loss(logits)
    got = torch.compile(loss, fullgraph=True, backend="eager")(logits)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named() -> None:
    logits, targets, batch = case(50, torch.float32)
    recipe = recipes.get("eapo")
    wrong = targets.clone()
    assert batch.mask is not None
    wrong[int(batch.mask.nonzero()[0])] = 50
    for bad, message in (
        ({"targets": wrong}, r"targets: entry \d+ is 50, allowed is 0 to 49"),
        ({"targets": targets[:-1]}, "targets: "),
        ({"targets": targets.float()}, "targets: "),
        ({"logits": logits[0]}, "logits: "),
        ({"logits": logits.long()}, "logits: "),
        ({"temperature": 0.0}, "temperature: got 0.0, allowed is a finite number above 0"),
        ({"recipe": "eapo"}, "recipe: got 'eapo', a Recipe is needed"),
        ({"backend": "flash"}, "has no 'flash' implementation"),
        ({"backend": "cuda"}, "cannot run on 'cuda' here"),
        ({"backend": "cuda", "recipe": recipes.get("siren")}, "truncated entropy"),
        ({"backend": "cpu", "logits": logits.half()}, "it reads float32 and bfloat16"),
        ({"backend": "cpu", "recipe": recipes.get("siren")}, "truncated entropy"),
    ):
        arguments = {"logits": logits, "targets": targets, "batch": batch, "recipe": recipe} | bad
        with pytest.raises(ValueError, match=message):
            ops.logits_policy_loss(**arguments)  # type: ignore[arg-type]


def test_siren_runs_on_the_reference() -> None:
    logits, targets, batch = case(40, torch.float64)
    found, gradient = exact(
        logits, targets, batch, recipes.get("siren").replace(max_length=10), 1.0
    )
    assert found.c is not None
    assert gradient.isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("temperature", [1.0, 0.37, 3.0])
def test_a_certain_token_has_log_probability_zero(temperature: float) -> None:
    """Whatever the rounding of its distance from the top."""
    tops = torch.linspace(-300, 300, 97).bfloat16()
    logits = (tops[:, None] - 400).expand(-1, 5000).clone()
    logits[:, 4321] = tops
    rows = len(tops)
    batch = ops.PolicyBatch(
        old_logprob=torch.zeros(rows),
        advantages=torch.ones(rows),
        cu_seqlens=torch.arange(rows + 1),
        mask=None,
    )
    found = ops.logits_policy_loss(
        logits.requires_grad_(),
        torch.full((rows,), 4321),
        batch,
        recipes.get("eapo"),
        temperature=temperature,
    )
    assert float(found.metrics["logp_difference_max"]) < 2e-7
    assert float(found.metrics["entropy"]) == pytest.approx(0.0, abs=2e-7)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6, 1e30])
def test_equal_logits_of_any_size_are_a_uniform_distribution(scale: float) -> None:
    logits = torch.full((3, 4500), scale).bfloat16().requires_grad_()
    batch = ops.PolicyBatch(
        old_logprob=torch.full((3,), -torch.tensor(4500.0).log().item()),
        advantages=torch.ones(1),
        cu_seqlens=torch.tensor([0, 3]),
    )
    found = ops.logits_policy_loss(logits, torch.tensor([0, 7, 4499]), batch, recipes.get("eapo"))
    # equal terms of a block add up in float32, and their rounding errors have one sign
    assert float(found.metrics["logp_difference_max"]) < 1e-5
