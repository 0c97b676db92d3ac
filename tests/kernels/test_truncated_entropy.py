from __future__ import annotations

import math

import pytest
import torch

from eapo_fast import ops

_DOUBLE = torch.float64


def _kept(p, top_p, top_k, min_p):
    """One row in plain Python: ids by falling p, then by id."""
    ranked, total, kept = sorted(range(len(p)), key=lambda v: (-p[v], v)), 0.0, []
    for v in ranked:
        total += p[v]
        if top_p is not None and total >= top_p:
            break
        kept.append(v)
    kept = kept if top_k is None else kept[:top_k]
    return [v for v in kept if min_p is None or p[v] >= min_p * max(p)]


@pytest.mark.parametrize(
    "cuts",
    [(0.8, None, None), (0.5, 2, None), (None, 3, None), (None, None, 0.1), (0.9, 10, 0.2),
     (None, None, None), (0.0, None, None), (1.0, 1, 0.0)],
    ids=str,
)  # fmt: skip
def test_against_plain_python(cuts):
    names = ("top_p", "top_k", "min_p")
    logits = torch.randn(30, 11, generator=torch.Generator().manual_seed(1), dtype=_DOUBLE) * 2
    found = ops.truncated_entropy(logits, **dict(zip(names, cuts, strict=True)))
    for row, p in enumerate(logits.softmax(-1).tolist()):
        kept = _kept(p, *cuts)
        assert sorted(kept) == found.kept[row].nonzero().squeeze(1).tolist()
        mass = math.fsum(p[v] for v in kept)
        entropy = -math.fsum(p[v] / mass * math.log(p[v] / mass) for v in kept)
        assert found.mass[row].item() == pytest.approx(mass, abs=1e-12)
        assert found.entropy[row].item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize("cuts", [{"top_p": 0.8}, {"min_p": 0.1}, {}], ids=str)
def test_gradient_holds_the_set_in_place(cuts):
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=_DOUBLE)
    logits[0] = torch.tensor([9.0, 0, 0, 0, 0, 0])  # nothing stays below 0.8
    logits.requires_grad_()
    found = ops.truncated_entropy(logits, **cuts)
    upstream = torch.linspace(-1, 2, 9, dtype=_DOUBLE)
    found.entropy.backward(upstream)
    q = torch.where(found.kept, logits.softmax(-1), 0.0).detach()
    q = torch.nan_to_num(q / q.sum(-1, keepdim=True))
    slope = -q * (torch.where(q > 0, q.log(), 0.0) + found.entropy.detach()[:, None])
    torch.testing.assert_close(
        logits.grad, slope * torch.linspace(-1, 2, 9, dtype=_DOUBLE)[:, None]
    )
    assert torch.autograd.gradcheck(
        lambda z: ops.truncated_entropy(z, **cuts).entropy, logits.detach().requires_grad_()
    )


def test_banned_tokens_and_shifts():
    logits = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]], dtype=_DOUBLE)
    found = ops.truncated_entropy(logits)
    assert found.kept.tolist() == [[True, True, True, True]]
    plain = ops.truncated_entropy(logits[:, [0, 2]]).entropy
    torch.testing.assert_close(found.entropy, plain)
    for shift in (1e4, -1e4):
        moved = ops.truncated_entropy(logits + shift, top_p=0.7)
        torch.testing.assert_close(moved.entropy, ops.truncated_entropy(logits, top_p=0.7).entropy)


def test_one_token_has_no_entropy():
    found = ops.truncated_entropy(torch.randn(5, 1), min_p=1.0)
    assert found.kept.all()
    assert found.entropy.tolist() == [0.0] * 5
    assert ops.truncated_entropy(torch.randn(0, 4)).entropy.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_p": 1.5}, r"top_p: got 1.5, allowed is 0 to 1, or None"),
        ({"min_p": -0.1}, r"min_p: got -0.1"),
        ({"top_k": 0}, r"top_k: got 0, allowed is 1 or more"),
        ({"logits": torch.ones(3)}, r"logits: got shape \[3\], allowed is \[R, V\]"),
        ({"logits": torch.ones(3, 0)}, r"logits: got an empty vocabulary"),
        ({"backend": "cpu"}, r"truncated_entropy has no 'cpu' implementation"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.truncated_entropy(**{"logits": torch.ones(2, 3)} | arguments)
