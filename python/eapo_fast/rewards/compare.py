"""Are two answers the same? Structure first (sets, tuples, intervals, texts), then values."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from eapo_fast.rewards.number_sets import number_set
from eapo_fast.rewards.readings import plain
from eapo_fast.rewards.relations import compare_relation_with_value, compare_relations
from eapo_fast.rewards.scalars import Arena, Outcome, compare_scalars
from eapo_fast.rewards.texts import compare_texts
from eapo_fast.rewards.tree import (
    COLLECTIONS,
    Bracketed,
    Combined,
    Constant,
    Listing,
    Matrix,
    Node,
    Number,
    Numeral,
    Product,
    Quantity,
    Ratio,
    Relation,
    SetOf,
    Symbol,
    Text,
    Union,
    children,
    walk,
)
from eapo_fast.rewards.units import dimension, is_known

_JOINED = (Union, Combined)
_MAY_BE_SETS = (Union, Combined, Bracketed, SetOf, Relation)
_ZERO = Number(Fraction(0))


def compare(a: Node, b: Node, arena: Arena) -> Outcome:
    """Compare two answers, whatever their kind; symmetric in its two trees."""
    if isinstance(a, Number) and isinstance(b, Number):
        return compare_scalars(a, b, arena)
    a, b = plain(a), plain(b)
    outcome = _compare(a, b, arena)
    return arena.further(a, b, outcome) if outcome.open else outcome


def _compare(a: Node, b: Node, arena: Arena) -> Outcome:
    if a == b:
        return Outcome(True, "the same expression")
    named = isinstance(a, Relation), isinstance(b, Relation)
    if all(named):
        return compare_relations(a, b, arena, compare)
    if any(named):
        return compare_relation_with_value(a, b, arena, compare)
    if isinstance(a, Text) or isinstance(b, Text):
        return compare_texts(a, b, arena, compare)
    if isinstance(a, COLLECTIONS) or isinstance(b, COLLECTIONS):
        return _compare_collections(a, b, arena)
    return _compare_values(a, b, arena)


# Collections


def _compare_collections(a: Node, b: Node, arena: Arena) -> Outcome:
    if isinstance(a, _JOINED) or isinstance(b, _JOINED):
        return _compare_number_sets(a, b, arena)
    return _compare_members(a, b, arena)


def _compare_number_sets(a: Node, b: Node, arena: Arena) -> Outcome:
    if not (isinstance(a, _MAY_BE_SETS) and isinstance(b, _MAY_BE_SETS)):
        return Outcome(False, f"{_kind(a)} against {_kind(b)}")
    left, right = number_set(a, arena.meter), number_set(b, arena.meter)
    if left is not None and right is not None:
        same = left == right
        return Outcome(same, "the same set of numbers" if same else "different sets of numbers")
    outcome = _compare_members(a, b, arena)
    return outcome if outcome.equal else Outcome(None, "sets of numbers", open=True)


def _compare_members(a: Node, b: Node, arena: Arena) -> Outcome:
    pair = _aligned(a, b) or _aligned(b, a)
    if pair is None and any(
        isinstance(part, COLLECTIONS)
        for node in (a, b)
        if not isinstance(node, COLLECTIONS)
        for part in walk(node)
    ):
        return Outcome(None, "arithmetic with collections", open=True)
    if pair is None:
        return Outcome(False, f"{_kind(a)} against {_kind(b)}")
    kind, left, right = pair
    if kind == "ratio":
        return _compare_ratios(left, right, arena)
    if len(left) != len(right) and kind not in ("set", "members"):
        return Outcome(False, f"{len(left)} elements against {len(right)}")
    if kind == "ordered":
        return _all(compare(x, y, arena) for x, y in zip(left, right, strict=True))
    return _same_members(left, right, arena, repeated=kind == "set")


_Aligned = tuple[str, Sequence[Node], Sequence[Node]]


def _aligned(a: Node, b: Node) -> _Aligned | None:
    """Say how two collections are compared, or None if they cannot be equal."""
    match a, b:
        case Bracketed(), Bracketed():
            same = (a.opening, a.closing) == (b.opening, b.closing)
            vector = len(a.items) > 2 and len(b.items) > 2
            return ("ordered", a.items, b.items) if same or vector else None
        case Matrix(rows), Matrix(others):
            if len(rows) != len(others):
                return None
            return "ordered", children(a), children(b)
        case Matrix(rows), Bracketed("(" | "[", ")" | "]", items):
            if len(rows) == 1 or len(rows[0]) == 1:
                return "ordered", children(a), items
            nested = all(isinstance(item, Bracketed) for item in items)
            return (
                ("ordered", tuple(Bracketed("[", "]", row) for row in rows), items)
                if nested
                else None
            )
        case SetOf(left), SetOf(right):
            return "set", left, right
        case SetOf(left), Listing(right):
            return "members", left, right
        case Listing(left), Listing(right):
            return "list", _distinct(left), _distinct(right)
        case Listing(left), Bracketed(("(" | "["), (")" | "]"), right):
            return "ordered", left, right
        case Union(left), Union(right):
            return "members", left, right
        case Combined(), Combined() if a.operation == b.operation:
            return "ordered", children(a), children(b)
        case Ratio(left), Ratio(right):
            return "ratio", left, right
        case Ratio((top, bottom)), _ if not isinstance(b, COLLECTIONS):
            return "ratio", (top, bottom), (b, Number(Fraction(1)))
        case SetOf((single,)), _ if not isinstance(b, COLLECTIONS):
            return "ordered", (single,), (b,)
        case _:
            return None


def _distinct(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the tuples of a list of solutions without repetitions; other lists as they are."""
    tuples = all(isinstance(item, Bracketed) for item in items)
    return tuple(dict.fromkeys(items)) if tuples else items


def _kind(node: Node) -> str:
    names = {Bracketed: "a tuple or interval", SetOf: "a set", Listing: "a list"}
    return names.get(type(node), type(node).__name__.lower())


def _all(outcomes: object) -> Outcome:
    """Combine element by element: one difference decides, else one doubt does."""
    doubt: Outcome | None = None
    for outcome in outcomes:  # type: ignore[attr-defined]
        if outcome.equal is False:
            return Outcome(False, f"an element differs: {outcome.reason}")
        if outcome.equal is None:
            doubt = doubt or outcome
    return doubt or Outcome(True, "equal element by element")


def _same_members(
    left: Sequence[Node], right: Sequence[Node], arena: Arena, *, repeated: bool
) -> Outcome:
    """Match without order: every element must have an equal one on the other side.

    With `repeated` one element may have several equals, as in a set that is written with
    repetitions.
    """
    table = [[_compare_members_of(item, other, arena) for other in right] for item in left]
    columns = [[row[index] for row in table] for index in range(len(right))]
    for line in (*table, *columns):
        if all(outcome.equal is False for outcome in line):
            return Outcome(False, "an element has no equal")
    if repeated and all(any(outcome.equal for outcome in line) for line in (*table, *columns)):
        return Outcome(True, "the same elements")
    unmatched = set(range(len(right)))
    for row in table:
        hit = next((i for i in sorted(unmatched) if row[i].equal), None)
        if hit is None:
            doubts = [outcome for outcome in row if outcome.equal is None]
            return doubts[0] if doubts else Outcome(False, "an element has too few equals")
        unmatched.discard(hit)
    return Outcome(not unmatched, "other elements" if unmatched else "the same elements")


def _compare_members_of(item: Node, other: Node, arena: Arena) -> Outcome:
    if isinstance(item, SetOf) != isinstance(other, SetOf):
        return Outcome(False, "a set against a member")
    return compare(item, other, arena)


def _compare_ratios(left: Sequence[Node], right: Sequence[Node], arena: Arena) -> Outcome:
    if len(left) != len(right):
        return Outcome(False, f"{len(left)} parts against {len(right)}")
    same = _all(compare(x, y, arena) for x, y in zip(left, right, strict=True))
    parts = (*left, *right)
    if same.equal or any(node == _ZERO or isinstance(node, Quantity) for node in parts):
        return same
    proportions = _all(
        compare(Product((left[0], right[i])), Product((right[0], left[i])), arena)
        for i in range(1, len(left))
    )
    if proportions.equal and _is_time(left) and _is_time(right):
        return Outcome(None, "a time or a ratio")
    return proportions


def _is_time(parts: Sequence[Node]) -> bool:
    """Tell whether a proportion may be a time of day such as 6:15."""
    match parts:
        case [Number(hours), Number(minutes)]:
            return 0 <= hours <= 24 and 10 <= minutes < 60
        case _:
            return False


# Values


def _compare_values(a: Node, b: Node, arena: Arena) -> Outcome:
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        if {a.unit, b.unit} == {"degree", "rad"}:
            return compare(_radians(a), _radians(b), arena)
        outcome = compare(a.operand, b.operand, arena)
        if a.unit == b.unit or not (is_known(a.unit) and is_known(b.unit)):
            return outcome
        if outcome.equal is False and dimension(a.unit) == dimension(b.unit):
            return Outcome(None, f"units are not converted: {a.unit}, {b.unit}")
        return Outcome(False, f"units differ: {a.unit}, {b.unit}")
    if isinstance(a, Quantity) or isinstance(b, Quantity):
        return _compare_unit_on_one_side(a, b, arena)
    outcome = compare_scalars(a, b, arena)
    if outcome.equal is False and (_bare_digits(a, b) or _bare_digits(b, a)):
        return Outcome(None, "the base is written on one side only")
    return outcome


def _radians(angle: Quantity) -> Node:
    """Return the measure of an angle in radians."""
    if angle.unit != "degree":
        return angle.operand
    return Product((angle.operand, Constant("pi"), Number(Fraction(1, 180))))


def _compare_unit_on_one_side(a: Node, b: Node, arena: Arena) -> Outcome:
    quantity, other = (a, b) if isinstance(a, Quantity) else (b, a)
    assert isinstance(quantity, Quantity)
    outcome = compare(quantity.operand, other, arena)
    if quantity.unit == "degree" and not outcome.equal:
        in_radians = compare(_radians(quantity), other, arena)
        return in_radians if in_radians.equal else outcome
    if outcome.equal or len(quantity.unit) != 1:
        return outcome
    return compare(Product((quantity.operand, Symbol(quantity.unit))), other, arena)


def _bare_digits(numeral: Node, other: Node) -> bool:
    return (
        isinstance(numeral, Numeral)
        and isinstance(other, Number)
        and numeral.digits.isdigit()
        and other.value == Fraction(int(numeral.digits))
    )
