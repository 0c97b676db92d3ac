"""Rotary embeddings that paged attention does itself, in the launch that writes the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eapo_fast.errors import ModelError


class RotationHabit:
    """Whether an attention module hands what its rotary embedding returned on as it is."""

    def __init__(self) -> None:
        self._seen: bool | None = None

    @property
    def hands_on(self) -> bool:
        """Whether it did every time so far, and at least once."""
        return bool(self._seen)

    def saw(self, hands_on: bool) -> None:
        """Take in what it did; who once did otherwise is not trusted again."""
        self._seen = hands_on and self._seen is not False


@dataclass(frozen=True, slots=True)
class _Rotation:
    """What a rotary embedding returned."""

    q: Tensor
    k: Tensor
    angles: tuple[Tensor, Tensor] | None
    """cos and sin if `q` and `k` are not turned yet."""
    habit: RotationHabit


class Rotations:
    """The rotary embeddings of one paged forward, each before its attention.

    A module that was seen to hand the very tensors on to attention gets them back unturned, and
    attention turns them. If such a module does something else with them one day, that is an error,
    never a wrong result.
    """

    def __init__(self) -> None:
        self._last: _Rotation | None = None

    def ask(
        self,
        q: Tensor,
        k: Tensor,
        angles: tuple[Tensor, Tensor],
        habit: RotationHabit,
        rotate: Callable[..., tuple[Tensor, Tensor]],
        *,
        widens: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return `rotate(q, k, *angles)`; or `q` and `k` [1, H, T, D] as they are, to be turned.

        `widens`: the result of `rotate` is not rounded to the dtype of `q`. Under autocast to that
        dtype attention does it.
        """
        self.finish()
        kind = q.device.type
        if torch.is_autocast_enabled(kind):
            rounds_alike = torch.get_autocast_dtype(kind) == q.dtype
        else:
            rounds_alike = not widens
        later = habit.hands_on and q.shape[0] == 1 and rounds_alike
        if not later:
            q, k = rotate(q, k, *angles)
        self._last = _Rotation(q, k, angles if later else None, habit)
        return q, k

    def take(self, module: object, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the angles [T, R] by which `q` and `k` are to be turned, None if they are.

        Raises `ModelError` if `module` should have come to attention with other tensors.
        """
        last, self._last = self._last, None
        if last is None:
            return None
        ours = last.q is q and last.k is k
        last.habit.saw(ours)
        if last.angles is None:
            return None
        if not ours:
            raise _error(type(module).__name__)
        cos, sin = last.angles
        return cos[0], sin[0]

    def finish(self) -> None:
        """Raise `ModelError` if a rotation is still to be done."""
        last, self._last = self._last, None
        if last is None:
            return
        last.habit.saw(False)
        if last.angles is not None:
            raise _error("a module")


def _error(name: str) -> ModelError:
    return ModelError(
        f"{name} used to attend with what its rotary embedding returns, and now does something "
        f"else with it: use SamplerConfig(fused_modules=False)"
    )
