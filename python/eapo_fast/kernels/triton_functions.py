"""Functions that Triton's language lacks and that kernels of several ops call."""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.native import triton_is_interpreted

INTERPRETED = tl.constexpr(triton_is_interpreted())
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent to 1e-7: an odd polynomial near 0, where the other form cancels."""
    size = tl.abs(x)
    square = x * x
    series = -0.00611316 * square + 0.02101005
    series = series * square - 0.05385406
    series = series * square + 0.13332794
    series = series * square - 0.33333329
    near = x + x * square * series
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 `x` in `dtype`, to nearest even; the interpreter's bfloat16 would cut digits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
