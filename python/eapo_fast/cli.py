"""The command line of `eapo-fast`: demo, train, eval, table, distill, rollouts, consults, ...

Each command imports what it needs when it runs, so `--help` answers at once and without torch.
An error of eapo_fast is one line on stderr and exit status 2; `EAPO_FAST_DEBUG=1` shows where it
was raised.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eapo_fast import cli_evaluation, env
from eapo_fast.cli_parts import at_least as _at_least
from eapo_fast.cli_parts import command as _command
from eapo_fast.cli_parts import openai_expert
from eapo_fast.errors import ConfigError, EapoError

USAGE_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    if arguments.run is _compare:
        arguments.options = extra
    elif extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads, as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\neapo-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except EapoError as error:
        if _debugging():
            raise
        print(f"eapo-fast: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return status


def _debugging() -> bool:
    try:
        return env.DEBUG.get()
    except ConfigError as error:
        print(f"eapo-fast: {error}", file=sys.stderr)
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eapo-fast",
        description="Train language models with an expert's help, then let them work alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train(commands)
    cli_evaluation.add_commands(commands)
    for add in (_add_rollouts, _add_consults, _add_info, _add_compare):
        add(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import eapo_fast

        print(f"eapo-fast {eapo_fast.__version__}")
        parser.exit()


def _add_demo(commands: Any) -> None:
    command = _command(commands, "demo", "train the embedded model in a few minutes")
    command.add_argument(
        "--steps", type=_at_least(1), help="training steps (default: the full demo)"
    )
    command.add_argument("--seed", type=int, help="seed of every draw (default: the demo's own)")
    command.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="where results go (default: runs/demo)"
    )
    command.add_argument(
        "--expert",
        choices=("calculator", "none"),
        default="calculator",
        help="who answers consults; none: plain self-exploratory training (default: calculator)",
    )
    command.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from eapo_fast.demo.run import run_demo

    run_demo(
        steps=arguments.steps,
        seed=arguments.seed,
        output_dir=arguments.out,
        expert=arguments.expert == "calculator",
    )
    return 0


def _add_train(commands: Any) -> None:
    command = _command(
        commands,
        "train",
        "train a model as a YAML file says",
        usage="eapo-fast train [--dry-run] CONFIG.yaml [--key value ...]",
        epilog="Keys are the fields of EAPOConfig (TRL's names) and model, train_dataset, "
        "eval_dataset, reward_funcs and expert; --key value overrides the file, and --expert.model "
        "x reaches into a mapping.",
    )
    command.add_argument("config", metavar="CONFIG.yaml", help="the run file")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved run and stop"
    )
    command.add_argument("overrides", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    command.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from eapo_fast.run_config import build_trainer, load_run

    words = [word for word in arguments.overrides if word != "--dry-run"]
    run = load_run(arguments.config, words)
    trainer = build_trainer(run)
    if arguments.dry_run or len(words) < len(arguments.overrides):
        print(run.to_yaml(), end="")
        for name, value in trainer.describe().items():
            print(f"# {name.replace('_', ' ')}: {value}")
        return 0
    from eapo_fast.reporting import print_summary

    print_summary(trainer.train().metrics)
    return 0


def _add_rollouts(commands: Any) -> None:
    command = _command(commands, "rollouts", "write a run's report page and print its path")
    command.add_argument("run_dir", metavar="RUN_DIR", help="a directory with metrics.jsonl")
    command.set_defaults(run=_rollouts)


def _rollouts(arguments: argparse.Namespace) -> int:
    from eapo_fast.reporting.report import write_report

    print(write_report(Path(arguments.run_dir)))
    return 0


def _add_consults(commands: Any) -> None:
    text = "show a run's slowest, dearest and failed consults, or replay one"
    command = _command(commands, "consults", text)
    add = command.add_argument
    add("run_dir", metavar="RUN_DIR", help="a directory with consults.jsonl")
    add("--top", type=_at_least(1), default=10, help="rows of each table (default: 10)")
    add("--replay", metavar="ID", help="step/prompt/rollout/turn/query: this consult alone")
    add("--expert-url", metavar="URL", help="with --replay: ask this chat-completions server anew")
    add("--expert-model", metavar="NAME", help="model name at that server")
    add("--expert-key-env", metavar="VAR", help="environment variable with the API key")
    command.set_defaults(run=_consults)


def _consults(arguments: argparse.Namespace) -> int:
    from eapo_fast.reporting import consults

    folder = Path(arguments.run_dir)
    if arguments.replay is None:
        if arguments.expert_url:
            raise ConfigError("--expert-url needs --replay: say which consult to ask anew")
        print(consults.consult_report(folder, arguments.top))
    elif arguments.expert_url:
        print(consults.ask_again(folder, arguments.replay, openai_expert(arguments)))
    else:
        print(consults.replay_consult(folder, arguments.replay))
    return 0


def _add_info(commands: Any) -> None:
    command = _command(commands, "info", "print versions, devices and backends, for bug reports")
    command.add_argument(
        "--env", action="store_true", help="list the environment variables instead"
    )
    command.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    from eapo_fast.reporting.info import info_lines

    print(env.table() if arguments.env else "\n".join(info_lines()))
    return 0


def _add_compare(commands: Any) -> None:
    text = "train with and without the expert and compare (long)"
    command = _command(commands, "compare", text, add_help=False)
    command.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from eapo_fast.demo.compare import main as compare

    return compare(arguments.options) or 0


if __name__ == "__main__":
    sys.exit(main())
