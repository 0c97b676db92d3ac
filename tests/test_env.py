from __future__ import annotations

import pytest

from eapo_fast import env
from eapo_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        pytest.param(env.DEBUG, "1", True, id="flag"),
        pytest.param(env.DEBUG, " no ", False, id="flag-off"),
        pytest.param(env.DEBUG, "", False, id="empty-is-unset"),
        pytest.param(env.ISA, "AVX2", "avx2", id="any-case"),
        pytest.param(env.CUDA_BUILD, "off", "OFF", id="upper"),
        pytest.param(env.CI, "github", True, id="anything-set"),
    ],
)
def test_values_are_typed(monkeypatch, variable, text, value):
    monkeypatch.setenv(variable.name, text)
    assert variable.get() == value


@pytest.mark.parametrize(
    "variable", [env.DEBUG, env.LIVE, env.ISA, env.CUDA_BUILD], ids=lambda v: v.name
)
def test_a_bad_value_names_variable_and_remedy(monkeypatch, variable):
    monkeypatch.setenv(variable.name, "sometimes")
    with pytest.raises(ConfigError) as caught:
        variable.get()
    for part in (variable.name, "'sometimes'", variable.allowed, "unset"):
        assert part in str(caught.value)


def test_table_has_one_row_per_variable():
    rows = env.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [v.name for v in env.VARIABLES]
