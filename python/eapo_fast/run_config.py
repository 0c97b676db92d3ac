"""From a YAML file to the objects of a run: what `eapo-fast train` reads, checks and builds.

A file holds the fields of `EAPOConfig` and, beside them, the keys of `RUN_KEYS`. Every mistake is a
`ConfigError` that names the key; nothing heavy is imported before the whole file has been checked.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from eapo_fast.config import EAPOConfig
from eapo_fast.errors import ConfigError, suggest

if TYPE_CHECKING:
    from eapo_fast.trainer import Trainer

RUN_KEYS: dict[str, str] = {
    "model": "directory of a transformers causal LM with its tokenizer (required)",
    "train_dataset": "JSONL file with a prompt or problem column (required)",
    "eval_dataset": "JSONL file for solo evaluation",
    "reward_funcs": "a list of names in eapo_fast.rewards, {name: ..., setting: ...} or "
    "package.module.function",
    "expert": "mapping with kind: openai, calculator, local, recorded or pool, and its settings",
}

EXPERT_KINDS: dict[str, str] = {
    "openai": "OpenAICompatible",
    "calculator": "Calculator",
    "local": "LocalModel",
    "recorded": "Recorded",
    "pool": "Pool",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A checked run file."""

    model: str
    """Path of the policy."""
    train_dataset: str
    """Path of the training problems."""
    eval_dataset: str | None = None
    """Path of the held-apart problems."""
    reward_funcs: tuple[str | Mapping[str, Any], ...] = ("exact",)
    """Names of the reward functions, or mappings of a name and its settings."""
    expert: Mapping[str, Any] | None = None
    """Kind and settings of the expert; None: plain self-exploratory training."""
    args: EAPOConfig = field(default_factory=EAPOConfig)
    """Training settings."""

    def to_yaml(self) -> str:
        """The resolved run as a file that `eapo-fast train` takes."""
        run = {name: getattr(self, name) for name in RUN_KEYS}
        run["reward_funcs"] = list(self.reward_funcs)
        run["expert"] = dict(self.expert) if self.expert else None
        text: str = yaml.safe_dump(run | self.args.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `--key value` overrides and check every key and type.

    Raises `ConfigError`; paths inside the file are relative to the current directory.
    """
    settings = _merge(read_yaml(path), parse_overrides(overrides))
    names = [f.name for f in dataclasses.fields(EAPOConfig)]
    run = {key: settings.pop(key) for key in RUN_KEYS if key in settings}
    _check_run_keys(run, path)
    _check_types(settings)
    if settings.get("expert_budget") is not None:
        settings["expert_budget"] = _budgets(settings["expert_budget"])
    try:
        args = EAPOConfig.from_dict(settings)
    except TypeError as error:
        unknown = next((key for key in settings if key not in names), None)
        if unknown is None:
            raise
        hint = suggest(unknown, [*RUN_KEYS, *names]) or " `eapo-fast train --help` lists all keys."
        raise ConfigError(f"unknown key {unknown!r} in {path}.{hint}") from error
    if "reward_funcs" in run:
        run["reward_funcs"] = _rewards(run["reward_funcs"])
    return RunConfig(**run, args=args)


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`["--max-steps", "5", "--expert.model=x", "--bf16"]` -> keys and YAML scalars.

    A key without a value is `true`; `a.b` reaches into a mapping. Raises `ConfigError` for a word
    that is neither a key nor the value of one.
    """
    settings: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        _assign(settings, key.replace("-", "_").split("."), _scalar(key, text))
    return settings


def build_rewards(items: Iterable[str | Mapping[str, Any]]) -> list[Callable[..., Any]]:
    """The reward functions; raises `ConfigError` for one that cannot be found or made.

    Dotted names are imported, with the current directory on the path; a dotted name with settings
    is called with them and must return the reward function.
    """
    return [_reward({"name": item} if isinstance(item, str) else dict(item)) for item in items]


def build_expert(settings: Mapping[str, Any] | None) -> Any:
    """The expert of a `{kind, ...}` mapping; raises `ConfigError` for an unknown kind or key."""
    if settings is None:
        return None
    options = dict(settings)
    kind = options.pop("kind", None)
    if kind not in EXPERT_KINDS:
        allowed = ", ".join(EXPERT_KINDS)
        hint = suggest(str(kind), EXPERT_KINDS)
        raise ConfigError(f"expert.kind: got {kind!r}, allowed is one of {allowed}.{hint}")
    factory = getattr(import_module("eapo_fast.experts"), EXPERT_KINDS[kind])
    parameters = inspect.signature(factory).parameters
    for key in options:
        if key not in parameters:
            allowed = ", ".join(parameters)
            raise ConfigError(
                f"expert.{key}: a {kind} expert has no such setting; it has {allowed}."
                f"{suggest(key, parameters)}"
            )
    needed = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
    if needed:
        raise ConfigError(f"expert.{needed[0]} is missing: a {kind} expert needs it")
    if kind == "pool":
        options["experts"] = _members(options["experts"])
    return factory(**options)


def _members(value: Any) -> Any:
    """The experts of a pool, from a list or a mapping of `{kind, ...}` mappings."""
    named = value if isinstance(value, dict) else dict(enumerate(value or ()))
    for name, settings in named.items():
        if not isinstance(settings, dict):
            raise ConfigError(f"expert.experts.{name}: got {settings!r}, allowed is {{kind: ...}}")
    return {str(name): build_expert(settings) for name, settings in named.items()}


def build_trainer(run: RunConfig) -> Trainer:
    """Load everything and construct the trainer, which checks the rest before step 1."""
    rewards, expert = build_rewards(run.reward_funcs), build_expert(run.expert)
    from eapo_fast.trainer import Trainer

    return Trainer(
        run.model,
        rewards,
        run.args,
        run.train_dataset,
        run.eval_dataset,
        expert=expert,
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, read with YAML 1.2 scalars; raises `ConfigError` with the line of a mistake.

    `1e-4` is a number and `no` is a word, as everybody who writes a run file expects.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.load(text, Loader=_Loader)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"cannot read the run file {path}: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{path} must hold `key: value` lines, got {type(settings).__name__}")
    return settings


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_OLD_SCALARS = tuple(f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "timestamp"))
_NEW_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _OLD_SCALARS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NEW_SCALARS.items():
    _first = "tTfF" if _name == "bool" else "-+.0123456789"
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
    )


def _scalar(key: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: {text!r} is not a YAML value; quote it") from error


def _assign(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        settings = settings.setdefault(name, {})
    settings[last] = value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings on both sides are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if isinstance(old, dict) and both else value
    return merged


def _check_run_keys(run: Mapping[str, Any], path: str | Path) -> None:
    for key in ("model", "train_dataset"):
        if not run.get(key):
            raise ConfigError(f"{key} is missing in {path}: it takes a {RUN_KEYS[key]}")
    for key in ("model", "train_dataset", "eval_dataset"):
        if not isinstance(run.get(key), str | None):
            raise ConfigError(f"{key}: got {run[key]!r}, allowed is a path")
    if not isinstance(run.get("expert"), dict | None):
        raise ConfigError(
            f"expert: got {run['expert']!r}, allowed is a {RUN_KEYS['expert']}, "
            f"for example `expert: {{kind: calculator}}`"
        )


_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "None": (type(None),),
}


def _check_types(settings: Mapping[str, Any]) -> None:
    """Check scalars against the annotations of `EAPOConfig`; richer fields check themselves."""
    for config_field in dataclasses.fields(EAPOConfig):
        kinds = [kind.strip() for kind in str(config_field.type).split("|")]
        if config_field.name not in settings or not all(kind in _SCALARS for kind in kinds):
            continue
        value = settings[config_field.name]
        allowed = tuple(t for kind in kinds for t in _SCALARS[kind])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            words = " or ".join("null" if kind == "None" else kind for kind in kinds)
            raise ConfigError(f"{config_field.name}: got {value!r}, allowed is {words}")


def _rewards(value: Any) -> tuple[str | Mapping[str, Any], ...]:
    items = value if isinstance(value, list) else [value]
    named = (isinstance(i, str) or (isinstance(i, dict) and "name" in i) for i in items)
    if not items or not all(named):
        raise ConfigError(f"reward_funcs: got {value!r}, allowed is {RUN_KEYS['reward_funcs']}")
    return tuple(items)


def _budgets(value: Any) -> Any:
    budget = import_module("eapo_fast.experts").Budget
    known = [f.name for f in dataclasses.fields(budget)]
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, dict) or not set(item) <= set(known):
            raise ConfigError(f"expert_budget: got {item!r}, allowed keys are {', '.join(known)}")
    return [budget(**item) for item in items]


def _reward(settings: dict[str, Any]) -> Callable[..., Any]:
    name = str(settings.pop("name"))
    get = import_module("eapo_fast.rewards").get
    try:
        if "." not in name:
            return cast("Callable[..., Any]", get(name, **settings))
        function = _dotted(name)
        return cast("Callable[..., Any]", function(**settings)) if settings else function
    except TypeError as error:
        raise ConfigError(f"reward_funcs: {name} with {settings}: {error}") from error


def _dotted(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(f"reward_funcs: {name!r}: cannot import {module} ({error})") from error
    if not callable(function):
        raise ConfigError(f"reward_funcs: {name!r}: {module} has no function {attribute!r}")
    return cast("Callable[..., Any]", function)
