"""Decode steps on static buffers: the same logits, and captured forwards that never go stale."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eapo_fast import SamplingParams
from eapo_fast.engine import Sampler, SamplerConfig, casts
from eapo_fast.engine.cache import PagedCache
from eapo_fast.engine.forward import PagedForward
from eapo_fast.engine.graphs import DecodeGraphs, bucket_rows
from eapo_fast.engine.head import head_into
from eapo_fast.engine.support import paged_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 40, 41, 42, 43], [40, 41, 42]]


def decode_plan(rows: int, blocks: int = 1, spans: Any = ()) -> Any:
    """A plan of `rows` decode rows in their last block, of block size 4.

    They share `spans` of (first segment, segments, tokens), the last block excepted.
    """
    table = np.array(spans, dtype=np.int32).reshape(-1, 3)
    blocks_of = np.tile(np.arange(rows, dtype=np.int32)[:, None], (1, blocks))
    for first, segments, tokens in spans:
        assert tokens < 4 * blocks
        blocks_of[first : first + segments, : tokens // 4] = first
    return SimpleNamespace(
        input_ids=np.arange(5, 5 + rows),
        positions=np.full(rows, 4 * blocks - 1),
        slots=4 * np.arange(rows) + 3,
        kv_lens=np.full(rows, 4 * blocks, dtype=np.int32),
        block_tables=blocks_of,
        logits_rows=np.arange(rows),
        shared_spans=table[:, :2],
        shared_lens=table[:, 2],
    )


def test_row_buckets() -> None:
    sizes = [1, 2, 3, 4, 5, 8, 9, 16, 17, 63, 64, 65, 80, 250, 256, 257, 512, 513]
    buckets = [1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 64, 80, 80, 256, 256, 512, 512, 1024]
    assert [bucket_rows(rows) for rows in sizes] == buckets


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma2", "gpt2", "phimoe", "qwen3_moe"])
def test_static_steps_have_the_logits_of_ordinary_ones(
    kind: str, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, spread=0.1)
    params = SamplingParams(max_tokens=24, n=3, seed=2)
    sampler = Sampler(model, config=SamplerConfig(block_size=4, max_prefill_tokens=6))
    ordinary = PagedForward.__call__
    seen: list[tuple[int, int]] = []
    graphs: list[DecodeGraphs] = []

    def both(forward: PagedForward, plan: Any) -> torch.Tensor:
        expected = ordinary(forward, plan)
        if not graphs:
            windows = paged_model(model, 4).windows
            graphs.append(DecodeGraphs(model, forward._cache, windows=windows, capture=False))
        graphs[0].refresh()
        logits = graphs[0].forward(plan)
        assert (logits is None) == (plan.max_q_len > 1)
        if logits is not None:
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
            seen.append((len(plan.input_ids), len(plan.shared_lens)))
        return expected

    monkeypatch.setattr(PagedForward, "__call__", both)
    sampler.generate(PROMPTS, params)
    assert len(seen) > 15
    assert max(seen) == (9, 1)


def test_only_the_wanted_rows_come_back(make_model: Callable[..., Any]) -> None:
    graphs = DecodeGraphs(make_model(), PagedCache(8, 4), windows={}, capture=False)
    plan = decode_plan(3)
    everything = graphs.forward(plan)
    assert everything is not None
    everything = everything.clone()
    plan.logits_rows = np.array([0, 2])
    some = graphs.forward(plan)
    assert some is not None
    assert torch.equal(some, everything[[0, 2]])


def test_shared_prefixes_reach_attention(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eapo_fast.engine import attention

    given: list[Any] = []
    ordinary = attention.paged_attention

    def note(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append((kwargs["shared"], kwargs["longest"]))
        return ordinary(*args, **kwargs)

    monkeypatch.setattr(attention, "paged_attention", note)
    graphs = DecodeGraphs(make_model(), PagedCache(8, 4), windows={}, capture=False)
    graphs.forward(decode_plan(7, blocks=3, spans=[(0, 2, 4), (2, 3, 8), (5, 2, 4)]))
    graphs.forward(decode_plan(7, blocks=2))
    (spans, lens), longest = given[0]
    assert spans.tolist() == [[0, 2], [2, 3], [5, 2]]
    assert lens.tolist() == [4, 8, 4]
    assert longest == (1, 32)
    assert given[-1] == (None, (1, 32))


class Recorder:
    """Stands in for CUDA: a replay runs the captured forward again."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> Any:
        from eapo_fast.engine.graphs import _Captured

        self.records += 1
        logits = run()

        def replay() -> None:
            self.replays += 1
            logits.copy_(run())

        return _Captured(replay, logits)


@pytest.fixture
def recorded(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model, its graphs, and what they record."""
    model = make_model(spread=0.15)
    graphs = DecodeGraphs(model, PagedCache(64, 4), windows={}, capture=True)
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_record", recorder)
    graphs.refresh()
    return model, graphs, recorder


def test_one_capture_for_each_size(recorded: Any) -> None:
    _, graphs, recorder = recorded
    for rows in (3, 4, 3):
        graphs.forward(decode_plan(rows))
    assert (recorder.records, recorder.replays) == (1, 3)
    graphs.forward(decode_plan(5))
    graphs.forward(decode_plan(4, blocks=9))
    graphs.forward(decode_plan(4, blocks=16))
    assert recorder.records == 3
    graphs.forward(decode_plan(4, blocks=2, spans=[(0, 2, 4)]))
    assert recorder.records == 4
    assert graphs.capture


def test_groups_that_end_ask_for_few_captures(recorded: Any) -> None:
    """32 rows in groups of 4, which end one after the other while others take their rows' place."""
    _, graphs, recorder = recorded
    for spans in (8, 7, 6, 5, 4, 3, 2, 1):
        graphs.forward(decode_plan(32, blocks=2, spans=[(4 * i, 4, 4) for i in range(spans)]))
    assert recorder.records == 1
    (buffers,) = graphs._buffers.values()
    assert buffers.shared_spans.tolist() == [[0, 4]] + 7 * [[0, 0]]
    graphs.forward(decode_plan(32, blocks=2))
    graphs.forward(decode_plan(32, blocks=2, spans=[(2 * i, 2, 4) for i in range(16)]))
    assert recorder.records == 3


def test_captured_spans_are_padded_with_empty_ones(recorded: Any) -> None:
    _, graphs, _ = recorded
    graphs.forward(decode_plan(8, blocks=2, spans=[(0, 2, 4), (2, 2, 4), (4, 2, 4), (6, 2, 4)]))
    graphs.forward(decode_plan(8, blocks=2, spans=[(0, 2, 4), (2, 2, 4), (4, 2, 4)]))
    (buffers,) = graphs._buffers.values()
    assert buffers.shared_spans.tolist() == [[0, 2], [2, 2], [4, 2], [0, 0]]
    assert buffers.shared_lens.tolist() == [4, 4, 4, 0]


def test_weights_may_change_in_place(recorded: Any) -> None:
    model, graphs, recorder = recorded
    before = graphs.forward(decode_plan(4)).clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    graphs.refresh()
    assert not torch.equal(graphs.forward(decode_plan(4)), before)
    assert recorder.records == 1


def move(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.clone()


def exchange(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def rescale(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2.0


def hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def reconfigure(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize("change", [move, exchange, rescale, hook, reconfigure])
def test_what_is_baked_in_is_captured_anew(change: Callable[[Any], None], recorded: Any) -> None:
    model, graphs, recorder = recorded
    graphs.forward(decode_plan(4))
    graphs.refresh()
    graphs.forward(decode_plan(4))
    assert recorder.records == 1
    change(model)
    graphs.refresh()
    graphs.forward(decode_plan(4))
    assert recorder.records == 2


def test_switched_adapters_are_captured_anew(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(spread=0.15), config)
    model.add_adapter("other", config)
    graphs = DecodeGraphs(model, PagedCache(64, 4), windows={}, capture=True)
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_record", recorder)

    def sample() -> torch.Tensor:
        graphs.refresh()
        logits = graphs.forward(decode_plan(4))
        assert logits is not None
        return logits.clone()

    first = sample()
    model.set_adapter("other")
    assert not torch.equal(sample(), first)
    model.set_adapter("default")
    with model.disable_adapter():
        assert not torch.equal(sample(), first)
    assert torch.equal(sample(), first)
    assert recorder.records == 4


def test_a_model_that_cannot_be_captured_runs_eagerly(recorded: Any) -> None:
    _, graphs, recorder = recorded
    expected = graphs.forward(decode_plan(4)).clone()

    def fail(_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs._record = fail
    with pytest.warns(RuntimeWarning, match="Qwen2.*cannot be captured.*not permitted when s") as w:
        graphs.forward(decode_plan(8))
    assert len(w) == 1
    assert torch.equal(graphs.forward(decode_plan(4)), expected)
    assert recorder.records == 1


def test_one_capture_at_a_time(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samplers in two threads; torch has one capture a process."""
    inside, most = [0], [0]

    def record(run: Callable[[], torch.Tensor]) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        inside[0] -= 1
        return Recorder()(run)

    def forward(_: int) -> None:
        graphs = DecodeGraphs(make_model(), PagedCache(8, 4), windows={}, capture=True)
        monkeypatch.setattr(graphs, "_record", record)
        graphs.refresh()
        graphs.forward(decode_plan(4))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(forward, range(3)))
    assert most == [1]


class FakePools:
    """torch's rule for memory pools of graphs: none may be used again once its graphs are gone."""

    def __init__(self) -> None:
        self.graphs: dict[int, int] = {}
        self.streams: list[Any] = []

    def handle(self) -> int:
        return len(self.graphs)

    def graph(self, graph: Any, *, pool: int, stream: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        assert stream is self.streams[0]
        assert len(self.streams) == 1
        if self.graphs.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.graphs[pool] = self.graphs.get(pool, 0) + 1
        weakref.finalize(graph, self._drop, pool)
        return nullcontext()

    def _drop(self, pool: int) -> None:
        self.graphs[pool] -= 1


class FakeGraph:
    def replay(self) -> None:
        pass


def test_new_captures_take_a_new_pool(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = FakePools()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda device: pools.streams.append(stream) or stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "graph_pool_handle": pools.handle,
        "CUDAGraph": FakeGraph,
        "graph": pools.graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    model = make_model(spread=0.15)
    graphs = DecodeGraphs(model, PagedCache(64, 4), windows={}, capture=True)
    for _ in range(3):
        graphs.refresh()
        for rows in (4, 8):
            graphs.forward(decode_plan(rows))
        rescale(model)
    assert graphs.capture
    assert pools.graphs == {0: 0, 1: 0, 2: 2}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "copies"), [("qwen2", 0), ("phi", 0), ("gemma2", 1)])
def test_logits_are_written_where_they_stay(
    kind: str,
    copies: int,
    autocast: bool,
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head (Phi's has a bias) writes them; capped ones are copied, and are the same."""
    model = make_model(kind, spread=0.15)
    monkeypatch.setattr(casts, "_wanted", lambda _: torch.bfloat16 if autocast else None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), casts.cast_weights(model):
        _written_where_they_stay(model, copies, monkeypatch)
    assert "forward" not in vars(model.get_output_embeddings())


def _written_where_they_stay(model: Any, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = DecodeGraphs(model, PagedCache(8, 4), windows={}, capture=False)
    expected = graphs.forward(decode_plan(4))
    assert expected is not None
    out = torch.full_like(expected, torch.nan)
    copied: list[torch.Tensor] = []
    copy = torch.Tensor.copy_

    def note(into: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(into)
        return copy(into, *args, **kwargs)

    (buffers,) = graphs._buffers.values()
    (size,) = graphs._buffers
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", note)
        graphs._run_into(out, lambda: graphs._run(size, buffers, 0))
    assert sum(into is out for into in copied) == copies
    assert torch.equal(out, expected)


def test_the_head_writes_for_its_own_thread_and_rows_only(make_model: Callable[..., Any]) -> None:
    model = make_model()
    head, x = model.lm_head, torch.randn(1, 3, 32)
    out = torch.zeros(3, head.out_features)
    with torch.no_grad(), head_into(model, out):
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(torch.no_grad()(head), x).result()
        assert not out.any()
        head(x[:, :2])
        assert not out.any()
        with torch.enable_grad():
            assert head(x).requires_grad
        with torch.autocast("cpu"):
            assert head(x).dtype == torch.bfloat16
        assert not out.any()
        assert head(x).data_ptr() == out.data_ptr()
    assert torch.equal(out, elsewhere[0])
    model.lm_head = torch.nn.Sequential(head)
    with torch.no_grad(), head_into(model, torch.zeros_like(out)):
        assert model.lm_head(x).data_ptr() != out.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "qwen3_moe"])
def test_captured_steps_on_a_gpu(kind: str, make_model: Callable[..., Any]) -> None:
    model = make_model(kind, spread=0.15).cuda()
    windows = paged_model(model, 16).windows
    cache = PagedCache(64, 16)
    captured = DecodeGraphs(model, cache, windows=windows, capture=True)
    eager = DecodeGraphs(model, cache, windows=windows, capture=False)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        captured.refresh()
        for rows in (3, 4, 9, 3):
            got, want = captured.forward(decode_plan(rows)), eager.forward(decode_plan(rows))
            assert got is not None
            assert want is not None
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert captured.capture
