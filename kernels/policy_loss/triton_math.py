"""Functions that Triton's language lacks; csrc/cpu/policy-inl.h has them for vectors."""

from __future__ import annotations

import triton
import triton.language as tl

_SMALL = tl.constexpr(0.34657359)


@triton.jit
def bounded(x, least, most):  # type: ignore[no-untyped-def]
    """x inside [least, most]; NaN stays NaN."""
    x = tl.where(x < least, least, x)
    return tl.where(x > most, most, x)


@triton.jit
def filled(x, value):  # type: ignore[no-untyped-def]
    """`value` in the shape of x."""
    return tl.where(x == x, value, value)


@triton.jit
def _series(x):  # type: ignore[no-untyped-def]
    """(exp(x) - 1 - x) / x^2 for |x| <= ln(2) / 2: the polynomial of the Cephes library."""
    p = x * 1.9875691500e-4 + 1.3981999507e-3
    p = p * x + 8.3334519073e-3
    p = p * x + 4.1665795894e-2
    p = p * x + 1.6666665459e-1
    return p * x + 5.0000001201e-1


@triton.jit
def exp_excess(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 - x with all its digits."""
    near = tl.abs(x) < _SMALL
    inside = tl.where(near, x, 0.0)
    return tl.where(near, _series(inside) * inside * inside, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 with all its digits."""
    near = tl.abs(x) < _SMALL
    inside = tl.where(near, x, 0.0)
    return tl.where(near, _series(inside) * inside * inside + inside, tl.exp(x) - 1.0)
