"""The child of `rewards.in_process`: `python -m eapo_fast.rewards.process_child module:function`.

It answers JSON lines on a socket that it gets as standard input, until the socket closes. What the
function prints is shown as its own.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any


def serve(target: str) -> None:
    """Import `module:function` and answer calls."""
    channel = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    channel.sendall(b"ready\n")
    with channel.makefile("rwb") as lines:
        for line in lines:
            lines.write(json.dumps(answer(function, json.loads(line))).encode() + b"\n")
            lines.flush()


def answer(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the values of one call, or the error that it raised."""
    try:
        values = function(**keywords)
        if inspect.iscoroutine(values):
            values = asyncio.run(values)
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        return {"values": [None if value is None else float(value) for value in values]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    serve(sys.argv[1])
