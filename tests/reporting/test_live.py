from __future__ import annotations

import io

import pytest
from rich.console import Console

from eapo_fast.errors import ConfigError
from eapo_fast.reporting.live import BLOCKS, LiveView, Pace, is_terminal, sparkline

METRICS = {
    "reward": 0.3125,
    "expert/consult_rate": 1.254,
    "expert/accepted_share": 0.08,
    "perf/tokens_per_s": 3214.7,
}
SOLO = {
    "eval_solo_accuracy": 0.215,
    "eval_solo_accuracy_low": 0.164,
    "eval_solo_accuracy_high": 0.277,
    "eval_solo_n": 200,
}


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch):
    for name in ("EAPO_FAST_LIVE", "CI"):
        monkeypatch.delenv(name, raising=False)


def plain(**options) -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    return LiveView(120, console=Console(file=out, width=40), enabled=False, **options), out


def test_plain_view_prints_one_unbroken_line_per_event():
    view, out = plain(title="demo [bold]")
    with view:
        view.evaluation(0, SOLO)
        view.step(7, METRICS)
        view.message("expert is down [url] <b>")
    title, evaluation, step, message = out.getvalue().splitlines()
    assert title == "demo [bold]"
    assert evaluation == "step   0/120  solo accuracy 21.5 % [16-28] of 200"
    assert step.startswith(
        "step   7/120  reward 0.312  solo accuracy 21.5 %  consult rate 1.25  "
        "accepted 8 %  tokens/s 3.2k  left "
    )
    assert message == "expert is down [url] <b>"
    assert "\x1b" not in out.getvalue()


def test_absent_metrics_leave_their_words_out():
    view, out = plain()
    with view:
        view.step(1, {"reward": None, "perf/tokens_per_s": 50})
    assert out.getvalue().startswith("step   1/120  tokens/s 50  left")


def test_quiet_view_prints_messages_only():
    view, out = plain(quiet=True, title="demo")
    with view:
        view.step(1, METRICS)
        view.evaluation(1, SOLO)
        view.message("warning")
    assert out.getvalue() == "warning\n"


def test_live_view_refreshes_in_place_and_prints_messages_above():
    out = io.StringIO()
    console = Console(file=out, width=90, height=24, force_terminal=True, color_system=None)
    with LiveView(120, title="demo", enabled=True, console=console) as view:
        for step in range(1, 4):
            view.step(step, METRICS)
        view.message("a [line] above")
    text = out.getvalue()
    assert "step   3/120" in text
    assert "a [line] above" in text
    assert "\x1b[1A" in text


@pytest.mark.parametrize("width", [40, 64, 80, 137])
def test_live_panel_fits_its_terminal(width):
    view = LiveView(120, title="demo", enabled=True)
    view.evaluation(0, SOLO)
    for step in range(1, 30):
        view.step(step, METRICS | {"reward": step / 100})
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(view._render())
    lines = out.getvalue().splitlines()
    assert {len(line) for line in lines} == {width}
    assert len(lines) <= 9
    if width >= 80:
        words = ("0.290", "21.5 % [16-28]", "1.25", "8 %", "3.2k", "29/120", "24 %")
        assert all(word in out.getvalue() for word in words)


@pytest.mark.parametrize(
    ("variables", "tty", "expected"),
    [
        pytest.param({"TERM": "xterm"}, True, True, id="terminal"),
        pytest.param({"TERM": "dumb"}, True, False, id="dumb"),
        pytest.param({"TERM": "xterm", "CI": "true"}, True, False, id="ci"),
        pytest.param({"TERM": "xterm"}, False, False, id="pipe"),
        pytest.param({"TERM": "dumb", "EAPO_FAST_LIVE": "live"}, False, True, id="forced"),
        pytest.param({"TERM": "xterm", "EAPO_FAST_LIVE": "plain"}, True, False, id="forbidden"),
    ],
)
def test_terminal_is_recognised(monkeypatch, variables, tty, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty, raising=False)
    assert is_terminal() is expected


def test_a_wrong_display_mode_names_the_variable(monkeypatch):
    monkeypatch.setenv("EAPO_FAST_LIVE", "loud")
    with pytest.raises(ConfigError, match=r"EAPO_FAST_LIVE='loud'.*auto, live, plain or off"):
        LiveView(3)


def test_pace_counts_from_the_first_step_it_sees(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace(60)
    assert pace.left(50) is None
    for step in range(51, 56):
        now += 2.0
        pace.tick(step)
    assert pace.left(55) == pytest.approx(10.0)
    assert pace.elapsed() == pytest.approx(10.0)


def test_sparkline_shows_the_course():
    assert sparkline(tuple(range(8)), 8) == BLOCKS
    assert sparkline((0.0, 0.0, 1.0, 1.0), 2) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline((3.0, 3.0), 12) == BLOCKS[0] * 2
    assert sparkline((3.0,), 12) == ""
