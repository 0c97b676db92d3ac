"""The template process: `python -m eapo_fast.rewards.symbolic.template`, control socket as stdin.

It imports sympy, runs a few comparisons so that what sympy loads late is loaded, and then forks a
worker for each order. It has one thread, never reads an answer itself, and ends with its workers
when the control socket closes, that is when its owner closes it, exits or dies.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket

gc.disable()  # what is loaded here stays; looking for garbage in it is a tenth of the start
from eapo_fast.rewards.symbolic import work  # noqa: E402


def main() -> None:
    """Serve orders `fork 0` (with the worker's socket attached) and `kill PID`."""
    control = socket.socket(fileno=0)
    work.warm_up()
    gc.enable()
    wake_reader, wake_writer = os.pipe()
    for end in (wake_reader, wake_writer):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_writer)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    children: set[int] = set()
    channels: list[int] = []
    pending = b""
    while True:
        readable, _, _ = select.select([control.fileno(), wake_reader], [], [])
        if wake_reader in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_reader, 4096)
            _reap(children)
        if control.fileno() in readable:
            data, attached, _, _ = socket.recv_fds(control, 4096, 64)
            if not data:
                break
            channels += attached
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                order, _, number = line.partition(b" ")
                if order == b"fork":
                    children.add(_fork(channels.pop(0), control))
                elif int(number) in children:
                    os.kill(int(number), signal.SIGKILL)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


def _fork(channel: int, control: socket.socket) -> int:
    pid = os.fork()
    if pid:
        os.close(channel)
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        work.serve_once(channel)
    finally:
        os._exit(0)


def _reap(children: set[int]) -> None:
    """Collect the children that ended; one that is not collected keeps its number reserved."""
    while children:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if not pid:
            break
        children.discard(pid)


if __name__ == "__main__":
    main()
