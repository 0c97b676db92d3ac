from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from eapo_fast.errors import DataError
from eapo_fast.reporting.charts import ticks
from eapo_fast.reporting.curves import plot_curves
from eapo_fast.reporting.report import embed_json, thin, write_report

PNG = b"\x89PNG\r\n\x1a\n"


class Outline(HTMLParser):
    """Tags, attributes and the text of script elements, as a browser would split the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


def test_page_shows_headline_curves_and_every_rollout(make_run):
    run = make_run()
    page = write_report(run).read_text(encoding="utf-8")
    for text in ("4.0 %", "34.0 %", "+30.0 points", "1,240 saved by gating", "rollout <b>1:58"):
        assert text in page
    found = outline(page)
    assert found.tags.count("svg") == 4
    data = json.loads(found.scripts[0])
    assert len(data) == 4 * 13
    assert {segment["kind"] for r in data for segment in r["segments"]} >= {"policy", "expert"}


def test_what_models_write_can_neither_run_nor_leave_its_element(make_run):
    page = write_report(make_run()).read_text(encoding="utf-8")
    found = outline(page)
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "<script>alert" not in page
    assert "tiny &lt;qwen2&gt;" in page
    hostile = [r for r in json.loads(found.scripts[0]) if r["group"] == 99]
    assert hostile[0]["prompt"].startswith("</script><script>alert")
    assert hostile[0]["answer"].startswith("caf\u00e9")
    assert "innerHTML" not in page


def test_page_asks_for_nothing_outside(make_run):
    page = write_report(make_run()).read_text(encoding="utf-8")
    found = outline(page)
    assert not [value for name, value in found.attributes if name in {"src", "href"}]
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"https?://[^\"' ]+", page)) - {"http://www.w3.org/2000/svg"}
    assert not addresses
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_of_a_stopped_run_sums_the_metrics_up(make_run):
    run = make_run(summary=False)
    page = write_report(run).read_text(encoding="utf-8")
    assert "4.0 % <i>&rarr;</i> 34.0 %" in page
    assert "saved by gating" in page


def test_training_comes_before_evaluation_and_odd_numbers_are_null(make_run):
    run = make_run()
    row = {"step": 0, "split": "eval", "prompt": "p", "reward": float("nan"), "segments": []}
    (run / "rollouts" / "eval_000000.jsonl").write_text(json.dumps(row) + "\n")
    page = write_report(run).read_text(encoding="utf-8")
    data = json.loads(outline(page).scripts[0], parse_constant=pytest.fail)
    assert [r["split"] for r in data] == ["train"] * 52 + ["eval"]
    assert data[-1]["reward"] is None


def test_page_without_expert_has_no_consult_charts(make_run):
    page = write_report(make_run(expert=False, summary=False)).read_text(encoding="utf-8")
    assert outline(page).tags.count("svg") == 2
    assert "Consults bought" not in page


def test_rollouts_of_an_earlier_longer_run_are_left_out(make_run):
    run = make_run()
    make_run(steps=20)
    data = json.loads(outline(write_report(run).read_text(encoding="utf-8")).scripts[0])
    assert {r["step"] for r in data} == {10, 20}


def test_page_with_torn_and_missing_parts(make_run, tmp_path):
    run = make_run(summary=False)
    (run / "metrics.jsonl").unlink()
    path = run / "rollouts" / "step_000010.jsonl"
    path.write_text(path.read_text() + '{"step": 10, "gro')
    assert write_report(run).stat().st_size > 10_000
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path / "nothing")


def test_large_runs_are_thinned_by_whole_steps():
    rows = [{"step": s, "split": "train", "i": i} for s in range(100) for i in range(50)]
    kept = thin(rows, 500)
    steps = sorted({row["step"] for row in kept})
    assert len(kept) == 500
    assert (steps[0], steps[-1]) == (0, 99)
    assert thin(rows, 5000) == rows


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028", "a & b"])
def test_embedded_json_is_inert_and_the_same(text):
    assert not set("<>&\u2028") & set(embed_json({"t": text}))
    assert json.loads(embed_json({"t": text})) == {"t": text}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(0, 1.03, [0, 0.25, 0.5, 0.75, 1.0], id="shares"),
        pytest.param(-0.3, 0.3, [-0.2, 0, 0.2], id="negative"),
        pytest.param(0, 0.0123, [0, 0.0025, 0.005, 0.0075, 0.01], id="small"),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options", [{}, {"expert": False}, {"steps": 1}], ids=["full", "no-expert", "one-step"]
)
def test_curves_are_a_picture(make_run, options):
    run = make_run(**options)
    path = plot_curves(run / "metrics.jsonl", run / "pictures" / "curves.png", title="demo")
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 20_000


def test_curves_of_a_run_before_its_first_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    png = plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert png.read_bytes().startswith(PNG)
