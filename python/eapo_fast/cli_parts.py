"""What the modules of the command line share."""

from __future__ import annotations

import argparse
from typing import Any

from eapo_fast.errors import ConfigError


def command(commands: Any, name: str, text: str, **options: Any) -> argparse.ArgumentParser:
    """Add a command whose help is `text`."""
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False, **options
    )
    return added


def at_least(least: int) -> Any:
    """Return an argument type: whole numbers from `least`."""

    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"got {value}, allowed is {least} or more")
        return value

    whole.__name__ = "whole number"
    return whole


def openai_expert(arguments: argparse.Namespace, **more: Any) -> Any:
    """Return the expert behind --expert-url, --expert-model and --expert-key-env.

    `more` are further settings of `experts.OpenAICompatible`; None is left out.
    """
    if not arguments.expert_url or not arguments.expert_model:
        raise ConfigError("an openai expert needs --expert-url URL and --expert-model NAME")
    return named_expert(
        "openai",
        base_url=arguments.expert_url,
        model=arguments.expert_model,
        api_key_env=arguments.expert_key_env,
        **more,
    )


def local_expert(arguments: argparse.Namespace, **more: Any) -> Any:
    """Return the transformers model of --expert-model as an expert."""
    if not arguments.expert_model:
        raise ConfigError("a local expert needs its directory: --expert-model DIR")
    return named_expert("local", model=arguments.expert_model, **more)


def named_expert(kind: str, **settings: Any) -> Any:
    """Return an expert of a kind that run files know; settings of None are left out."""
    from eapo_fast.run_config import build_expert

    given = {name: value for name, value in settings.items() if value is not None}
    return build_expert({"kind": kind} | given)
