"""Are two equations or inequalities the same, or an assignment and a value?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from eapo_fast.rewards.readings import FLIPPED, assigned, is_name
from eapo_fast.rewards.scalars import Arena, Outcome, proportional
from eapo_fast.rewards.tree import (
    COLLECTIONS,
    Bracketed,
    Listing,
    Node,
    Relation,
    SetOf,
    Sum,
    Symbol,
    Text,
    Union,
    negated,
)

Compare: TypeAlias = Callable[[Node, Node, Arena], Outcome]
"""The comparison of any two answers."""


def compare_relation_with_value(a: Node, b: Node, arena: Arena, compare: Compare) -> Outcome:
    """Compare two answers of which one is a relation, as `x = 5` and `5`."""
    a, b = assigned(a), assigned(b)
    if not isinstance(a, Relation) and not isinstance(b, Relation):
        return compare(a, b, arena)
    relation, value = (a, b) if isinstance(a, Relation) else (b, a)
    assert isinstance(relation, Relation)
    if isinstance(value, (Bracketed, Union, SetOf, Listing)):
        return Outcome(None, "a relation against a set", open=True)
    sides = [compare(side, value, arena) for side in relation.sides]
    if all(side.equal is False for side in sides):
        return Outcome(False, "a relation against a value that is none of its sides")
    return Outcome(None, "a relation against a value")


def compare_relations(a: Node, b: Node, arena: Arena, compare: Compare) -> Outcome:
    """Compare two relations: by the values that they give a name, or as equations."""
    assert isinstance(a, Relation)
    assert isinstance(b, Relation)
    left, right = assigned(a), assigned(b)
    if not isinstance(left, Relation) and not isinstance(right, Relation):
        names = _name(a.sides[0]), _name(b.sides[0])
        if names[0] == names[1] or None in names:
            outcome = compare(left, right, arena)
            if outcome.equal or _are_names(a, b):
                return outcome
    if len(a.sides) != 2 or len(b.sides) != 2:
        return Outcome(None, "chains of relations", open=True)
    return _compare_equations(a, b, arena)


def _name(side: Node) -> str | None:
    """Return the variable that a side is, without its index; None for another name."""
    return side.name.partition("_")[0] if isinstance(side, Symbol) else None


def _are_names(a: Relation, b: Relation) -> bool:
    """Tell whether both are `name = value`, and not an equation such as `2y = x`."""
    return is_name(a.sides[0]) and is_name(b.sides[0])


def _compare_equations(a: Relation, b: Relation, arena: Arena) -> Outcome:
    operators = a.operators[0], b.operators[0]
    if not set(operators) <= set(FLIPPED):
        return Outcome(None, "a relation that is not compared")
    if any(isinstance(side, (*COLLECTIONS, Text)) for side in (*a.sides, *b.sides)):
        return Outcome(None, "relations between collections")
    first, second = _difference(a.sides), _difference(b.sides)
    if operators[0] != operators[1]:
        if operators[0] != FLIPPED[operators[1]]:
            return Outcome(False, "different relations")
        second = negated(second)
    return proportional(first, second, arena, positive=operators[0][0] in "<>")


def _difference(sides: tuple[Node, ...]) -> Node:
    return Sum((sides[0], negated(sides[1])))
