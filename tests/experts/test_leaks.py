"""The leak flag on built cases, and what may be done about stated answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eapo_fast.engine import Vocabulary
from eapo_fast.experts import ConsultPolicy, ConsultRequest, ConsultScheduler, Function
from eapo_fast.experts.replies import redact_boxes
from eapo_fast.rewards.leaks import states_answer
from eapo_fast.rollout import Rollout, Segment

STATING = (
    "So the answer is {gold}.",
    "Therefore \\boxed{{{gold}}}.",
    "Work it out.\n#### {gold}",
    "{gold}",
    "Add both: {a} + {b} = {gold}.",
    "Then {a} times {b} equals {gold}, so go on from there",
    "First note the parity. The total is {gold}.",
    "the final result is ${gold}$",
    "x = {gold}",
    "\\boxed{{{gold}}} because \\boxed{{{a}}} is too small",
    "Adding gives {gold}",
    "The value of the whole sum is {gold}.",
)
SILENT = (
    "Try to divide by {gold} and look at the remainder.",
    "Add both: {a} + {b} = {c}.",
    "Have you used the {gold} marbles of the statement?",
    "So the answer is {c}.",
    "\\boxed{{{c}}}",
    "{c}",
    "Work modulo {gold}: what is left?",
    "Between {gold} and {c} there is a gap.",
    "Use similar triangles.",
    "Draw a table with {gold} rows and count.",
    "x = {c}",
    "#### {c}",
)


def test_the_flag_is_right_on_five_hundred_built_cases() -> None:
    rng = random.Random(0)
    wrong = []
    for case in range(504):
        gold = rng.choice([rng.randint(100, 9999), f"{rng.randint(101, 999)}/{rng.randint(2, 9)}1"])
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        c = rng.randint(10_000, 99_999)
        stated = case % 2 == 0
        template = (STATING if stated else SILENT)[case // 2 % 12]
        text = template.format(gold=gold, a=a, b=b, c=c)
        if states_answer(text, f"the work\n#### {gold}") != stated:
            wrong.append((stated, gold, text))
    assert wrong == []


def test_empty_and_hostile_texts_state_nothing() -> None:
    for text in ("", " ", "\\boxed{", "=" * 5000, "\\boxed{" * 900, "answer is", "####"):
        assert not states_answer(text, "72")
    assert not states_answer("72", "")


@pytest.mark.parametrize(
    ("answers", "status", "text"),
    [
        ("keep", "ok", "so \\boxed{\\frac{1}{2}} is it"),
        ("redact", "ok", "so [answer withheld] is it"),
        ("decline", "refused", ""),
    ],
)
def test_boxed_answers_are_kept_redacted_or_declined(answers: str, status: str, text: str) -> None:
    expert = Function(lambda request: "so \\boxed{\\frac{1}{2}} is it", immediate=True)
    with ConsultScheduler(expert, ConsultPolicy(answers=answers)) as desk:  # type: ignore[arg-type]
        result = desk.submit(ConsultRequest("q")).result()
    assert (result.status, result.text) == (status, text)


def test_redaction_takes_whole_groups() -> None:
    cases = {
        "none": "none",
        "\\boxed{1}\\fbox {2}": "[answer withheld][answer withheld]",
        "a \\boxed{\\{ {x} \\}} b": "a [answer withheld] b",
        "open \\boxed{ {1} and on": "open [answer withheld]",
        "\\boxed{\\": "[answer withheld]",
    }
    assert {text: redact_boxes(text) for text in cases} == cases


def test_an_answer_that_only_the_expert_gave_earns_nothing(
    make_model: Callable[..., Any], bpe_tokenizer: Any
) -> None:
    from eapo_fast.training.scoring import Scorer

    vocabulary = Vocabulary(bpe_tokenizer, len(bpe_tokenizer))
    advice = vocabulary.encode("<advice>\\boxed{72}</advice>")
    for said, reward in (("I do not know", 0.0), ("so \\boxed{72}", 1.0)):
        own, end = vocabulary.encode("<consult><q>48+24</q></consult>"), vocabulary.encode(said)
        ids = [*own, *advice, *end]
        borders = [0, len(own), len(own) + len(advice), len(ids)]
        kinds = ("policy", "expert", "policy")
        segments = [
            Segment(kind, start, stop, turn // 2)  # type: ignore[arg-type]
            for turn, (kind, start, stop) in enumerate(
                zip(kinds, borders, borders[1:], strict=False)
            )
        ]
        rollout = Rollout(
            prompt_ids=[5],
            token_ids=np.array(ids),
            loss_mask=np.array([1] * len(own) + [0] * len(advice) + [1] * len(end), np.uint8),
            logprobs=np.zeros(len(ids), np.float32),
            segments=segments,
            finish_reason="stop",
            group_id=0,
            sample_index=0,
            prompt_id=0,
            banned=(np.zeros(0, np.int32), np.zeros(0, np.int32)),
        )
        [score] = Scorer(["exact"], None, vocabulary).score(
            [rollout], {"prompt": "?", "answer": "72"}
        )
        assert (score.reward, score.accuracy) == (reward, reward)
