from __future__ import annotations

import math
import random

import pytest

from eapo_fast.errors import ConfigError
from eapo_fast.experts import ConsultPolicy, ConsultRequest, ConsultScheduler, Function, acceptance
from eapo_fast.experts.gate import gate_accepts, gate_draw


def test_inverse_schedule_is_the_papers() -> None:
    assert [acceptance("inverse", s) for s in (0, 1, 2, 10, 100)] == [1.0, 1.0, 0.5, 0.1, 0.01]
    assert acceptance("inverse", 40, offset=20, power=2) == pytest.approx(0.25)
    assert acceptance("inverse", 100, floor=0.2) == 0.2
    assert acceptance("inverse", 1, offset=1000, power=300) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ramps_start_at_one_and_end_at_the_floor(schedule: str) -> None:
    rho = [acceptance(schedule, s, offset=5, floor=0.1, total_steps=25) for s in range(31)]
    assert rho[:6] == [1.0] * 6
    assert rho[15] == pytest.approx(0.55)
    assert rho[25:] == pytest.approx([0.1] * 6)
    assert rho == sorted(rho, reverse=True)


def test_constant_never_falls() -> None:
    assert acceptance("constant", 10**6) == 1.0


def test_bad_schedules_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'cosine'"):
        acceptance("cosin", 3)
    with pytest.raises(ConfigError, match="total_steps"):
        ConsultPolicy(schedule="linear")
    with pytest.raises(ConfigError, match=r"floor is 1\.5"):
        ConsultPolicy(floor=1.5)
    with pytest.raises(ConfigError, match="gate is 'late'"):
        ConsultPolicy(gate="late")


def test_certain_acceptance_is_certain() -> None:
    assert gate_accepts(1.0, math.nextafter(1.0, 0.0))
    assert not gate_accepts(0.0, 0.0)


def test_draws_follow_the_schedule_within_three_sigma() -> None:
    total, rho = 20_000, acceptance("inverse", 3)
    places = [ConsultRequest("q", step=3, prompt=i // 7, rollout=i % 7) for i in range(total)]
    accepted = sum(gate_accepts(rho, gate_draw(11, place)) for place in places)
    assert abs(accepted - rho * total) < 3 * math.sqrt(total * rho * (1 - rho))


def test_every_part_of_the_place_and_the_seed_matters() -> None:
    base = ConsultRequest("q", step=2, prompt=3, rollout=4, turn=5, index=6)
    others = [
        ConsultRequest("q", **{**_place(base), name: 9})
        for name in ("step", "prompt", "rollout", "turn", "index")
    ]
    draws = {gate_draw(0, request) for request in [base, *others]} | {gate_draw(1, base)}
    assert len(draws) == 7
    assert gate_draw(0, ConsultRequest("other text", "p", **_place(base))) == gate_draw(0, base)


def _place(request: ConsultRequest) -> dict[str, int]:
    return dict(zip(("step", "prompt", "rollout", "turn", "index"), request.place, strict=True))


@pytest.mark.parametrize("gate", ["before_dispatch", "after_reply"])
def test_decisions_do_not_depend_on_completion_order(gate: str) -> None:
    import asyncio

    requests = [ConsultRequest(f"q{i}", step=2, prompt=i) for i in range(64)]
    outcomes = set()
    for shuffle in range(50):
        delays = dict(zip(range(64), random.Random(shuffle).sample(range(64), 64), strict=True))

        async def slow(request: ConsultRequest, delays: dict[int, int] = delays) -> str:
            await asyncio.sleep(delays[request.prompt] * 2e-4)
            return f"r{request.prompt}"

        order = random.Random(100 + shuffle).sample(requests, 64)
        policy = ConsultPolicy(schedule="inverse", gate=gate)
        with ConsultScheduler(Function(slow), policy, seed=5) as desk:
            handles = {request.prompt: desk.submit(request) for request in order}
            results = [handles[i].result(5.0) for i in range(64)]
            metrics = desk.drain_metrics()
        outcomes.add(tuple((result.status, result.text) for result in results))
        accepted = sum(result.accepted for result in results)
        assert metrics["expert/sent"] == (accepted if gate == "before_dispatch" else 64)
        assert metrics["expert/saved_by_gate"] == (64 - accepted if "before" in gate else 0)
    assert len(outcomes) == 1


def test_both_gates_show_the_policy_the_same() -> None:
    seen = []
    for gate in ("before_dispatch", "after_reply"):
        policy = ConsultPolicy(schedule="inverse", gate=gate)
        with ConsultScheduler(Function(lambda r: r.query, immediate=True), policy, seed=3) as desk:
            handles = [desk.submit(ConsultRequest("q", step=2, rollout=i)) for i in range(50)]
            desk.flush()
            seen.append([(h.result().status, h.result().text) for h in handles])
    assert seen[0] == seen[1]
    assert {status for status, _ in seen[0]} == {"ok", "declined"}
