"""Every stage of the GPU check, small and on reference devices: it tests the stages themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def run_stage(make_request: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Run a stage in this process; returns its records, none of which may be a failed check."""
    from gpu_check.records import Recorder, read_records

    def run(module: str, **options: str) -> list[dict[str, Any]]:
        request = make_request(module, options=options)
        import_module(f"gpu_check.{module}").run(request, Recorder(request))
        records = read_records(Path(request.results))
        assert not [r for r in records if r["kind"] == "check" and not r["passed"]]
        return records

    return run


def names(records: list[dict[str, Any]], kind: str) -> list[str]:
    return [r["name"] for r in records if r["kind"] == kind]


@pytest.mark.slow
def test_triton_kernels_interpreted(
    make_request: Callable[..., Any], environment: dict[str, str]
) -> None:
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    pytest.importorskip("triton")
    from gpu_check.records import read_records

    request = make_request("triton", options={"backend": "triton"})
    command = [sys.executable, "-m", "gpu_check.child", "gpu_check.correctness", request.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    records = read_records(Path(request.results))
    checks = [r for r in records if r["kind"] == "check"]
    assert all(r["passed"] for r in checks), checks
    ops = {r["name"].split()[0] for r in checks}
    assert {"paged_attention", "kv_write", "copy_blocks", "sample", "group_advantages"} <= ops
    dtypes = {r["name"].split()[2] for r in checks}
    assert dtypes == {"float32", "bfloat16"}
    assert all(r["cases"] >= 3 for r in checks)


def test_a_backend_that_is_not_here_is_skipped(run_stage: Callable[..., Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there may be CUDA kernels here")
    records = run_stage("correctness", backend="cuda")
    assert not names(records, "check")
    reasons = [r["reason"] for r in records if r["kind"] == "skip"]
    assert any("'cuda'" in reason for reason in reasons)


def test_a_part_of_the_ops(run_stage: Callable[..., Any]) -> None:
    from gpu_check import loss_cases, sampler_cases, sanitizer

    assert set(sanitizer.OPS) <= {*sampler_cases.CASES, *loss_cases.CASES}
    records = run_stage("correctness", backend="reference", ops="kv_write copy_blocks")
    assert {r["name"].split()[0] for r in records} == {"kv_write", "copy_blocks"}


def test_correctness_sees_what_is_wrong(
    make_request: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that are off, unwritten, or written where they should not be."""
    from gpu_check import correctness, sampler_cases
    from gpu_check.records import Recorder, read_records

    from eapo_fast.kernels import kv_write as module
    from eapo_fast.kernels import sample as sampling

    honest_write, honest_draw = module.kv_write, sampling.sample

    def write_too_much(*args: Any, backend: str) -> None:
        honest_write(*args, backend="reference")
        args[2].flatten()[-1] += 1

    def draw_badly(*args: Any, backend: str, **kwargs: Any) -> Any:
        tokens, logprobs, kept = honest_draw(*args, backend="reference", **kwargs)
        if backend != "reference":
            logprobs = torch.empty_like(logprobs)  # never written
        return sampling.Draws(tokens, logprobs, kept)

    monkeypatch.setattr(module, "kv_write", write_too_much)
    monkeypatch.setattr(sampling, "sample", draw_badly)
    request = make_request("cuda")
    with correctness.poisoned():
        for name in ("kv_write", "sample"):
            case = sampler_cases.CASES[name]
            correctness._check_op(name, case, "fake", request, Recorder(request))
    checks = [r for r in read_records(Path(request.results)) if r["kind"] == "check"]
    assert {r["name"].split()[0] for r in checks} == {"kv_write", "sample"}
    assert not any(r["passed"] for r in checks)


def test_what_the_kernels_checks_print(make_request: Callable[..., Any]) -> None:
    from gpu_check import suites
    from gpu_check.records import Recorder, read_records

    folder = "tests/kernels/gpu/check_"
    text = "\n".join([
        f"[gw0] [ 10%] PASSED {folder}sample.py::test_a[1] ",
        f"[gw1] [ 20%] PASSED {folder}kv_write.py::test_b ",
        f"[gw0] [ 30%] FAILED {folder}sample.py::test_c ",
        f"[gw0] [ 40%] SKIPPED {folder}kv_write.py::test_d ",
        "=== short test summary info ===",
        f"FAILED {folder}sample.py::test_c - AssertionError: 2 times its bound",
    ])  # fmt: skip
    names_ = ["kv_write", "sample", "truncation"]

    def found(code: int | None, printed: str = text) -> dict[str, dict[str, Any]]:
        request = make_request(f"tests-{code}-{len(printed)}")
        suites.report(printed, code, "triton", names_, Recorder(request))
        return {r["name"]: r for r in read_records(Path(request.results))}

    whole, cut = found(1), found(None)
    assert whole["check_kv_write triton"]["passed"]
    assert whole["check_kv_write triton"]["tests"]["skipped"] == 1
    assert not whole["check_sample triton"]["passed"]
    assert "2 times its bound" in whole["check_sample triton"]["failures"][0]
    assert not whole["check_truncation triton"]["passed"]  # none of its tests ran
    assert (cut["check_kv_write triton"]["kind"], cut["check_sample triton"]["kind"]) == (
        "skip", "check",
    )  # fmt: skip
    broken = found(4, "ImportError: no such module")
    assert "ImportError" in broken["checks on triton ran"]["output"]


def test_new_memory_is_poisoned() -> None:
    from gpu_check.correctness import poisoned

    plain = torch.empty
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.ones(2).new_empty(3, dtype=torch.int64).tolist() == [-99] * 3
    assert torch.empty is plain


def test_sampler(run_stage: Callable[..., Any]) -> None:
    records = run_stage("sampler")
    for name in ("demo policy", "gemma2"):
        assert f"{name}: greedy tokens are those of generate" in names(records, "check")
        assert f"{name}: captured decode steps after an update in place" in names(records, "check")
        assert f"{name}: log-probabilities, bfloat16" in names(records, "check")


def test_greedy_tokens_that_are_not_those_of_generate(
    make_request: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import sampler
    from gpu_check.records import Recorder, read_records

    request = make_request("sampler")
    model = sampler.random_model("gemma2")
    honest = sampler._generate
    monkeypatch.setattr(sampler, "_generate", lambda *args: [(t + 1) % 900 for t in honest(*args)])
    sampler._greedy("gemma2", model, request, Recorder(request))
    (record,) = read_records(Path(request.results))
    assert not record["passed"]
    assert len(record["wrong"]) == 5


@pytest.mark.slow
def test_training(run_stage: Callable[..., Any], environment: dict[str, str]) -> None:
    records = run_stage("training")
    assert "training, float32: first step, gradient norm" in names(records, "check")
    (figure,) = [r for r in records if r["kind"] == "figure"]
    assert len(figure["rewards"]) == 2


def test_curves_that_differ_are_seen(make_request: Callable[..., Any]) -> None:
    from gpu_check.records import Recorder, read_records
    from gpu_check.training import compare

    row = {
        "reward": 0.2,
        "completions/mean_length": 70.0,
        "expert/consult_rate": 1.7,
        "grad_norm": 0.08,
        "entropy": 0.2,
    }

    def verdicts(name: str, kind: str = "float32", **changes: float) -> dict[str, bool]:
        request = make_request(name)
        compare([{**row, **changes}] * 4, [row] * 4, kind, Recorder(request))
        return {r["name"]: r["passed"] for r in read_records(Path(request.results))}

    assert all(verdicts("same").values())
    assert not all(verdicts("reward", reward=0.25).values())
    assert not all(verdicts("gradient", grad_norm=0.1).values())
    assert not all(verdicts("entropy", entropy=0.3).values())
    assert not all(verdicts("skipped", skipped=1.0).values())
    assert all(verdicts("bfloat16", "bfloat16", reward=0.22).values())
    assert not all(verdicts("bfloat16 too far", "bfloat16", reward=0.25).values())
    request = make_request("short")
    compare([row], [row] * 2, "float32", Recorder(request))
    assert not read_records(Path(request.results))[0]["passed"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_loss_benchmark(run_stage: Callable[..., Any], one_thread: None) -> None:
    records = run_stage("bench_loss")
    figures = names(records, "figure")
    for part in (
        "copy bandwidth",
        "linear loss, 0.5B head, 32 rows, auto",
        "eager torch, 0.5B head, 32 rows",
        "eager torch, 0.5B head, 32 rows: times ours",
    ):
        assert part in figures  # fmt: skip
    assert "values of linear_policy_loss, auto, at V = 150" in names(records, "check")
    assert all(r["value"] > 0 for r in records if r["kind"] == "figure")


def test_wrong_values_are_not_timed(
    make_request: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from gpu_check import bench_loss, loss_work
    from gpu_check.records import Recorder, read_records

    honest = loss_work.ours

    def off(work: Any, backend: str, dtype: Any = None) -> torch.Tensor:
        loss = honest(work, backend, dtype)
        if dtype is None:
            work.weight.grad.mul_(1.05)
        return loss

    monkeypatch.setattr(loss_work, "ours", off)
    monkeypatch.setattr(loss_work, "eager_loss", lambda hidden, *_: (hidden * 0).sum())
    request = make_request("bench_loss")
    bench_loss.run(request, Recorder(request))
    records = read_records(Path(request.results))
    assert [r["passed"] for r in records if r["kind"] == "check"] == [False]
    figures = names(records, "figure")
    assert not [n for n in figures if "linear loss" in n or "eager" in n]
    assert any("nothing was timed" in r.get("reason", "") for r in records)


def test_liger_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the arguments of Liger's two losses gives the plain loss."""
    from gpu_check import loss_work

    from eapo_fast import recipes

    work = loss_work.build(32, 16, 150, "cpu", 1, recipes.get("eapo"))
    want = loss_work.eager_loss(*loss_work.eager_arguments(work))

    def loss_of(logprob: Any, old: Any, advantages: Any, low: float, high: float) -> Any:
        ratio, advantages = (logprob - old).exp(), advantages[:, None]
        clipped = ratio.clamp(1 - low, 1 + high)
        return torch.maximum(-advantages * ratio, -advantages * clipped)

    class Chunked:
        def __init__(self, *, beta: float, epsilon_low: float, epsilon_high: float,
                     loss_type: str, use_ref_model: bool) -> None:  # fmt: skip
            self.range = epsilon_low, epsilon_high

        def __call__(
            self,
            _input: Any,
            lin_weight: Any,
            selected_token_ids: Any,
            attention_mask: Any,
            advantages: Any,
            *,
            old_per_token_logps: Any,
        ) -> Any:
            logits = (_input @ lin_weight.T).float().log_softmax(-1)
            logprob = logits.gather(2, selected_token_ids[..., None])[..., 0]
            found = loss_of(logprob, old_per_token_logps, advantages, *self.range)
            return (found * attention_mask).sum() / attention_mask.sum(), []

    def triton(logits: Any, old: Any, ref: Any, ids: Any, advantages: Any, mask: Any,
               temperature: float, beta: float, low: float, high: float) -> Any:  # fmt: skip
        rows = logits[:, :-1].float().log_softmax(-1)
        logprob = rows.gather(2, ids[..., None])[..., 0]
        return loss_of(logprob, old, advantages, low, high), None, None

    chunked = SimpleNamespace(LigerFusedLinearGRPOLoss=Chunked)
    fused = SimpleNamespace(triton_grpo_loss=triton)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", chunked)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.grpo_loss", fused)
    for call in (loss_work.liger_chunked, loss_work.liger_triton):
        work.clear()
        torch.testing.assert_close(call(work), want.detach(), rtol=1e-4, atol=1e-4)
        assert work.weight.grad is not None


def test_sampler_benchmark(run_stage: Callable[..., Any], one_thread: None) -> None:
    records = run_stage("bench_sampler")
    figures = {r["name"]: r for r in records if r["kind"] == "figure"}
    step = figures["decode step, tiny shape, 16 rows"]
    assert step["decode_only_steps"] >= 6
    assert step["kv_ms"] < step["kv_unshared_ms"]
    share = figures["decode step, tiny shape, 16 rows: share of GEMM + KV floor"]["value"]
    assert share == pytest.approx((step["gemm_ms"] + step["kv_ms"]) / step["value"])
    assert "generate, tiny shape, 16 rows: ours over it" in figures


def test_kernels_benchmark(run_stage: Callable[..., Any], one_thread: None) -> None:
    records = run_stage("bench_kernels")
    figures = {r["name"]: r["value"] for r in records if r["kind"] == "figure"}
    launches = [n.removesuffix(": share of its floor") for n in figures if n.endswith("floor")]
    assert len(launches) == 11
    assert {f"values of {name}" for name in launches} == set(names(records, "check"))
    assert all(figures[name] > 0 for name in launches)


def test_step_benchmark(run_stage: Callable[..., Any], one_thread: None) -> None:
    records = run_stage("bench_step")
    (check,) = [r for r in records if r["kind"] == "check"]
    assert len(check["consult_rate"]) == 3
    assert set(check["accepted"]) == {1.0}
    assert {"step, rollout", "step, update", "step, step"} <= set(names(records, "figure"))
    assert names(records, "note") == ["the timed step"]
    assert names(records, "skip") == ["idle share of the GPU"]


def test_the_head_consults_as_often_as_it_should() -> None:
    from gpu_check import shapes

    tokenizer = shapes.byte_tokenizer()
    token = tokenizer.convert_tokens_to_ids(shapes.CONSULT)
    assert tokenizer(shapes.CONSULT)["input_ids"] == [token]
    model = shapes.qwen2("tiny", "cpu", torch.float32, tied=False)
    shapes.consulting_head(model, token, 0.02)
    with torch.no_grad():
        shares = model(torch.randint(0, 320, (4, 50))).logits.softmax(-1)[..., token]
    assert float(shares.mean()) == pytest.approx(0.02, rel=0.1)


def test_what_a_trace_says(make_request: Callable[..., Any]) -> None:
    """Of a stand-in for the profiler, and of torch's own on the CPU."""
    from gpu_check import trace
    from gpu_check.records import Recorder, read_records
    from torch.profiler import ProfilerActivity, profile

    def event(name: str, start: float, duration: float, device: str = "cuda") -> Any:
        return SimpleNamespace(
            name=lambda: name,
            start_ns=lambda: start,
            duration_ns=lambda: duration,
            device_type=lambda: device,
        )

    events = [event("a", 0, 3e6), event("b", 1e6, 4e6), event("b", 5e6 + 8e3, 1e6),
              event("host", 0, 9e9, "cpu"), event("a", 56e6, 1e6)]  # fmt: skip
    results = SimpleNamespace(events=lambda: events)
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    found = trace.read(profiler, "cuda")
    assert found.busy == pytest.approx(7e-3)
    assert found.gaps == pytest.approx((8e-6, 0, 0, 0, 0.056 - 0.006008))
    assert found.longest == (("b", pytest.approx(5e-3), 2), ("a", pytest.approx(4e-3), 2))
    request = make_request("trace")
    trace.write(found, 0.07, Recorder(request))
    records = read_records(Path(request.results))
    assert records[0]["value"] == pytest.approx(0.9)
    assert records[0]["launches"] == 4
    assert names(records, "figure")[1] == "idle while traced, in gaps up to 10 us"
    assert names(records, "figure")[-1] == "idle while traced, in gaps over 10 ms"

    with profile(activities=[ProfilerActivity.CPU]) as own:
        torch.ones(300, 300) @ torch.ones(300, 300)
    assert 0 < trace.read(own, torch.autograd.DeviceType.CPU).busy < 60
    with pytest.raises(RuntimeError, match="saw no kernel"):
        trace.read(own, torch.autograd.DeviceType.CUDA)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("traces", [True, False])
def test_what_is_watched(
    traces: bool, make_request: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the device: the timed step is sampled, and the next traced."""
    from gpu_check import bench_step, trace
    from gpu_check.records import Recorder, read_records

    def ended(_: Any) -> trace.Trace:
        return trace.Trace(0.1, (0.0,) * 5, 7, (("kernel", 0.1, 7),))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 95)
    monkeypatch.setattr(trace, "started", lambda: "profiler")
    monkeypatch.setattr(trace, "ended", ended)
    request = make_request("watch", device="cuda", seconds=60.0 if traces else 5.0)
    watch = bench_step._Watch(request, Recorder(request))
    control = SimpleNamespace(should_training_stop=False)
    for step in range(3):
        watch.on_step_begin(None, SimpleNamespace(global_step=step), control, model=None)
        time.sleep(0.25)
        watch.on_step_end(None, SimpleNamespace(global_step=step + 1), control, model=None)
        watch.on_log(None, None, control, logs={"perf/rollout_s": 0.1, "reward": 1.0})
        if control.should_training_stop:
            break
    records = read_records(Path(request.results))
    figures = {r["name"]: r for r in records if r["kind"] == "figure"}
    assert figures["step, rollout"]["value"] == 0.1
    assert figures["idle share of the GPU, NVML"]["value"] == pytest.approx(0.05)
    assert control.should_training_stop is not traces
    assert ("trace of a step" in names(records, "skip")) is not traces
    if traces:
        share = figures["idle share of the GPU, kernels over the timed step"]
        assert share["value"] == pytest.approx(1 - 0.1 / share["timed_s"])
        assert share["passed"] is False


def test_times_are_medians_of_device_events(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_check.hardware import milliseconds

    clock = [0.0]

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    durations = iter([50.0, 40.0, 3.0, 1.0, 9.0])

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert milliseconds(work, "cuda", repeats=3, warmup=2) == 3.0
