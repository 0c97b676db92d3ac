"""What the user watches: one panel that refreshes in place, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from eapo_fast import env
from eapo_fast.reporting.stats import clock, compact, percent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
HISTORY = 400


def is_terminal() -> bool:
    """True where a display can be refreshed in place (`EAPO_FAST_LIVE` overrides)."""
    mode = env.LIVE.get()
    if mode != "auto":
        return mode == "live"
    return sys.stdout.isatty() and env.TERM.get() not in {"dumb", "unknown"} and not env.CI.get()


class LiveView:
    """Progress of a training run.

    `enabled=None` chooses by `is_terminal()`; `True` refreshes in place, `False` prints one line
    per step. `quiet=True`, or `EAPO_FAST_LIVE=off`, shows nothing but messages. Metrics are taken
    by their names in `metrics.jsonl`; absent ones show as `-`.
    """

    def __init__(
        self,
        total_steps: int,
        title: str = "",
        enabled: bool | None = None,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        from rich.console import Console

        self.total_steps = total_steps
        self.title = title
        self.in_place = is_terminal() if enabled is None else enabled
        self.quiet = quiet or (enabled is None and env.LIVE.get() == "off")
        self.console = console or Console(highlight=False, soft_wrap=not self.in_place)
        self.pace = Pace(total_steps)
        self.current = 0
        self.metrics: dict[str, Any] = {}
        self.history: dict[str, deque[float]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        from rich.live import Live

        if self.in_place and not self.quiet:
            self._live = Live(
                console=self.console, get_renderable=self._render, refresh_per_second=4
            )
            self._live.start()
        elif self.title and not self.quiet:
            self.message(self.title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished training step."""
        self.current = step
        self.pace.tick(step)
        self._take(metrics)
        if self._live is None and not self.quiet:
            self._line(self._step_line())

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show an evaluation; its solo accuracy stays in view until the next one."""
        self._take(metrics)
        if self._live is None and not self.quiet and "eval_solo_accuracy" in metrics:
            count = metrics.get("eval_solo_n")
            over = f" of {count:.0f}" if count else ""
            self._line(f"{self._counter(step)}  solo accuracy {self._solo()}{over}")

    def message(self, text: str) -> None:
        """Print a line above the display; warnings come here even when the view is quiet."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _take(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self.metrics[name] = value
            if name in _TRACKED and isinstance(value, int | float):
                self.history.setdefault(name, deque(maxlen=HISTORY)).append(float(value))

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()

    def _counter(self, step: int) -> str:
        width = len(str(self.total_steps))
        return f"step {step:>{width}}/{self.total_steps}"

    def _step_line(self) -> str:
        cells = self._cells() | {"solo accuracy": percent(self.metrics.get("eval_solo_accuracy"))}
        parts = [self._counter(self.current)]
        parts += [f"{name} {value}" for name, value in cells.items() if value != "-"]
        return "  ".join([*parts, f"left {clock(self.pace.left(self.current))}"])

    def _cells(self) -> dict[str, str]:
        get = self.metrics.get
        return {
            "reward": _number(get("reward")),
            "solo accuracy": self._solo(),
            "consult rate": _number(get("expert/consult_rate"), 2),
            "accepted": percent(get("expert/accepted_share"), 0),
            "tokens/s": compact(get("perf/tokens_per_s")),
        }

    def _solo(self) -> str:
        get = self.metrics.get
        low, high = get("eval_solo_accuracy_low"), get("eval_solo_accuracy_high")
        text = percent(get("eval_solo_accuracy"))
        return text if low is None or high is None else f"{text} [{100 * low:.0f}-{100 * high:.0f}]"

    def _render(self) -> RenderableType:
        from rich.box import ROUNDED
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        body = Group(self._progress(), "", self._table())
        title = Text(self.title, style="bold") if self.title else None
        return Panel(
            body, title=title, title_align="left", box=ROUNDED, border_style="dim", padding=(0, 1)
        )

    def _progress(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        done = f"{100 * self.current / max(1, self.total_steps):3.0f} %"
        left = clock(self.pace.left(self.current))
        grid.add_row(
            self._counter(self.current),
            ProgressBar(
                total=max(1, self.total_steps),
                completed=self.current,
                complete_style="cyan",
                finished_style="green",
            ),
            f"{done}  [cyan]{left}[/] left  [dim]{clock(self.pace.elapsed())} gone[/]",
        )
        return grid

    def _table(self) -> Table:
        from rich.table import Table

        cells = self._cells()
        grid = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="dim")
        for name in cells:
            grid.add_column(name, ratio=4 if name == "solo accuracy" else 3, no_wrap=True)
        grid.add_row(*(f"[bold]{value}[/]" for value in cells.values()))
        if (self.console.encoding or "").lower().startswith("utf"):
            lines = (sparkline(self.history.get(metric, ()), 12) for metric in _TRACKED)
            grid.add_row(*(f"[cyan]{line}[/]" for line in lines))
        return grid


_TRACKED = (
    "reward",
    "eval_solo_accuracy",
    "expert/consult_rate",
    "expert/accepted_share",
    "perf/tokens_per_s",
)


class Pace:
    """Time left, from the pace of the last steps (early steps, full of consults, are slower)."""

    def __init__(self, total_steps: int, window: int = 24) -> None:
        self.total_steps = total_steps
        self.started = time.monotonic()
        self._ticks: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def tick(self, step: int) -> None:
        """Note that `step` is finished now."""
        if not self._ticks:
            self._ticks.append((step - 1, self.started))
        self._ticks.append((step, time.monotonic()))

    def elapsed(self) -> float:
        """Seconds since the view was made."""
        return time.monotonic() - self.started

    def left(self, step: int) -> float | None:
        """Seconds until the last step, `None` before the first one is finished."""
        if len(self._ticks) < 2:
            return None
        (first, began), (last, ended) = self._ticks[0], self._ticks[-1]
        if last <= first:
            return None
        since = time.monotonic() - ended
        pace = (ended - began) / (last - first)
        return max(0.0, pace * (self.total_steps - step) - min(since, pace))


def sparkline(values: deque[float] | tuple[float, ...], width: int) -> str:
    """The course of `values` in `width` block characters (means of equal slices)."""
    if len(values) < 2:
        return ""
    data = list(values)
    count = min(width, len(data))
    cuts = [round(i * len(data) / count) for i in range(count + 1)]
    means = [sum(data[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    if span <= 0:
        return BLOCKS[0] * count
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"
