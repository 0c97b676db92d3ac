from __future__ import annotations

import policy_oracle as oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapo_fast import ops
from eapo_fast.kernels.linear_token_stats.coefficients import Coefficients
from eapo_fast.kernels.linear_token_stats.operator import HEADS

_DOUBLE = torch.float64


def _head(rows=11, width=5, vocab=23, dtype=_DOUBLE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=_DOUBLE).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=_DOUBLE).to(dtype)
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


def _bias(vocab=23, holes=(), dtype=_DOUBLE):
    bias = torch.linspace(-1, 1, vocab, dtype=dtype)
    bias[list(holes)] = -torch.inf
    return bias


_BANNED = (torch.tensor([9, 0, 3, 3, 0]), torch.tensor([1, 22, 5, 0, 2]))
_SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "bias": {"bias": _bias()},
    "softcap": {"softcap": 1.5, "temperature": 1.3},
    "padded vocabulary": {"vocab_size": 19, "bias": _bias()},
    "-inf bias": {"bias": _bias(holes=(3, 21))},
    "banned": {"banned": _BANNED},
    "everything": {
        "bias": _bias(holes=(3, 18)),
        "softcap": 2.0,
        "temperature": 0.8,
        "vocab_size": 20,
        "banned": (torch.tensor([7, 2, 2]), torch.tensor([4, 19, 0])),
    },
}


def _targets_allowed(targets, settings):
    """Moves targets away from what is banned or padding."""
    targets = targets % settings.get("vocab_size", 23)
    forbidden = {3, 18, 21, 0, 19, 4, 1, 22, 5, 2}
    return torch.tensor([t if t not in forbidden else 6 + t % 7 for t in targets.tolist()])


@pytest.mark.parametrize("chunk", [1, 4, 11, None], ids="chunk {}".format)
@pytest.mark.parametrize("settings", _SETTINGS.values(), ids=_SETTINGS)
def test_against_autograd(settings, chunk):
    hidden, weight, targets = _head()
    targets = _targets_allowed(targets, settings)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in settings:
        settings = settings | {"bias": settings["bias"].clone().requires_grad_()}
        leaves.append(settings["bias"])
    found = ops.linear_token_stats(hidden, weight, targets, chunk_size=chunk, **settings)
    logprob, entropy = oracle.naive_stats(hidden, weight, targets, **settings)
    torch.testing.assert_close(found.logprob, logprob)
    torch.testing.assert_close(found.entropy, entropy)
    up = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(2), dtype=_DOUBLE)
    got = torch.autograd.grad((found.logprob * up[0] + found.entropy * up[1]).sum(), leaves)
    wanted = torch.autograd.grad((logprob * up[0] + entropy * up[1]).sum(), leaves)
    for g, w in zip(got, wanted, strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("output", ["logprob", "entropy"])
def test_one_output_alone(output):
    hidden, weight, targets = _head()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = getattr(ops.linear_token_stats(hidden, weight, targets, chunk_size=3), output)
    wanted = oracle.naive_stats(hidden, weight, targets)[output == "entropy"]
    for g, w in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(g, w)


def test_gradcheck():
    hidden, weight, targets = _head(rows=4, width=3, vocab=7)
    bias = _bias(7).requires_grad_()

    def stats(h, w, b):
        found = ops.linear_token_stats(
            h, w, targets, bias=b, softcap=2.5, temperature=0.9, chunk_size=3,
            banned=(torch.tensor([1]), (targets[1:2] + 1) % 7),
        )  # fmt: skip
        return found.logprob, found.entropy

    assert torch.autograd.gradcheck(stats, (hidden.requires_grad_(), weight.requires_grad_(), bias))


def test_published_entropy_bonus():
    (case,) = oracle.golden_cases("entropy_bonus")
    logits = torch.tensor(case["inputs"]["logits"], dtype=_DOUBLE).flatten(0, 1).requires_grad_()
    mask = torch.tensor(case["inputs"]["mask"], dtype=_DOUBLE).flatten()
    eye = torch.eye(5, dtype=_DOUBLE)
    entropy = ops.linear_token_stats(logits, eye, torch.zeros(6).long()).entropy
    loss = -case["inputs"]["coef"] * (entropy * mask).sum() / mask.sum()
    (slope,) = torch.autograd.grad(loss, logits)
    expected = case["expected"]
    torch.testing.assert_close(loss.item(), expected["loss"], rtol=0, atol=1e-9)
    torch.testing.assert_close(
        slope,
        torch.tensor(expected["dloss_dlogits"], dtype=_DOUBLE).flatten(0, 1),
        rtol=0,
        atol=1e-9,
    )


def test_banned_entries_have_probability_zero():
    hidden, weight, _ = _head(rows=1)
    banned = (torch.zeros(2).long(), torch.tensor([4, 17]))
    rows = hidden.expand(23, -1)
    every = (torch.arange(23).repeat_interleave(2), banned[1].repeat(23))
    found = ops.linear_token_stats(rows, weight, torch.arange(23), banned=every, chunk_size=5)
    p = found.logprob.exp()
    assert p[4] == p[17] == 0
    torch.testing.assert_close(p.sum().item(), 1.0)
    torch.testing.assert_close(found.entropy[0], torch.special.entr(p).sum())


def test_a_banned_target_has_no_gradient_of_its_own():
    hidden, weight, _ = _head(rows=2)
    targets = torch.tensor([4, 9])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    banned = (torch.tensor([0]), torch.tensor([4]))
    found = ops.linear_token_stats(hidden, weight, targets, banned=banned)
    assert found.logprob[0] == -torch.inf
    for gradient in torch.autograd.grad(found.logprob.clamp(min=-9).sum(), leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shift_of_all_logits_changes_nothing(shift):
    hidden, weight, targets = _head(dtype=torch.float32)
    bias = torch.full((23,), shift)
    here = ops.linear_token_stats(hidden, weight, targets)
    there = ops.linear_token_stats(hidden, weight, targets, bias=bias)
    torch.testing.assert_close(there.logprob, here.logprob, rtol=0, atol=4e-3)
    assert torch.isfinite(there.entropy).all()


def test_peaked_distribution_keeps_its_digits():
    hidden, weight, targets = _head(dtype=torch.float32)
    exact = ops.linear_token_stats(hidden.double() * 9, weight.double(), targets)
    found = ops.linear_token_stats(hidden * 9, weight, targets)
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.logprob.double(), exact.logprob, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_inputs_lose_nothing_but_their_own_rounding(dtype):
    hidden, weight, targets = _head(rows=37, width=16, vocab=9000, dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    found = ops.linear_token_stats(hidden, weight, targets, chunk_size=10, backend="reference")
    exact = ops.linear_token_stats(*wide, targets)
    assert found.logprob.dtype == found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.logprob.double(), exact.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((found.logprob - 0.1 * found.entropy).sum(), leaves)
    wanted = torch.autograd.grad((exact.logprob - 0.1 * exact.entropy).sum(), wide)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == dtype
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(g.double(), w, rtol=max(rounding, 1e-5), atol=1e-5)


def test_autocast_does_not_round_the_logits():
    hidden, weight, targets = _head(dtype=torch.float32)
    here = ops.linear_token_stats(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        there = ops.linear_token_stats(hidden, weight, targets)
    assert torch.equal(here.logprob, there.logprob)


class _LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return out


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_tensor_as_large_as_the_logits(backend):
    rows, width, vocab, chunk = 96, 2, 640, 8
    hidden, weight, targets = _head(rows, width, vocab, dtype=torch.float32)
    settings = {"bias": None, "temperature": 1.0, "softcap": None, "banned": None}
    with _LargestTensor() as largest, torch.no_grad():
        head = HEADS[backend](
            hidden, weight, targets, vocab_size=vocab, chunk_size=chunk,
            wanted=(True, True, False), **settings,
        )  # fmt: skip
        for start in range(0, rows, chunk):
            head.read(start, start + chunk, keep=False)
        head.replay(0, rows, Coefficients(torch.ones(rows), torch.ones(rows)))
    assert largest.size == 4 * chunk * vocab


def test_padding_rows_are_never_read():
    hidden, weight, targets = _head()
    weight[19:] = torch.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    found = ops.linear_token_stats(hidden, weight, targets % 19, vocab_size=19)
    of_hidden, of_weight = torch.autograd.grad((found.logprob + found.entropy).sum(), leaves)
    assert torch.isfinite(of_hidden).all()
    assert not of_weight[19:].any()


def test_extras():
    hidden, weight, targets = _head()
    names = ("sum_p3", "max_logprob", "sum_p2")
    found = ops.linear_token_stats(hidden.requires_grad_(), weight, targets, extras=names)
    p = (hidden @ weight.T).softmax(-1)
    assert list(found.extras) == list(names)
    torch.testing.assert_close(found.extras["max_logprob"], p.amax(1).log().detach())
    torch.testing.assert_close(found.extras["sum_p2"], p.square().sum(1).detach())
    torch.testing.assert_close(found.extras["sum_p3"], p.pow(3).sum(1).detach())
    assert not any(x.requires_grad for x in found.extras.values())


def test_no_rows():
    hidden, weight, targets = _head(rows=0)
    found = ops.linear_token_stats(hidden.requires_grad_(), weight.requires_grad_(), targets)
    (found.logprob.sum() + found.entropy.sum()).backward()
    assert found.logprob.shape == (0,)
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(23, 6).double()},
            r"weight: got shape \[23, 6\], allowed is \[V, 5\]",
        ),
        ({"weight": torch.zeros(23, 5)}, r"weight: got torch.float32, allowed is torch.float64"),
        (
            {"targets": torch.full((11,), 23)},
            r"targets: got values from 23 to 23, allowed is 0 to 22",
        ),
        ({"targets": torch.zeros(11)}, r"targets: got torch.float32"),
        ({"bias": torch.zeros(20)}, r"bias: got shape \[20\], allowed is \[23\]"),
        ({"temperature": 0.0}, r"temperature: got 0.0"),
        ({"softcap": 0.0}, r"softcap: got 0.0"),
        ({"vocab_size": 24}, r"vocab_size: got 24, allowed is 1 to 23"),
        ({"chunk_size": 0}, r"chunk_size: got 0"),
        ({"banned": (torch.tensor([11]), torch.tensor([0]))}, r"banned rows: got values from 11"),
        ({"banned": (torch.tensor([1]), torch.tensor([0, 1]))}, r"banned ids: got shape \[2\]"),
        ({"extras": ("max_logprobs",)}, r"extras: got 'max_logprobs'.*Did you mean 'max_logprob'"),
        ({"backend": "flash"}, r"linear_token_stats has no 'flash' implementation"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(changes, message):
    hidden, weight, targets = _head()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | changes
    with pytest.raises(ValueError, match=message):
        ops.linear_token_stats(**arguments)
