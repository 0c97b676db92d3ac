"""State machines of the ledger, the breaker and the shelf, against models that are plain enough.

`EAPO_FAST_EXAMPLES=5000` looks longer, and elsewhere each time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from eapo_fast.experts import Budget, ConsultPolicy, ConsultRequest, ExpertReply, Ledger, Usage
from eapo_fast.experts.breaker import Breaker
from eapo_fast.experts.budget import NANO, Amount
from eapo_fast.experts.cache import Shelf, request_key

EXAMPLES = int(os.environ.get("EAPO_FAST_EXAMPLES", "60"))
QUICK = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None, derandomize=EXAMPLES == 60
)
SCOPES = ("run", "step", "prompt", "rollout")

caps = st.none() | st.integers(0, 12)
budgets = st.builds(
    Budget,
    consults=caps,
    tokens=st.none() | st.integers(0, 400),
    money=st.none() | st.floats(0, 0.02),
    per=st.sampled_from(SCOPES),
)
usages = st.builds(Usage, st.integers(0, 60), st.integers(0, 60), st.floats(0, 0.005))
requests = st.builds(
    lambda step, prompt, rollout: ConsultRequest("q", step=step, prompt=prompt, rollout=rollout),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(0, 1),
)


class LedgerMachine(RuleBasedStateMachine):
    """Committed plus reserved never passes a cap; the books are those of a list of entries."""

    held = Bundle("held")

    @initialize(given=st.lists(budgets, max_size=3))
    def begin(self, given: list[Budget]) -> None:
        self.budgets = given
        self.ledger = Ledger(given)
        self.entries: list[tuple[tuple[Any, ...], Amount]] = []
        self.overshoot = False

    def total(self, depth: int, place: tuple[Any, ...]) -> Amount:
        total = Amount()
        for other, amount in self.entries:
            if other[:depth] == place[:depth]:
                total = total.plus(amount)
        return total

    @rule(target=held, request=requests, worst=usages)
    def reserve(self, request: ConsultRequest, worst: Usage) -> Any:
        amount = Amount(1, worst.tokens, math.ceil(worst.cost * NANO))
        place = request.place[:3]
        fits = all(
            b.allows(self.total(SCOPES.index(b.per), place).plus(amount)) for b in self.budgets
        )
        got = self.ledger.reserve(request, worst)
        assert (got is not None) == fits
        if got is None:
            return None
        self.entries.append((place, amount))
        return got, len(self.entries) - 1, worst

    @rule(one=consumes(held), share=st.floats(0, 1), outcome=st.sampled_from("urs"))
    def end(self, one: Any, share: float, outcome: str) -> None:
        if one is None:
            return
        reservation, index, worst = one
        place, amount = self.entries[index]
        if outcome == "r":
            self.ledger.release(reservation)
            amount = Amount()
        elif outcome == "s":
            used = Usage(
                int(worst.prompt_tokens * share),
                int(worst.completion_tokens * share),
                worst.cost * share,
            )
            amount = self.ledger.settle(reservation, used)
        else:
            self.ledger.settle(reservation, None)
        self.entries[index] = (place, amount)
        self.ledger.release(reservation)
        self.ledger.settle(reservation, Usage(10**9, 10**9, 1e6))

    @rule(one=consumes(held), extra=st.integers(1, 50))
    def overrun(self, one: Any, extra: int) -> None:
        """A provider gives more than was asked for: charged in full and counted."""
        if one is None:
            return
        reservation, index, worst = one
        before = self.ledger.overruns
        used = Usage(worst.prompt_tokens + extra, worst.completion_tokens, worst.cost)
        self.entries[index] = (self.entries[index][0], self.ledger.settle(reservation, used))
        assert self.ledger.overruns == before + 1
        self.overshoot = True

    @rule()
    def kill(self) -> None:
        """A new process reads the checkpoint; what was under way counts as spent."""
        other = Ledger(self.budgets)
        other.load_state_dict(self.ledger.state_dict())
        scopes = {"run", *(b.per for b in self.budgets)}
        assert other.total() == self.ledger.total()
        assert set(other.state_dict()["accounts"]) <= scopes

    @invariant()
    def caps_hold(self) -> None:
        if not hasattr(self, "entries"):
            return
        assert self.ledger.total() == self.total(0, ())
        for place, _ in self.entries:
            for budget in self.budgets:
                depth = SCOPES.index(budget.per)
                assert self.overshoot or budget.allows(self.total(depth, place))


class BreakerMachine(RuleBasedStateMachine):
    """Never more than one probe; a success always closes; an open one lets nobody through early."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(3, 10.0)
        self.now = 0.0
        self.calls = 0
        self.probing = False
        self.row = 0
        self.opened_at = -math.inf

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        was = self.breaker.state
        allowed = self.breaker.allow(self.now)
        if was == "closed":
            assert allowed
        if was == "half_open":
            assert not allowed
        if was == "open":
            assert allowed == (self.now >= self.opened_at + 10.0)
            self.probing |= allowed
        self.calls += allowed

    @precondition(lambda self: self.calls)
    @rule(good=st.booleans())
    def answer(self, good: bool) -> None:
        self.calls -= 1
        if good:
            self.breaker.success()
            self.row, self.probing = 0, False
            assert self.breaker.state == "closed"
            return
        was = self.breaker.state
        self.breaker.failure(self.now)
        self.row += 1
        if was == "half_open" or (was == "closed" and self.row >= 3):
            self.opened_at, self.probing = self.now, False
        assert self.breaker.state != "half_open"

    @precondition(lambda self: self.calls and self.breaker.state == "half_open")
    @rule()
    def abandon(self) -> None:
        self.calls -= 1
        self.breaker.abandon(self.now)
        self.opened_at, self.probing = self.now - 10.0, False

    @invariant()
    def one_probe(self) -> None:
        assert self.probing == (self.breaker.state == "half_open")


class ShelfMachine(RuleBasedStateMachine):
    """What is shared, and for how long, in every mode, with a lasting file or without."""

    @initialize(mode=st.sampled_from(["off", "in_flight", "step", "run"]), lasting=st.booleans())
    def begin(self, mode: str, lasting: bool) -> None:
        self.folder = TemporaryDirectory()
        path = Path(self.folder.name) / "c.sqlite" if lasting else None
        self.policy = ConsultPolicy(dedup=mode, cache=path)  # type: ignore[arg-type]
        self.shelf = Shelf(self.policy)
        self.step = 1
        self.memory: dict[str, str] = {}
        self.lasting: dict[str, str] = {}

    def ask(self, query: str, sample: int) -> tuple[ConsultRequest, str]:
        request = ConsultRequest(query, step=self.step, sample_index=sample)
        return request, request_key("expert", request)

    @rule(query=st.sampled_from("abc"), sample=st.integers(0, 1))
    def get(self, query: str, sample: int) -> None:
        request, key = self.ask(query, sample)
        found = self.shelf.get(key, request)
        expected = self.memory.get(key, self.lasting.get(key))
        assert (None if found is None else found.text) == expected
        assert found is None or (found.status, found.usage) == ("cached", None)

    @rule(query=st.sampled_from("abc"), sample=st.integers(0, 1), text=st.text(max_size=5))
    def put(self, query: str, sample: int, text: str) -> None:
        text = text.encode(errors="replace").decode()
        request, key = self.ask(query, sample)
        self.shelf.get(key, request)  # as `Board.enter` does before anything lands
        self.shelf.put(key, request, ExpertReply(text, Usage(1, 1)))
        if self.policy.dedup in ("step", "run"):
            self.memory[key] = text
        if self.policy.cache is not None:
            self.lasting[key] = text

    @rule()
    def next_step(self) -> None:
        self.step += 1
        if self.policy.dedup == "step":
            self.memory.clear()

    @rule()
    def restart(self) -> None:
        self.shelf.close()
        self.shelf = Shelf(self.policy)
        self.memory.clear()

    def teardown(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.close()
            self.folder.cleanup()


class TestLedger(LedgerMachine.TestCase):  # type: ignore[misc,name-defined]
    settings = QUICK


class TestBreaker(BreakerMachine.TestCase):  # type: ignore[misc,name-defined]
    settings = QUICK


class TestShelf(ShelfMachine.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(QUICK, max_examples=EXAMPLES // 2)
