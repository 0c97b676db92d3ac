"""Token statistics of the CPU backend against the float64 reference: values and gradients.

Tolerances. float32: 2e-5 relative to the largest number of a result. bfloat16: log-probabilities
within 2**-8 (H + |ln p|), entropies within twice that or 2**-4 H (what is left beside one likely
token has probabilities within 2**-8 |ln p|); gradients (of numbers of order 1) within 2**-10 +
2**-6 of their norm, and never worse than those of torch's own bfloat16 log_softmax by more than
2**-8 of their norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_fast import _core, ops
from eapo_fast.kernels.linear_token_stats import NonFiniteError, products

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every instruction set of this CPU."""
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def head(
    rows: int, vocab: int, *, width: int = 24, spread: float = 3.0, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets, of which half are likely ones."""
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * spread / width**0.5).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    best = (hidden.float() @ weight.float().T).argmax(1)
    return hidden, weight, torch.where(torch.arange(rows) % 2 == 0, best, targets)


class Run:
    """Statistics and gradients of one call, for coefficients that cover signs and zero."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        backend: str,
        entropy: bool = True,
        **settings: Any,
    ) -> None:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        if "bias" in settings:
            settings["bias"] = settings["bias"].detach().requires_grad_()
            leaves.append(settings["bias"])
        found = ops.linear_token_stats(*leaves[:2], targets, backend=backend, **settings)
        self.logprob, self.entropy = found.logprob.detach(), found.entropy.detach()
        self.extras = found.extras
        rows = torch.arange(len(targets))
        a, b = (rows % 5 - 2.0) / 3, (rows % 3 - 1.0) / 4
        loss = (a * found.logprob).sum() + (b * found.entropy).sum() * entropy
        self.gradients = torch.autograd.grad(loss, leaves)


def double(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if k == "bias" else v for k, v in settings.items()}


def assert_agrees(got: Run, want: Run, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        for a, b in zip((got.logprob, got.entropy), (want.logprob, want.entropy), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
        for a, b in zip(got.gradients, want.gradients, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * (1e-3 + largest(b)))
        return
    room = 2**-8 * (want.entropy + want.logprob.abs()) + 1e-5
    assert ((got.logprob - want.logprob).abs() <= room).all()
    slack = torch.maximum(2 * room, 2**-4 * want.entropy)
    assert ((got.entropy - want.entropy).abs() <= slack).all()
    for a, b in zip(got.gradients, want.gradients, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= 2**-6 * b.norm() + 2**-10


def largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(1, 2), (63, 3), (100, 63), (2047, 2), (63, 100), (1, 2047), (63, 2048), (5, 2049), (3, 9001)],
)
def test_odd_sizes(isa: str, rows: int, vocab: int, dtype: torch.dtype) -> None:
    inputs = head(rows, vocab, dtype=dtype)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for entropy in (False, True):
        got = Run(*inputs, backend="cpu", entropy=entropy)
        assert_agrees(got, Run(*wide, backend="reference", entropy=entropy), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabulary(isa: str, dtype: torch.dtype) -> None:
    inputs = head(4, 152_064, width=8, dtype=dtype)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    assert_agrees(Run(*inputs, backend="cpu"), Run(*wide, backend="reference"), dtype)


BIAS = torch.linspace(-1, 1, 300)
HOLES = BIAS.clone().index_fill(0, torch.tensor([3, 299]), -torch.inf)
BANNED = (torch.tensor([9, 0, 3, 3, 0, 9]), torch.tensor([1, 22, 5, 0, 2, 299]))
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "bias": {"bias": BIAS},
    "-inf bias": {"bias": HOLES},
    "softcap": {"softcap": 2.5, "temperature": 1.3},
    "padded vocabulary": {"vocab_size": 283, "bias": BIAS},
    "banned": {"banned": BANNED},
    "chunks": {"chunk_size": 7},
    "everything": {
        "bias": HOLES,
        "softcap": 4.0,
        "temperature": 0.8,
        "vocab_size": 290,
        "banned": (torch.tensor([7, 2, 2]), torch.tensor([4, 19, 0])),
        "chunk_size": 6,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(isa: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, targets = head(19, 300, dtype=dtype)
    targets = 30 + targets % 250  # none of them banned
    got = Run(hidden, weight, targets, backend="cpu", **settings)
    want = Run(hidden.double(), weight.double(), targets, backend="reference", **double(settings))
    assert_agrees(got, want, dtype)
    assert not got.gradients[1][settings.get("vocab_size", 300) :].any()


CUTS: list[dict[str, Any]] = [
    {"min_p": 0.02},
    {"top_p": 0.7},
    {"top_p": 0.0},
    {"top_k": 3},
    {"top_p": 0.9, "top_k": 40, "min_p": 0.05},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_extras(isa: str, cut: dict[str, Any], dtype: torch.dtype) -> None:
    """bfloat16 keeps 8 digits of an exponential, so that a token at the border may go."""
    inputs = head(19, 5000, dtype=dtype)
    names = ("sum_p3", "p_max", "max_logprob", "sum_p2", "kept_mass", "truncated_entropy")
    settings = {"extras": names, "banned": (torch.tensor([3]), torch.tensor([77])), "softcap": 9.0}
    got = ops.linear_token_stats(*inputs, **settings, **cut, backend="cpu")
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    want = ops.linear_token_stats(*wide, **settings, **cut, backend="reference")
    room = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.06, "atol": 0.02}
    for name in names:
        torch.testing.assert_close(got.extras[name].double(), want.extras[name], **room)
        assert not got.extras[name].requires_grad


def test_cuts_belong_to_their_extras() -> None:
    inputs = head(3, 20, dtype=torch.float32)
    for settings in ({"extras": ("kept_mass",)}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match=r"^extras: 'kept_mass' and 'truncated_entropy' are"):
            ops.linear_token_stats(*inputs, **settings)
    with pytest.raises(ValueError, match=r"^min_p: got 1.5"):
        ops.linear_token_stats(*inputs, extras=("kept_mass",), min_p=1.5)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(isa: str, scale: float) -> None:
    """Logits of +-1e4: one token takes all, or all but one have none."""
    weight = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    weight[7] = weight.abs().max() + 0.5
    hidden = torch.full((3, 1), scale)
    targets = torch.tensor([7, int((hidden[0] * weight[:, 0]).argmax()), 0])
    got = Run(hidden, weight, targets, backend="cpu")
    want = Run(hidden.double(), weight.double(), targets, backend="reference")
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-6, atol=1e-6)
    for a, b in zip(got.gradients, want.gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shift_of_all_logits_changes_nothing(isa: str, shift: float) -> None:
    inputs = head(20, 4500, dtype=torch.float32)
    here = ops.linear_token_stats(*inputs, backend="cpu")
    there = ops.linear_token_stats(*inputs, bias=torch.full((4500,), shift), backend="cpu")
    torch.testing.assert_close(there.logprob, here.logprob, rtol=0, atol=4e-3)
    torch.testing.assert_close(there.entropy, here.entropy, rtol=0, atol=4e-3)


def test_ties(isa: str) -> None:
    for vocab in (1, 2, 4097, 10_000):
        zeros = torch.zeros(2, 3), torch.zeros(vocab, 3), torch.tensor([0, vocab - 1])
        got = ops.linear_token_stats(*zeros, extras=("sum_p2",), backend="cpu")
        log_v = torch.tensor(float(vocab)).log().expand(2)
        torch.testing.assert_close(got.logprob, -log_v, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.entropy, log_v, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.extras["sum_p2"], torch.full((2,), 1 / vocab))


def test_peaked_rows_keep_their_digits(isa: str) -> None:
    hidden, weight, targets = head(31, 3000, dtype=torch.float32)
    got = ops.linear_token_stats(hidden * 12, weight, targets, backend="cpu")
    want = ops.linear_token_stats(hidden.double() * 12, weight.double(), targets)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-4, atol=1e-5)


def test_a_banned_target_has_no_gradient_of_its_own(isa: str) -> None:
    hidden, weight, _ = head(2, 40, dtype=torch.float32)
    targets, banned = torch.tensor([4, 9]), (torch.tensor([0]), torch.tensor([4]))
    got = Run(hidden, weight, targets, backend="cpu", banned=banned, entropy=False)
    assert got.logprob[0] == -torch.inf
    assert all(g.isfinite().all() for g in got.gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat16_is_not_worse_than_torchs(dtype: torch.dtype) -> None:
    """Error of log-probabilities and gradients against log_softmax in the same dtype."""
    for spread in (0.3, 2.0, 8.0):
        hidden, weight, targets = head(64, 5000, width=64, spread=spread, dtype=dtype)
        wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
        exact = (wide[0] @ wide[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        want = torch.autograd.grad(exact.sum(), wide)
        errors = []
        for ours in (True, False):
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            if ours:
                found = ops.linear_token_stats(*leaves, targets, backend="cpu").logprob
            else:
                log_p = (leaves[0] @ leaves[1].T).log_softmax(-1)
                found = log_p.gather(1, targets[:, None])[:, 0]
            got = torch.autograd.grad(found.float().sum(), leaves)
            errors.append(
                [float((found.detach().double() - exact.detach()).abs().max())]
                + [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
            )
        slack = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert all(a <= b + slack for a, b in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_the_fast_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors without bfloat16 dot products, and where torch has no oneDNN."""
    monkeypatch.setattr(products, "_has_bfloat16_products", lambda: False)
    inputs = head(40, 700, dtype=dtype)
    want = Run(*(x.double() if x.is_floating_point() else x for x in inputs), backend="reference")
    for onednn in (True, False):
        monkeypatch.setattr(products, "_has_onednn", lambda found=onednn: found)
        got = Run(*inputs, backend="cpu", chunk_size=11)
        torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=2e-5, atol=2e-5)
        rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-5
        for a, b in zip(got.gradients, want.gradients, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=rounding, atol=2e-5 * largest(b))


def test_results_depend_neither_on_threads_nor_on_chunks(isa: str) -> None:
    inputs = head(97, 3000, dtype=torch.float32)
    threads = _core.num_threads()
    want = Run(*inputs, backend="cpu")
    try:
        for count in (1, 2, 3):
            _core.set_num_threads(count)
            got = Run(*inputs, backend="cpu")
            assert torch.equal(got.logprob, want.logprob)
            assert all(map(torch.equal, got.gradients, want.gradients))
    finally:
        _core.set_num_threads(threads)
    for chunk in (1, 10, 96):
        got = Run(*inputs, backend="cpu", chunk_size=chunk)
        torch.testing.assert_close(got.logprob, want.logprob, rtol=1e-6, atol=1e-5)
        for a, b in zip(got.gradients, want.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_not_finite_is_reported_with_its_token(
    backend: str, poison: float, dtype: torch.dtype
) -> None:
    hidden, weight, targets = head(30, 2500, dtype=dtype)
    hidden[17, 3] = poison
    hidden[21, 0] = poison
    with pytest.raises(NonFiniteError, match=r"hidden: token 17 \(and 1 more\) has no dist"):
        ops.linear_token_stats(hidden, weight, targets, backend=backend, chunk_size=25)
    hidden, weight, targets = head(3, 2500, dtype=dtype)
    weight[2400] = poison
    with pytest.raises(NonFiniteError, match=r"hidden: token 0 "):
        ops.linear_token_stats(hidden, weight, targets, backend=backend)


def test_a_row_with_everything_banned_is_reported(isa: str) -> None:
    hidden, weight, targets = head(3, 4, dtype=torch.float32)
    banned = (torch.full((4,), 1), torch.arange(4))
    with pytest.raises(NonFiniteError, match=r"token 1 has no distribution.*all of them are ban"):
        ops.linear_token_stats(hidden, weight, targets, banned=banned, backend="cpu")


def test_other_dtypes_take_the_reference() -> None:
    for dtype in (torch.float64, torch.float16):
        inputs = head(3, 20, dtype=dtype)
        with pytest.raises(ValueError, match="cannot run on 'cpu' here: it stores float32 or"):
            ops.linear_token_stats(*inputs, backend="cpu")
        assert ops.linear_token_stats(*inputs).logprob.isfinite().all()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 16), (17, 33), (100, 7), (129, 65)])
def test_sums_of_transposed_products(isa: str, rows: int, width: int) -> None:
    total, part = torch.randn(rows, width), torch.randn(width, rows)
    kept = total.clone()
    _core.take_transposed(total, part, add=True)
    assert torch.equal(total, kept + part.T)
    _core.take_transposed(total, part, add=False)
    assert torch.equal(total, part.T)
