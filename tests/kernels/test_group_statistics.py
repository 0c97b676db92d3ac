from __future__ import annotations

import pytest
import torch

from eapo_fast import ops

_REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.7, 0.7, 2.0], dtype=torch.float64)
_GROUPS = torch.tensor([3, 3, 1, 3, 1, 1, 8])


@pytest.mark.parametrize("center", ["mean", "loo", "length", "none"])
def test_statistics_make_the_advantages(center):
    lengths = torch.tensor([3, 5, 2, 6, 1, 1, 4])
    found = ops.group_statistics(_REWARDS, _GROUPS, center=center, lengths=lengths, ddof=0)
    wanted = ops.group_advantages(
        _REWARDS, _GROUPS, center=center, lengths=lengths, ddof=0, eps=0.1
    )
    torch.testing.assert_close((_REWARDS - found.center) / (found.std + 0.1), wanted)
    assert (found.center[6], found.std[6]) == (0, 1)


def test_center_and_std_are_those_of_the_group():
    found = ops.group_statistics(_REWARDS, _GROUPS)
    for group in (1, 3):
        members = _REWARDS[group == _GROUPS]
        torch.testing.assert_close(
            found.center[group == _GROUPS], members.mean().expand(len(members))
        )
        torch.testing.assert_close(found.std[group == _GROUPS], members.std().expand(len(members)))
    empty = ops.group_statistics(_REWARDS[:0], _GROUPS[:0])
    assert empty.center.shape == empty.std.shape == (0,)


def test_constant_group_has_no_spread():
    found = ops.group_statistics(torch.full((4,), 0.1), torch.zeros(4).long())
    assert found.std.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match=r"center: got 'median', allowed is one of"):
        ops.group_statistics(_REWARDS, _GROUPS, center="median")
