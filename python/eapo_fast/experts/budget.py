"""Budgets as guarantees: the worst case is reserved before a call and settled after it.

At every moment committed + reserved <= cap on every account. Money is kept in integer nano-units,
reservations rounded up and caps down, so that no rounding can add up to an overshoot.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, NamedTuple, get_args

from eapo_fast.errors import ConfigError, DataError
from eapo_fast.experts.base import ConsultRequest, Usage
from eapo_fast.experts.checks import is_number
from eapo_fast.experts.journal import Journal, note

Per = Literal["run", "step", "prompt", "rollout"]
NANO = 1_000_000_000


class Amount(NamedTuple):
    """Consults, tokens and money (nano-units) of one call or account."""

    consults: int = 0
    tokens: int = 0
    nano: int = 0

    def plus(self, other: Amount) -> Amount:
        """The sum, field by field."""
        return Amount(self[0] + other[0], self[1] + other[1], self[2] + other[2])

    def most(self, other: Amount) -> Amount:
        """The larger of the two, field by field."""
        return Amount(*(max(a, b) for a, b in zip(self, other, strict=True)))

    def minus(self, other: Amount) -> Amount:
        """The difference, field by field."""
        return Amount(self[0] - other[0], self[1] - other[1], self[2] - other[2])


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps on what consulting may use; None leaves a quantity uncapped.

    `per` says how far one cap reaches: the run, each step, each prompt group of a step, or each
    rollout. Several budgets hold together.
    """

    consults: int | None = None
    """Calls to the expert, retries included."""
    tokens: int | None = None
    """Tokens read and written by the expert."""
    money: float | None = None
    """Cost, in the currency of the expert's prices."""
    per: Per = "run"
    """Scope of the caps."""

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise ConfigError(f"per is {self.per!r}; allowed are {', '.join(get_args(Per))}.")
        for name in ("consults", "tokens", "money"):
            cap = getattr(self, name)
            if cap is not None and not (is_number(cap) and cap >= 0):
                raise ConfigError(f"{name} is {cap!r}; it must be None or a finite number >= 0.")

    def allows(self, total: Amount) -> bool:
        """Whether an account standing at `total` is inside every cap."""
        nano = None if self.money is None else math.floor(self.money * NANO)
        caps = (self.consults, self.tokens, nano)
        return all(cap is None or got <= cap for cap, got in zip(caps, total, strict=True))


@dataclass(slots=True, eq=False)
class Reservation:
    """A worst case held on every account that the request belongs to."""

    amount: Amount
    """What is held."""
    accounts: tuple[tuple[Per, str], ...]
    """(scope, key) of each account."""
    books: int = 0
    """Which books: those of before a `load_state_dict` are closed."""
    open: bool = True
    """False once settled or released."""


@dataclass(slots=True)
class _Account:
    committed: Amount = field(default_factory=Amount)
    reserved: Amount = field(default_factory=Amount)


class Ledger:
    """Books of one run; thread-safe; its state is JSON."""

    def __init__(self, budgets: Budget | Sequence[Budget] | None = None) -> None:
        self.budgets = _as_tuple(budgets)
        scopes = {"run", *(budget.per for budget in self.budgets)}
        self._scopes: tuple[Per, ...] = tuple(per for per in get_args(Per) if per in scopes)
        self._accounts: dict[tuple[Per, str], _Account] = {}
        self._lock = threading.Lock()
        self._books = self._loaded = 0
        self._journal: Journal | None = None
        self.overruns = 0

    @property
    def caps_money(self) -> bool:
        """Whether any budget needs prices."""
        return any(budget.money is not None for budget in self.budgets)

    def reserve(self, request: ConsultRequest, worst: Usage) -> Reservation | None:
        """Hold the worst case of one call, or return None if any cap would be passed."""
        amount = _amount(worst)
        keys = tuple((per, _key(per, request)) for per in self._scopes)
        with self._lock:
            if not all(self._fits(key, amount) for key in keys):
                return None
            if not note(self._journal, keys, amount):
                return None  # what cannot be remembered is not spent
            for key in keys:
                account = self._accounts.setdefault(key, _Account())
                account.reserved = account.reserved.plus(amount)
            return Reservation(amount, keys, self._books)

    def _fits(self, key: tuple[Per, str], amount: Amount) -> bool:
        account = self._accounts.get(key) or _Account()
        total = account.committed.plus(account.reserved).plus(amount)
        return all(budget.allows(total) for budget in self.budgets if budget.per == key[0])

    def settle(self, reservation: Reservation, usage: Usage | None) -> Amount:
        """Replace the worst case by `usage`; None (unknown outcome) commits all of it.

        A provider that used more than its worst case is charged in full and counted in
        `overruns`; the next reservation is then refused.
        """
        final = reservation.amount if usage is None else _amount(usage)
        over = final.tokens > reservation.amount.tokens or final.nano > reservation.amount.nano
        return self._close(reservation, final, over)

    def release(self, reservation: Reservation) -> None:
        """Give everything back: the call was surely never billed."""
        self._close(reservation, Amount())

    def _close(self, reservation: Reservation, final: Amount, over: bool = False) -> Amount:
        with self._lock:
            if not reservation.open or reservation.books != self._books:
                return Amount()
            reservation.open = False
            self.overruns += over
            note(self._journal, reservation.accounts, final.minus(reservation.amount))
            for key in reservation.accounts:
                account = self._accounts[key]
                account.reserved = account.reserved.minus(reservation.amount)
                account.committed = account.committed.plus(final)
        return final

    def forget(self, before: int | None = None, *, step: int | None = None) -> None:
        """Drop the accounts of steps below `before`, or those of one `step`, that nothing holds.

        A step that is over is never asked for again, so books and checkpoints stay small. An
        evaluation forgets its own step first: its caps per step, prompt and rollout start anew.
        The run's account stays.
        """
        with self._lock:
            for key in [key for key in self._accounts if key[0] != "run"]:
                at = int(key[1].partition("/")[0])
                over = at == step if before is None else at < before
                if over and not any(self._accounts[key].reserved):
                    del self._accounts[key]

    def total(self, per: Per = "run", request: ConsultRequest | None = None) -> Amount:
        """Committed plus reserved on one account."""
        with self._lock:
            account = self._accounts.get((per, _key(per, request)))
            return account.committed.plus(account.reserved) if account else Amount()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able books; what is still reserved counts as spent (its outcome is unknown)."""
        with self._lock:
            books: dict[str, dict[str, list[int]]] = {}
            for (per, key), account in self._accounts.items():
                books.setdefault(per, {})[key] = [*account.committed.plus(account.reserved)]
            number = self._journal.number if self._journal else 0
        return {
            "version": 1,
            "accounts": books,
            "overruns": self.overruns,
            "journal": number,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the books by saved ones; DataError if `state` is not a ledger's."""
        try:
            loaded = {
                (per, key): _Account(Amount(*(int(value) for value in values)))
                for per, book in state["accounts"].items()
                for key, values in book.items()
            }
            overruns, number = int(state["overruns"]), int(state.get("journal", 0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"this is not the state of a budget ledger: {error!r}.") from None
        with self._lock:
            self._accounts = loaded
            self.overruns = overruns
            self._loaded = number
            self._books += 1

    def keep_journal(self, path: str | PathLike[str], *, resumed: bool) -> None:
        """Write every change to a file from now on.

        A `resumed` ledger first adds what the file holds beyond the loaded state: calls that were
        paid for after the checkpoint stay paid for, and those without an outcome keep their worst
        case. ConfigError if the file cannot be written, DataError if it is damaged.
        """
        self.close()
        journal = Journal(path, resumed=resumed)
        with self._lock:
            for accounts, add in journal.after(self._loaded):
                for per, key in accounts:
                    account = self._accounts.setdefault((per, key), _Account())  # type: ignore[arg-type]
                    account.committed = account.committed.plus(Amount(*add))
            self._journal, self._loaded = journal, journal.number

    def close(self) -> None:
        """Let go of the journal."""
        journal, self._journal = self._journal, None
        if journal is not None:
            self._loaded = journal.number
            journal.close()


def _as_tuple(budgets: Budget | Sequence[Budget] | None) -> tuple[Budget, ...]:
    if budgets is None:
        return ()
    several = budgets if isinstance(budgets, list | tuple) else (budgets,)
    for budget in several:
        if not isinstance(budget, Budget):
            raise ConfigError(f"budget is {budget!r}; give a Budget, or a list of them.")
    return tuple(several)


def _key(per: Per, request: ConsultRequest | None) -> str:
    depth = get_args(Per).index(per)
    return "" if request is None else "/".join(str(part) for part in request.place[:depth])


def _amount(usage: Usage) -> Amount:
    return Amount(1, usage.tokens, math.ceil(usage.cost * NANO))
