"""The commands `eval`, `table` and `distill`; like `cli`, without heavy imports until they run."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eapo_fast.cli_parts import at_least, command, local_expert, named_expert, openai_expert
from eapo_fast.errors import ConfigError

_EXPERTS = ("calculator", "openai", "local", "recorded")
_METHODS = ("base", "workflow", "distillation", "self-exploratory", "eapo")
_PASSED = (
    "method",
    "n",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "limit",
    "seed",
    "chunk",
    "system_prompt",
    "consult_prompt",
    "max_turns",
    "max_queries",
    "expert_timeout",
)
"""Options that are fields of `EvalSettings`."""


def add_commands(commands: Any) -> None:
    """Add the three commands to the parser."""
    _add_eval(commands)
    _add_table(commands)
    _add_distill(commands)


def _add_eval(commands: Any) -> None:
    text = "measure a model on a JSONL file: mean@n, any@k, maj@n, Var with their intervals"
    parser = command(
        commands,
        "eval",
        text,
        epilog="An interrupted evaluation continues when the same command is given again.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="transformers or adapter directory")
    add("--data", required=True, metavar="FILE.jsonl", help="problems with their answers")
    add("--out", metavar="DIR", help="where results go (default: runs/eval/<model>-<data>-<kind>)")
    add("--method", choices=_METHODS, help="row of the paper's table that this measures")
    add("--n", type=at_least(1), default=32, help="samples per problem (default: 32)")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--top-p", type=float, default=0.95, help="nucleus (default: 0.95)")
    add("--top-k", type=at_least(0), default=0, help="keep the k likeliest tokens (default: all)")
    add("--max-tokens", type=at_least(1), default=16384, help="most new tokens (default: 16384)")
    add("--limit", type=at_least(1), help="first rows only")
    add("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    add("--chunk", type=at_least(1), help="problems between two saves (default: 512 samples)")
    add("--system-prompt", metavar="TEXT", help="system text before every problem")
    add("--restart", action="store_true", help="begin anew; what is there is set aside")
    add("--cpu", action="store_true", help="stay on the CPU even when a GPU is there")
    add("--quiet", action="store_true", help="no progress lines")
    add("--assisted", action="store_true", help="allow consults (otherwise the model works alone)")
    add("--expert", choices=_EXPERTS, help="who answers when --assisted")
    add("--expert-url", metavar="URL", help="chat-completions server of an openai expert")
    add("--expert-model", metavar="NAME", help="model at that server; directory of a local expert")
    add("--expert-key-env", metavar="VAR", help="environment variable with the API key")
    add("--expert-record", metavar="FILE", help="write every reply to this file")
    add("--expert-replay", metavar="FILE", help="answer from such a file (expert: recorded)")
    add("--expert-timeout", type=float, default=60.0, help="seconds per consult (default: 60)")
    add("--consult-prompt", metavar="TEXT", help='how to consult (default: built in; "": none)')
    add("--max-turns", type=at_least(2), default=10, help="turns when --assisted (default: 10)")
    add("--max-queries", type=at_least(1), default=3, help="queries per consult (default: 3)")
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    expert = _expert(arguments)
    from eapo_fast.evaluation import EvalSettings, evaluate_model
    from eapo_fast.evaluation.report import progress_line, result_text

    settings = EvalSettings(**{name: getattr(arguments, name) for name in _PASSED})
    with _plain_warnings():
        result = evaluate_model(
            arguments.model,
            arguments.data,
            arguments.out,
            settings,
            expert=expert,
            expert_record=arguments.expert_record,
            restart=arguments.restart,
            use_cpu=arguments.cpu,
            progress=None if arguments.quiet else progress_line(sys.stderr),
        )
    print(result_text(result))
    return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show our own warnings as messages, without file and line."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        print(f"eapo-fast: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _expert(arguments: argparse.Namespace) -> Any:
    """The expert of an assisted evaluation, None for a solo one."""
    by_option = "openai" if arguments.expert_url else None
    by_option = by_option or ("recorded" if arguments.expert_replay else None)
    kind = arguments.expert or by_option
    if not (arguments.assisted or arguments.method == "workflow"):
        if kind or arguments.expert_record:
            raise ConfigError("--expert and its options need --assisted: solo means no consults")
        return None
    if kind is None:
        raise ConfigError(
            f"--assisted needs an expert: --expert {'|'.join(_EXPERTS)}, or --expert-url URL"
        )
    if kind == "openai":
        return openai_expert(arguments)
    if kind == "local":
        return local_expert(arguments)
    if kind == "recorded":
        if not arguments.expert_replay:
            raise ConfigError("a recorded expert needs --expert-replay FILE")
        return named_expert(kind, path=arguments.expert_replay)
    return named_expert(kind)


def _add_table(commands: Any) -> None:
    parser = command(commands, "table", "join finished evaluations into one table, paired")
    add = parser.add_argument
    add("folders", nargs="+", metavar="EVAL_DIR", help="folders of eval; the first is compared to")
    add("--out", default="runs/table", metavar="DIR", help="where it goes (default: runs/table)")
    parser.set_defaults(run=_table)


def _table(arguments: argparse.Namespace) -> int:
    from eapo_fast.evaluation.table import write_table

    path = write_table(arguments.folders, arguments.out)
    print(path.read_text(encoding="utf-8"))
    print(f"written: {path}")
    return 0


def _add_distill(commands: Any) -> None:
    text = "fine-tune a model on an expert's solutions (the distillation baseline)"
    parser = command(
        commands,
        "distill",
        text,
        epilog="An interrupted run continues from its last checkpoint when the same command is "
        "given again. Measure the result: eapo-fast eval --model OUT/final --method distillation.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="transformers directory")
    add(
        "--data",
        required=True,
        metavar="FILE.jsonl",
        help="problems with a solution column (with --expert: with answers), or the folder of an "
        "expert's evaluation, whose correct samples are the solutions",
    )
    add("--out", required=True, metavar="DIR", help="checkpoints, metrics and final/ go here")
    add("--expert", choices=("openai", "local"), help="ask it for the solutions first")
    add("--expert-url", metavar="URL", help="chat-completions server of an openai expert")
    add("--expert-model", metavar="NAME", help="model at that server; directory of a local expert")
    add("--expert-key-env", metavar="VAR", help="environment variable with the API key")
    add("--samples", type=at_least(1), default=1, help="solutions asked per problem (default: 1)")
    add("--epochs", type=float, default=3.0, help="passes over the solutions (default: 3)")
    add("--max-steps", type=at_least(1), help="optimizer steps, instead of --epochs")
    add("--batch-size", type=at_least(1), default=32, help="solutions per step (default: 32)")
    add("--learning-rate", type=float, help="peak (default: 1e-5, with --lora 1e-4)")
    add("--lora", type=at_least(1), metavar="RANK", help="train an adapter of this rank")
    add("--max-length", type=at_least(2), help="longer prompt + solution pairs are left out")
    add("--save-steps", type=at_least(1), default=50, help="between checkpoints (default: 50)")
    add("--seed", type=int, default=0, help="order of solutions, adapter (default: 0)")
    add("--system-prompt", metavar="TEXT", help="system text before every problem")
    add("--restart", action="store_true", help="begin anew; what is there is set aside")
    add("--cpu", action="store_true", help="stay on the CPU even when a GPU is there")
    parser.set_defaults(run=_distill)


def _distill(arguments: argparse.Namespace) -> int:
    expert = _solving_expert(arguments)
    from eapo_fast.distillation import DistillSettings, collect_solutions, distill

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    names = ("epochs", "max_steps", "batch_size", "learning_rate", "lora", "max_length")
    more = ("save_steps", "seed", "system_prompt")
    settings = DistillSettings(**{name: getattr(arguments, name) for name in (*names, *more)})
    data = arguments.data
    with _plain_warnings():
        if expert is not None:
            data = collect_solutions(
                data, expert, arguments.out, samples=arguments.samples, progress=tell
            )
        summary = distill(
            arguments.model,
            data,
            arguments.out,
            settings,
            restart=arguments.restart,
            use_cpu=arguments.cpu,
            progress=tell,
        )
    for name, value in summary.items():
        print(f"{name:<14} {value:.4f}" if isinstance(value, float) else f"{name:<14} {value}")
    return 0


def _solving_expert(arguments: argparse.Namespace) -> Any:
    """The expert that is asked for whole solutions; None: the data holds them."""
    kind = arguments.expert or ("openai" if arguments.expert_url else None)
    if kind is None:
        return None
    from eapo_fast.distillation.collect import MAX_REPLY_TOKENS, SYSTEM

    asked = {"system": SYSTEM, "prompt": "{query}", "max_reply_tokens": MAX_REPLY_TOKENS}
    if kind == "local":
        return local_expert(arguments, **asked)
    temperature = 0.6 if arguments.samples > 1 else None
    return openai_expert(arguments, temperature=temperature, **asked)
