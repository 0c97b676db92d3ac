"""Rows of the losses in CUDA against float64: statistics, coefficients, gradients, what is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast import ops, recipes
from eapo_fast.kernels.linear_token_stats import cuda_rows
from eapo_fast.kernels.linear_token_stats.triton_row_pass import RowPass
from eapo_fast.kernels.policy_loss.triton_kernel import bounds_of, constants_of
from eapo_fast.recipes import Recipe

ROWS = 6
LISTED = [1, 2, 3, 5, 0]
"""Row 4 is masked out."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of gradients; in float32 that of logarithms of up to 32, and of the GPU's exponentials."""
POISON = -777.0
EAPO = recipes.get("eapo").replace(beta=0.1, entropy_coef=0.01, delta=1.5)
PLAIN = recipes.get("dapo")


def case(vocab: int, dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Logits with an outlier, a banned token, a distance from 0 and very low ones; targets."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    targets = torch.randint(vocab, (rows,), generator=generator)
    if vocab > 3 and rows == ROWS:
        logits[1, vocab // 2] = 20.0
        logits[2, vocab // 3] = -torch.inf
        targets[2] = 0
        logits[3] -= 20.0
        logits[5, : vocab // 2] = -30_000.0
        targets[5] = vocab - 1
    return logits.to(dtype), targets


@dataclass
class Given:
    """What a run needs besides logits and targets, and what came of it."""

    weights: Tensor
    old: Tensor
    advantages: Tensor
    factor: Tensor | None = None
    ref: Tensor | None = None
    results: dict[str, Tensor] = field(default_factory=dict)


def given(logits: Tensor, targets: Tensor, *, factor: bool = False, ref: bool = True) -> Given:
    generator = torch.Generator().manual_seed(9)
    rows = len(targets)
    own = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].float()

    def noise(scale: float = 1.0) -> Tensor:
        return torch.randn(rows, generator=generator) * scale

    return Given(
        noise().abs() + 0.1,
        own + noise(0.3),
        noise(),
        noise().abs() if factor else None,
        own + noise(0.2) if ref else None,
    )


def launch(
    z: Tensor, targets: Tensor, own: Given, recipe: Recipe | None, **how: Any
) -> dict[str, Tensor]:
    """Run listed rows; whatever is not written stays poison. Results are on the CPU."""
    device, count = z.device, len(targets)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        reason = cuda_rows.refusal(z) or ("no clusters" if how.get("cluster", 0) > 1 else None)
        if reason is not None:
            pytest.skip(reason)
    listed = torch.tensor(how.pop("listed", LISTED)).to(device)
    edges = torch.tensor(how.pop("span", [0, len(listed)])).to(device)
    found = {k: torch.full((count,), POISON, device=device)
             for k in ("logprob", "entropy", "a", "b", "losses")}  # fmt: skip
    found["state"] = torch.full((count, 4), POISON, device=device)
    for name in ("a", "b"):
        if recipe is None and name in own.results:
            found[name] = own.results[name].to(device)
    program = None
    if recipe is not None:
        least, most, delta = bounds_of(recipe)
        vectors = {"weights": own.weights, "old_logprob": own.old, "advantages": own.advantages,
                   "factor": own.factor, "ref_logprob": own.ref}  # fmt: skip
        program = {k: v.to(device) for k, v in vectors.items() if v is not None}
        program |= {"least": least, "most": most, "delta": delta, "beta": recipe.beta,
                    "entropy_coef": recipe.entropy_coef, **constants_of(recipe)}  # fmt: skip
    how = {"size": len(listed), "zeros": True, "given": True, **how}
    cuda_rows.run_rows(z, listed, edges, targets.to(device), program=program, **found, **how)
    return {name: value.cpu() for name, value in found.items()}


def wanted(
    logits: Tensor, targets: Tensor, own: Given, recipe: Recipe, temperature: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Results of every row in float64, and gradients by autograd."""
    leaf = logits.double().requires_grad_()
    log_p = (leaf / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    found = ops.policy_loss(
        logprob.detach(), own.old.double(), own.advantages.double(),
        torch.arange(len(targets) + 1), entropy=entropy.detach(),
        ref_logprob=None if own.ref is None else own.ref.double(),
        stats=None if own.factor is None else {"weight": own.factor.double()},
        recipe=recipe.replace(aggregation="token-sum-norm", max_length=1.0), backend="reference",
    )  # fmt: skip
    share = own.weights.double()
    results = {"logprob": logprob.detach(), "entropy": entropy.detach(), "a": found.a * share,
               "b": found.b * share, "losses": found.token_loss}  # fmt: skip
    total = (results["a"] * logprob + results["b"] * entropy).sum()
    return results, torch.autograd.grad(total, leaf)[0]


def check(
    got: dict[str, Tensor], want: dict[str, Tensor], rows: list[int], logits: Tensor, t: float
) -> None:
    """Compare the results of rows; the others have none."""
    others = [i for i in range(len(logits)) if i not in rows]
    for name, value in want.items():
        close = {"rtol": 1e-4, "atol": 2e-5} if name in ("a", "losses") else {}
        close = close or {"rtol": 1e-6, "atol": 2e-5}
        torch.testing.assert_close(got[name][rows].double(), value[rows], **close, msg=name)
    assert all((x[others] == POISON).all() for x in got.values())
    top, mass, moment, rest = got["state"][rows].double().unbind(1)
    y = logits[rows].double() / t
    torch.testing.assert_close(top, y.amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(top + mass.log(), y.logsumexp(1), rtol=0, atol=3e-5)
    torch.testing.assert_close(mass.log() - moment / mass, want["entropy"][rows], rtol=0, atol=3e-5)
    assert (rest == POISON).all()


def close_gradients(
    got: Tensor, want: Tensor, found: dict[str, Tensor], exact: dict[str, Tensor], rows: list[int],
    temperature: float,
) -> None:  # fmt: skip
    """Row by row: the rounding of the dtype, and what a's own error and 1 - p lose."""
    error = (got[rows].double() - want[rows]).norm(dim=1)
    a, near = exact["a"][rows], found["a"][rows].double()
    lost = (2 * (near - a).abs() + 4e-7 * a.abs() + 1e-9) / temperature
    bound = ROUNDING[got.dtype] * want[rows].norm(dim=1) + lost
    bound += 2**-25 * got.shape[1] ** 0.5 * (got.dtype == torch.float16)  # next to 0
    assert bool((error <= bound).all()), (error / bound).tolist()


@pytest.mark.parametrize("cluster", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("vocab", [1, 7, 1500, 5001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: str, vocab: int, cluster: int, device: torch.device) -> None:
    logits, targets = case(vocab, DTYPES[dtype])
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 0.8)
    z = logits.clone().to(device)
    got = launch(z, targets, own, EAPO, out=z, temperature=0.8, cluster=cluster)
    check(got, want, LISTED, logits, 0.8)
    close_gradients(z.cpu(), slope, got, want, LISTED, 0.8)
    assert torch.equal(z[4].cpu(), logits[4])


@pytest.mark.parametrize("vocab", [50_257, 151_936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabularies(dtype: str, vocab: int, device: torch.device) -> None:
    logits, targets = case(vocab, DTYPES[dtype])
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, PLAIN, 1.0)
    z = logits.clone().to(device)
    got = launch(z, targets, own, PLAIN, out=z)
    check(got, want, LISTED, logits, 1.0)
    close_gradients(z.cpu(), slope, got, want, LISTED, 1.0)


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize("vocab", [7, 1504, 4097, 4098])
def test_bfloat16_over_float32(vocab: int, cluster: int, device: torch.device) -> None:
    """The gradient of a row lies on the first half of its own logits."""
    logits, targets = case(vocab, torch.float32)
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 1.0)
    z = logits.clone().to(device)
    out = z.view(torch.bfloat16)[:, :vocab]
    got = launch(z, targets, own, EAPO, out=out, cluster=cluster)
    check(got, want, LISTED, logits, 1.0)
    close_gradients(out.cpu(), slope, got, want, LISTED, 1.0)
    assert torch.equal(z[4].cpu(), logits[4])


@pytest.mark.parametrize("shift", [0, 1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apart_with_strides(dtype: str, shift: int, device: torch.device) -> None:
    """Rows in wider ones; between them and in logits nothing changes."""
    vocab = 1496
    logits, targets = case(vocab, DTYPES[dtype])
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 1.0)
    room, wide = (torch.full((ROWS, w), POISON, dtype=logits.dtype, device=device)
                  for w in (1504, 1544))  # fmt: skip
    z, out = wide[:, shift : shift + vocab], room[:, 8 - shift : 8 - shift + vocab]
    z.copy_(logits)
    before = wide.clone()
    got = launch(z, targets, own, EAPO, out=out, cluster=2)
    check(got, want, LISTED, logits, 1.0)
    close_gradients(out.cpu(), slope, got, want, LISTED, 1.0)
    assert torch.equal(wide, before)
    assert (room[:, : 8 - shift] == POISON).all()
    assert (room[:, 8 - shift + vocab :] == POISON).all()
    assert (room[4] == POISON).all()


@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("surrogate", ["clip", "detached_clip", "none", "reinforce"])
def test_every_program(surrogate: str, kl: str, device: torch.device) -> None:
    logits, targets = case(300, torch.float32)
    for beta, bonus, delta, factor in ((0.2, 0.0, 1.3, True), (0.0, 0.01, None, False)):
        recipe = PLAIN.replace(surrogate=surrogate, kl=kl, beta=beta, entropy_coef=bonus,
                               delta=delta if surrogate == "clip" else None)  # fmt: skip
        own = given(logits, targets, factor=factor, ref=beta > 0)
        want, slope = wanted(logits, targets, own, recipe, 1.0)
        z = logits.clone().to(device)
        got = launch(z, targets, own, recipe, out=z)
        check(got, want, LISTED, logits, 1.0)
        close_gradients(z.cpu(), slope, got, want, LISTED, 1.0)


@pytest.mark.parametrize("zeros", [False, True])
def test_rows_without_a_slope(zeros: bool, device: torch.device) -> None:
    logits, targets = case(1500, torch.float32)
    logits[3, 7] = torch.nan
    own = given(logits, targets)
    own.results = {"a": torch.tensor([0.5, 0, -0.0, 0, 0, -2]), "b": torch.zeros(ROWS)}
    z = logits.clone().to(device)
    launch(z, targets, own, None, out=z, zeros=zeros)
    for row in (1, 2, 3):
        expected = torch.zeros(1500) if zeros else logits[row]
        assert torch.equal(z[row].cpu().nan_to_num(5.0), expected.nan_to_num(5.0))
    p = logits.double().softmax(-1)
    for row in (0, 5):
        onehot = torch.zeros(1500).index_fill_(0, targets[row], 1.0)
        expected = own.results["a"][row] * (onehot - p[row])
        torch.testing.assert_close(z[row].cpu().double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(z[4].cpu(), logits[4])


def test_coefficients_may_be_given_and_gradients_left_out(device: torch.device) -> None:
    logits, targets = case(1500, torch.bfloat16)
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 1.0)
    z = logits.clone().to(device)
    made = launch(z, targets, own, EAPO)
    assert torch.equal(z.cpu(), logits)
    check(made, want, LISTED, logits, 1.0)
    own.results = {name: made[name] for name in ("a", "b")}
    read = launch(z, targets, own, None, out=z)
    assert (read["losses"] == POISON).all()
    for name in ("logprob", "entropy", "state"):
        assert torch.equal(read[name], made[name])
    close_gradients(z.cpu(), slope, made, want, LISTED, 1.0)


def test_a_pass_over_a_slab(device: torch.device) -> None:
    """The launch of a head: float32 logits in padded rows, bfloat16 slopes over them."""
    logits, targets = case(1000, torch.float32, rows=9)
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 0.9)
    live = torch.tensor([7, 1, 8, 2, 5, 0, 3, 6, 4], device=device), torch.tensor([7]).to(device)
    rows = RowPass(targets.to(device), vocab_size=1000, temperature=0.9, live=live)
    slab = torch.full((4, 1008), POISON, device=device)
    span = rows.span(4, 8)  # of which three are in the list
    listed = [5, 0, 3]
    slab[:3, :1000] = logits[listed].to(device)
    z, out = slab[:, :1000], slab.view(torch.bfloat16)[:, :1000]
    assert cuda_rows.pass_refusal(rows, z) is None
    cuda_rows.launch(rows, z, out, span, statistics=True, gradient=False)
    rows.take(want["a"].to(device), want["b"].to(device), None)
    cuda_rows.launch(rows, z, out, span, statistics=False, gradient=True, zeros=True)
    for name in ("logprob", "entropy"):
        value = getattr(rows, name).cpu()
        torch.testing.assert_close(value[listed].double(), want[name][listed], rtol=0, atol=2e-5)
        assert not value[[7, 1, 8, 2, 6, 4]].any()
    by_row = torch.zeros(9, 1000, dtype=torch.bfloat16)
    by_row[listed] = out[:3].cpu()
    close_gradients(by_row, slope, want, want, listed, 0.9)
    rows.softcap = 5.0
    assert cuda_rows.pass_refusal(rows, z) == "it knows no softcap"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [8, 4097])
def test_rows_without_a_distribution(vocab: int, bad: float, device: torch.device) -> None:
    """NaN and +inf anywhere, or -inf everywhere; their neighbours do not notice."""
    logits, targets = case(vocab, torch.float32)
    own = given(logits, targets)
    clean = logits.clone().to(device)
    want = launch(clean, targets, own, EAPO, out=clean, cluster=4)
    logits[2, -1] = bad
    logits[5] = bad
    z = logits.clone().to(device)
    got = launch(z, targets, own, EAPO, out=z, cluster=4)
    wrong = [2, 5] if bad != -torch.inf else [5]
    for name in ("logprob", "entropy", "losses", "a"):
        assert got[name][wrong].isnan().all()
    assert z[wrong].isnan().all()
    assert got["state"][wrong, 1].isnan().all()
    for row in set(LISTED) - {2, 5}:
        assert torch.equal(z[row], clean[row])
        assert all(torch.equal(got[name][row], want[name][row]) for name in got)


def test_targets_that_are_banned_or_nowhere(device: torch.device) -> None:
    logits, targets = case(100, torch.float32)
    logits[1, targets[1]] = -torch.inf
    targets[2], targets[3] = 100, -1
    own = given(logits, targets.clamp(0, 99))
    z = logits.clone().to(device)
    got = launch(z, targets, own, None, out=z)
    own.results = {"a": torch.ones(ROWS), "b": torch.zeros(ROWS)}
    z = logits.clone().to(device)
    got = launch(z, targets, own, None, out=z)
    assert got["logprob"][1] == -torch.inf
    assert got["logprob"][2:4].isnan().all()
    assert got["entropy"][LISTED].isfinite().all()
    torch.testing.assert_close(z[1].cpu(), -logits[1].softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_distance_from_zero(shift: float, device: torch.device) -> None:
    logits, targets = case(999, torch.float32, rows=4)
    logits = (logits + shift).float()
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 1.0)
    z = logits.clone().to(device)
    got = launch(z, targets, own, EAPO, out=z, listed=[0, 1, 2, 3])
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=2e-5)
    close_gradients(z.cpu(), slope, got, want, [0, 1, 2, 3], 1.0)


@pytest.mark.parametrize("span", [[0, 0], [2, 2], [1, 3], [0, 9], [5, 3], [0, 90]])
def test_spans(span: list[int], device: torch.device) -> None:
    """Rows of a slab lie one behind the other; the span says which of the list they are."""
    listed = [7, 1, 8, 2, 5, 0, 3, 6, 4]
    logits, targets = case(600, torch.bfloat16, rows=9)
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 1.0)
    rows = listed[span[0] : span[1]]  # and no more than there are
    z = torch.full((9, 600), POISON, dtype=torch.bfloat16, device=device)
    z[: len(rows)] = logits[rows].to(device)
    got = launch(z, targets, own, EAPO, out=z, listed=listed, span=span, given=False)
    check(got, want, rows, logits, 1.0)
    by_row = torch.zeros(9, 600, dtype=torch.bfloat16)
    by_row[rows] = z[: len(rows)].cpu()
    close_gradients(by_row, slope, got, want, rows, 1.0)
    assert (z[len(rows) :] == POISON).all()


@pytest.mark.parametrize("vocab", [1501, 20_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_the_batch(
    dtype: str, vocab: int, device: torch.device
) -> None:
    logits, targets = case(vocab, DTYPES[dtype], rows=7)
    own = given(logits, targets)
    runs = []
    for listed in ([0, 1, 2, 3, 4, 5, 6], [5], [6, 5, 3]):
        z = logits.clone().to(device)
        got = launch(z, targets, own, EAPO, out=z, listed=listed)
        runs.append((z[5].cpu(), *(x[5] for x in got.values())))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def test_refusals(device: torch.device) -> None:
    most = 8 * 227 * 1024
    assert cuda_rows.refusal(torch.empty(1, 400_000, device=device)) is None
    reason = cuda_rows.refusal(torch.empty(1, most // 4 + 1, device=device))
    assert reason is not None
    assert "eight blocks" in reason
    logits, targets = case(100, torch.float32)
    own = given(logits, targets)
    z = logits.to(device)
    with pytest.raises(RuntimeError, match="bfloat16 of float32"):
        launch(z, targets, own, EAPO, out=z.half())
    with pytest.raises(ValueError, match="cluster: got 3"):
        launch(z, targets, own, EAPO, out=z, cluster=3)
    with pytest.raises(ValueError, match="out"):
        launch(z, targets, own, EAPO, out=z[:2])
    with pytest.raises(ValueError, match="size"):
        launch(z, targets, own, EAPO, out=z, size=9)


def test_a_device_without_clusters(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cpu":
        pytest.skip("only the emulator can pretend to be another device")
    monkeypatch.setenv("EAPO_EMULATOR_ARCH", "80")
    reason = cuda_rows.refusal(torch.empty(1, 50_000))
    assert reason is not None
    assert "200000 bytes" in reason
    logits, targets = case(40_000, torch.float32)
    own = given(logits, targets)
    want, slope = wanted(logits, targets, own, EAPO, 1.0)
    with pytest.raises(RuntimeError, match="no clusters"):
        launch(logits.clone(), targets, own, EAPO, cluster=2)
    z = logits.clone()
    got = launch(z, targets, own, EAPO, out=z)
    check(got, want, LISTED, logits, 1.0)
    close_gradients(z, slope, got, want, LISTED, 1.0)
