"""The whole loop on tiny models: runs, files, resume, reproducibility, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from eapo_fast import EAPOConfig, Trainer
from eapo_fast.errors import ConfigError, DataError, EapoError, ModelError
from eapo_fast.experts import Calculator
from eapo_fast.reporting import read_jsonl
from eapo_fast.rollout import ConsultProtocol
from eapo_fast.training.consulting import turns_at
from eapo_fast.training.scoring import RewardError

ROWS = [{"problem": f"What is {a}+{a}?", "answer": str(2 * a)} for a in range(2, 14)]


def letters(completions: list[Any], **_: Any) -> list[float]:
    """A dense reward: share of ASCII letters, so that groups have contrast."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(x.isascii() and x.isalpha() for x in t) / max(1, len(t)) for t in texts]


def settings(folder: Path, **changes: Any) -> EAPOConfig:
    base: dict[str, Any] = {
        "output_dir": str(folder),
        "recipe": "grpo",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 4,
        "max_completion_length": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return EAPOConfig(**(base | changes))


@pytest.fixture
def train(
    make_model: Callable[..., Any], bpe_tokenizer: Any, tmp_path: Path
) -> Callable[..., Trainer]:
    """Build a trainer over a fresh tiny model."""

    def build(folder: str = "run", **options: Any) -> Trainer:
        changes = options.pop("settings", {})
        model = options.pop("model", None) or make_model()
        return Trainer(
            model,
            options.pop("reward_funcs", letters),
            settings(tmp_path / folder, **changes),
            options.pop("train_dataset", ROWS),
            options.pop("eval_dataset", None),
            options.pop("processing_class", bpe_tokenizer),
            **options,
        )

    return build


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without clocks."""
    timed = ("perf/", "step_time", "expert/latency")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def test_training_raises_a_dense_reward(train: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = train(settings={"max_steps": 25, "per_device_train_batch_size": 16})
    output = trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history]
    assert output.global_step == 25
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert (
        max(row["sampling/sampling_logp_difference/max"] for row in trainer.state.log_history)
        < 1e-3
    )


def test_a_run_leaves_its_files(train: Callable[..., Trainer], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = train(
        expert=Calculator(),
        eval_dataset=ROWS[:3],
        reward_funcs=["exact", letters],
        settings={"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    )
    trainer.train()
    run = tmp_path / "run"
    for name in ("metrics.jsonl", "curves.png", "report.html", "summary.json", "final"):
        assert (run / name).exists(), name
    rows = logged(run)
    assert rows[0]["step"] == 0
    assert {"eval_solo_accuracy", "eval_solo_accuracy_low", "eval_solo_n"} <= set(rows[0])
    wanted = {
        "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "reward", "reward_std",
        "frac_reward_zero_std", "rewards/exact/mean", "rewards/letters/std",
        "completions/mean_length", "completions/clipped_ratio", "entropy", "clip_ratio/low_mean",
        "sampling/sampling_logp_difference/max", "expert/consult_rate", "expert/acceptance",
    }  # fmt: skip
    assert wanted <= set(rows[1]), wanted - set(rows[1])
    AutoModelForCausalLM.from_pretrained(run / "final")
    AutoTokenizer.from_pretrained(run / "final")
    lines = read_jsonl(run / "rollouts" / "step_000001.jsonl")
    assert len(lines) == 8
    assert lines[0]["segments"][0]["kind"] == "policy"


def test_one_seed_gives_one_run(train: Callable[..., Trainer], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        train(folder, expert=Calculator(), settings={"seed": 3}).train()
    train("c", expert=Calculator(), settings={"seed": 4}).train()
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    assert logged(tmp_path / "a") != logged(tmp_path / "c")


CYCLES = {
    "one-step-a-generation": {},
    "two-steps-a-generation": {"steps_per_generation": 2},
    "two-passes": {"num_iterations": 2},
}


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
def test_resumed_run_equals_the_uninterrupted_one(
    cycle: dict[str, Any], train: Callable[..., Trainer], tmp_path: Path
) -> None:
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **cycle}
    whole = train("whole", settings=changes, expert=Calculator())
    whole.train()

    class Stop:
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    first = train("halved", settings=changes, expert=Calculator(), callbacks=[Stop()])
    first.train()
    assert 0 < first.state.global_step < 6
    second = train("halved", settings=changes, expert=Calculator())
    second.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(tmp_path / "whole") == logged(tmp_path / "halved")


def test_several_optimizer_steps_a_generation(train: Callable[..., Trainer]) -> None:
    trainer = train(settings={"steps_per_generation": 2, "num_iterations": 2, "max_steps": 8})
    trainer.train()
    reported = [row for row in trainer.state.log_history if "reward" in row]
    assert len(reported) == 2
    assert trainer.state.global_step == 8


def test_turn_limit_contracts_to_one(tmp_path: Path) -> None:
    args = settings(tmp_path, max_turns=10, turn_contraction=0.5)
    limits = [turns_at(s, args, 100) for s in range(1, 101)]
    assert limits[0] == 10
    assert limits[50:] == [1] * 50
    assert all(a >= b for a, b in pairwise(limits))
    assert turns_at(100, args.replace(turn_contraction=0.0), 100) == 10


def test_solo_and_assisted_evaluation(train: Callable[..., Trainer]) -> None:
    trainer = train(expert=Calculator(), eval_dataset=ROWS[:2], reward_funcs="exact")
    assert 0.0 <= trainer.evaluate()["eval_solo_accuracy"] <= 1.0
    assert "eval_assisted_accuracy" in trainer.evaluate(assisted=True)


def test_without_expert_but_with_a_protocol_the_opener_is_banned_everywhere(
    train: Callable[..., Trainer],
) -> None:
    trainer = train(protocol=ConsultProtocol(), settings={"max_steps": 2})
    trainer.train()
    assert "expert/consult_rate" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-3


def test_callbacks_are_called(train: Callable[..., Trainer]) -> None:
    from transformers import TrainerCallback

    seen: list[str] = []

    class Spy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(f"step {state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(f"log {sorted(logs)[0]}")

    train(callbacks=[Spy()], settings={"max_steps": 2}).train()
    assert seen[0] == "step 1"
    assert len(seen) == 4


def test_user_errors_in_rewards_name_the_function(train: Callable[..., Trainer]) -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("gold")

    def short(completions: list[Any], **_: Any) -> list[float]:
        return [1.0]

    def words(completions: list[Any], **_: Any) -> list[Any]:
        return [0.5, "right", *completions[2:]]

    place = r"'broken' on prompt .*\(row \d+\), rollout 0 of 4, raised KeyError"
    with pytest.raises(RewardError, match=place):
        train(reward_funcs=broken).train()
    with pytest.raises(RewardError, match=r"'short' .* returned 1 values"):
        train(reward_funcs=short).train()
    with pytest.raises(RewardError, match=r"'words' .*rollout 1, returned 'right'"):
        train(reward_funcs=words).train()


def test_async_rewards_and_none_values(train: Callable[..., Trainer]) -> None:
    async def later(completions: list[Any], **_: Any) -> list[float | None]:
        return [None if i == 0 else float(i) for i in range(len(completions))]

    trainer = train(reward_funcs=[letters, later], settings={"reward_weights": [1.0, 0.5]})
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["reward"])


def test_rewards_log_their_time_and_what_is_undecided(train: Callable[..., Trainer]) -> None:
    trainer = train(reward_funcs=["exact", letters])
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["perf/reward/exact_s"] > 0
    assert first["perf/reward/letters_s"] > 0
    assert 0 <= first["accuracy/undecided"] <= 1


def test_unreadable_references_are_listed_before_step_1(train: Callable[..., Trainer]) -> None:
    rows = [*ROWS[:8], {"problem": "?", "answer": r"\foo{1}"}, {"problem": "?", "answer": "(1"}]
    with pytest.warns(UserWarning, match=r"(?s)2 unreadable answers:.*row 8: .*foo.*\n.*row 9: "):
        train(train_dataset=rows, reward_funcs="accuracy")


def test_scoring_inside_a_running_loop(train: Callable[..., Trainer]) -> None:
    import asyncio

    async def evaluate() -> dict[str, float]:
        return train(reward_funcs=letters, eval_dataset=ROWS[:2]).evaluate()

    assert asyncio.run(evaluate())["eval_solo_n"] == 2.0


def no_eos(tokenizer: Any) -> Any:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    return bare


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "batch-does-not-divide": (
        {"settings": {"per_device_train_batch_size": 6}}, ConfigError, "Nearest valid"),
    "unknown-key": ({"settings": {"learnig_rate": 1}}, TypeError, "learning_rate"),
    "no-prompt-column": ({"train_dataset": [{"text": "x"}]}, DataError, "prompt"),
    "empty-dataset": ({"train_dataset": []}, DataError, "empty|no rows"),
    "no-answer": (
        {"train_dataset": [{"problem": "x"}] * 4, "reward_funcs": "accuracy"}, DataError, "answer"),
    "no-such-file": ({"train_dataset": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
    "unknown-reward": ({"reward_funcs": "acuracy"}, ConfigError, "accuracy"),
    "unknown-recipe": ({"settings": {"recipe": "gpro"}}, ConfigError, "grpo"),
    "weights-of-rewards": ({"settings": {"reward_weights": [1.0, 2.0]}}, ConfigError, "weights"),
    "too-few-prompts": ({"train_dataset": ROWS[:1]}, ConfigError, "prompt"),
    "no-model": ({"model": "nowhere/at/all"}, ModelError, "nowhere/at/all"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_training(
    options: dict[str, Any], kind: type[Exception], words: str, train: Callable[..., Trainer]
) -> None:
    with pytest.raises(kind, match=words):
        train(**options)


def test_tokenizer_without_eos(train: Callable[..., Trainer], bpe_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="EOS"):
        train(processing_class=no_eos(bpe_tokenizer))


def test_folder_that_is_no_model(train: Callable[..., Trainer], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        train(model=str(tmp_path / "empty"))


def test_output_folder_that_cannot_be_written(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match="output_dir"):
        train(settings={"output_dir": str(tmp_path / "taken" / "run")})


def test_nothing_to_resume(train: Callable[..., Trainer]) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        train().train(resume_from_checkpoint=True)


def test_config_survives_json(tmp_path: Path) -> None:
    args = settings(tmp_path, reward_weights=[1.0])
    assert EAPOConfig.from_dict(json.loads(json.dumps(args.to_dict()))) == args


def test_all_errors_share_a_base() -> None:
    assert all(issubclass(e, EapoError) for e in (ConfigError, DataError, ModelError, RewardError))


def test_rows_without_a_reward_are_data(train: Callable[..., Trainer]) -> None:
    def some(completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
        return [None if int(answer[0]) % 4 else float(i) for i in range(len(completions))]

    def none(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    train("some", reward_funcs=some).train()
    trainer = train("none", reward_funcs=none)
    trainer.train()
    assert trainer.state.log_history[0]["skipped"] == 1.0


def test_a_fresh_run_sets_old_checkpoints_aside(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train(settings={**changes, "max_steps": 3}).train()
    train(settings={**changes, "max_steps": 2}).train()
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert (tmp_path / "run" / "checkpoints.old" / "checkpoint-3").is_dir()
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_trainer_survives_an_interrupt_and_refuses_to_overwrite(
    train: Callable[..., Trainer],
) -> None:
    class Interrupt:
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not hasattr(self, "done"):
                self.done = True
                raise KeyboardInterrupt

    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = train(settings=changes, expert=Calculator(), callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 4


def test_tokenizers_eos_ends_a_rollout(train: Callable[..., Trainer], make_model: Any) -> None:
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    trainer = train(model=model)
    assert trainer.train_params.stop_token_ids == (trainer.processing_class.eos_token_id,)
    assert trainer.eval_params.stop_token_ids == (trainer.processing_class.eos_token_id,)


def test_a_users_own_accuracy_needs_no_answer_column(train: Callable[..., Trainer]) -> None:
    from functools import partial

    def accuracy(completions: list[Any], target: list[str], **_: Any) -> list[float]:
        return [float(t in c[0]["content"]) for c, t in zip(completions, target, strict=True)]

    rows = [{"problem": f"Say {n}", "target": str(n)} for n in range(4)]
    train(reward_funcs=[accuracy, partial(letters)], train_dataset=rows)


def test_last_step_is_saved_in_the_middle_of_a_cycle(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    changes = {"save_strategy": "steps", "steps_per_generation": 2, "max_steps": 3}
    train(settings=changes).train()
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_metrics_resume_inside_a_logging_window(
    train: Callable[..., Trainer], tmp_path: Path
) -> None:
    changes = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}

    class Stop:
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    train("whole", settings=changes, expert=Calculator()).train()
    train("halved", settings=changes, expert=Calculator(), callbacks=[Stop()]).train()
    train("halved", settings=changes, expert=Calculator()).train(resume_from_checkpoint=True)
    assert logged(tmp_path / "whole") == logged(tmp_path / "halved")


def test_assisted_evaluation_drops_long_prompts_with_their_rows(
    train: Callable[..., Trainer],
) -> None:
    rows = [{"problem": "abcdefghij" * n, "answer": "1"} for n in (1, 15, 2)]
    trainer = train(
        expert=Calculator(),
        eval_dataset=rows,
        reward_funcs="exact",
        settings={"consult_prompt": "klmnopqrst" * 8, "max_prompt_length": 170},
    )
    assert trainer.evaluate()["eval_solo_n"] == 3
    assert trainer.evaluate(assisted=True)["eval_assisted_n"] == 2
