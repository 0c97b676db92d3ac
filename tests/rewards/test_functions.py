from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eapo_fast import rewards
from eapo_fast.errors import ConfigError, DataError


def call(function: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    result: list[float | None] = function(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[[0] * 3] * len(completions),
        **columns,
    )
    return result


RIGHT, WRONG_BOX, NO_BOX = r"\boxed{4}", r"\boxed{5}", "I think it is five"


def test_accuracy_is_one_zero_or_none() -> None:
    answers = ["4", "4", "4", None]
    texts = [RIGHT, WRONG_BOX, NO_BOX, RIGHT]
    assert call(rewards.accuracy, texts, answer=answers) == [1.0, 0.0, 0.0, None]


def test_accuracy_reads_solution_and_messages() -> None:
    messages = [[{"role": "user", "content": "9"}, {"role": "assistant", "content": RIGHT}]]
    assert call(rewards.accuracy, messages, solution=["2+2\n#### 4"]) == [1.0]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": RIGHT}]}]]
    assert call(rewards.accuracy, parts, solution=[r"so \boxed{4}"]) == [1.0]


def test_final_turns_replace_completions() -> None:
    texts = [RIGHT + " <advice>"]
    assert call(rewards.accuracy, texts, answer=["4"], final_turns=[WRONG_BOX]) == [0.0]
    assert call(rewards.format, [NO_BOX], final_turns=[RIGHT]) == [1.0]


def test_undecided_is_configurable_and_logged() -> None:
    logged: dict[str, float] = {}
    columns = {"answer": ["4", "4"], "log_metric": logged.__setitem__}
    texts = [RIGHT, r"\boxed{\foo}"]
    assert call(rewards.Accuracy(undecided=None), texts, **columns) == [1.0, None]
    assert logged == {"accuracy/undecided": 0.5}
    assert call(rewards.accuracy, texts, **columns) == [1.0, 0.0]
    assert rewards.Accuracy().__name__ == "accuracy"


def test_missing_reference_column_lists_what_is_there() -> None:
    with pytest.raises(DataError, match=r"'answer' or 'solution'.*got label"):
        call(rewards.accuracy, [RIGHT], label=["4"])


def test_exact_pays_for_the_box() -> None:
    texts = [RIGHT, "#### 4", WRONG_BOX, NO_BOX, r"\boxed{ }"]
    assert call(rewards.exact, texts, answer=["4"] * 5) == [1.0, 1.0, 0.1, 0.0, 0.0]


def test_exact_may_mask_the_undecided() -> None:
    texts = [RIGHT, r"\boxed{\foo}"]
    assert call(rewards.exact, texts, answer=["4", "4"]) == [1.0, 0.1]
    assert call(rewards.Exact(undecided=None), texts, answer=["4", "4"]) == [1.0, None]
    assert call(rewards.get("exact", undecided=0.5), texts, answer=["4", "4"]) == [1.0, 0.5]
    assert repr(rewards.get("accuracy", undecided=None)) == (
        "Accuracy(undecided=None, extract='auto')"
    )


def test_format_wants_a_closed_box_with_content() -> None:
    texts = [RIGHT, r"\boxed{4", r"\boxed{}", "4"]
    assert call(rewards.format, texts) == [1.0, 0.0, 0.0, 0.0]


def test_overlong_matches_the_published_example() -> None:
    function = rewards.overlong(20, 4)
    lengths = [[0] * n for n in (10, 16, 17, 18, 20)]
    values = function(prompts=[""] * 5, completions=[""] * 5, completion_ids=lengths)
    assert values == [0.0, 0.0, -0.25, -0.5, -1.0]
    assert function.__name__ == "overlong"
    with pytest.raises(ConfigError, match="buffer got 21"):
        rewards.overlong(20, 21)


def test_overlong_counts_policy_tokens_only() -> None:
    rollout = SimpleNamespace(loss_mask=[1] * 17 + [0] * 30)
    values = rewards.overlong(20, 4)(completion_ids=[[0] * 47], rollouts=[rollout])
    assert values == [-0.25]


def rollouts(*statuses: tuple[str, ...], groups: tuple[int, ...] = ()) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            consults=[SimpleNamespace(status=status) for status in row],
            group_id=groups[i] if groups else 0,
        )
        for i, row in enumerate(statuses)
    ]


def test_consult_cost_counts_accepted_or_asked() -> None:
    rows = rollouts(("ok", "declined", "cached"), (), ("timeout",))
    assert call(rewards.consult_cost(0.5), [""] * 3, rollouts=rows) == [-1.0, 0.0, 0.0]
    asked = rewards.consult_cost(0.5, counted="asked")
    assert call(asked, [""] * 3, rollouts=rows) == [-1.5, 0.0, -0.5]
    with pytest.raises(DataError, match="rollouts"):
        call(rewards.consult_cost(), [""])


def test_consult_discount_spares_the_thriftiest_correct_rollout() -> None:
    rows = rollouts(("ok",), ("ok",) * 3, (), ("ok", "ok"), groups=(0, 0, 0, 1))
    texts = [RIGHT, RIGHT, WRONG_BOX, RIGHT]
    values = call(rewards.consult_discount(0.7), texts, answer=["4"] * 4, rollouts=rows)
    assert values == [0.0, pytest.approx(0.49 - 1), 0.0, 0.0]
    with pytest.raises(ConfigError, match="factor got 0"):
        rewards.consult_discount(0)


F1 = {
    "equal": (r"\boxed{the red Fox}", "red fox", 1.0),
    "half": (r"\boxed{red}", "red fox", 2 / 3),
    "nothing in common": (r"\boxed{blue}", "red fox", 0.1),
    "no box": ("red fox", "red fox", 0.0),
    "closed word": (r"\boxed{yes it is}", "yes", 0.1),
    "trap: sign": (r"\boxed{-5}", "5", 1.0),
    "trap: fraction": (r"\boxed{1/2}", "12", 1.0),
    "trap: list": (r"\boxed{12 34}", "34", 2 / 3),
}


@pytest.mark.parametrize(("text", "gold", "value"), F1.values(), ids=F1.keys())
def test_paper_f1(text: str, gold: str, value: float) -> None:
    assert call(rewards.paper_f1, [text], answer=[gold]) == [pytest.approx(value)]


def test_get_by_name() -> None:
    assert rewards.get("exact") is rewards.exact
    assert rewards.get("overlong", max_length=20, buffer=4).__name__ == "overlong"
    with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
        rewards.get("acuracy")
    with pytest.raises(ConfigError, match="takes no settings, got extra"):
        rewards.get("format", extra=1)
    assert set(rewards.names()) < set(rewards.__all__)
