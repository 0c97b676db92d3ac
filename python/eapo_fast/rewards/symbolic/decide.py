"""What sympy says of two trees: equal by simplification, different by values, or not decided."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from typing import Any

import sympy as sp

from eapo_fast.rewards.scalars import Arena, Outcome
from eapo_fast.rewards.symbolic.build import Builder, NotBuilt
from eapo_fast.rewards.tree import (
    Bracketed,
    Combined,
    Listing,
    Node,
    Relation,
    SetOf,
    Union,
    symbols,
)

_RELATIONS = {"<": sp.Lt, "<=": sp.Le, ">": sp.Gt, ">=": sp.Ge, "=": sp.Eq, "!=": sp.Ne}
_UNEVALUATED = (sp.Integral, sp.Sum, sp.Product, sp.Limit, sp.Derivative)
_INFINITE = (sp.nan, sp.zoo, sp.oo, -sp.oo)
_DIGITS = 40
_POINTS = 3


def compare_symbolically(a: Node, b: Node, arena: Arena) -> Outcome:
    """Compare two values, matrices, equations or sets of real numbers.

    Never open: where sympy does not help, nothing does.
    """
    try:
        return _compare(a, b, arena)
    except NotBuilt as reason:
        return Outcome(None, f"not decided: {reason}")
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        return Outcome(None, f"not decided by computer algebra ({type(error).__name__})")


def _compare(a: Node, b: Node, arena: Arena) -> Outcome:
    builder = Builder(a, b)
    if isinstance(a, Relation) and isinstance(b, Relation) and _is_equation(a) and _is_equation(b):
        return _compare_equations(a, b, builder)
    if isinstance(a, _SETS) or isinstance(b, _SETS):
        names = symbols(a) | symbols(b)
        joined = any(isinstance(node, (Union, Combined)) for node in (a, b))
        if (len(names) == 1 or (joined and not names)) and not _is_arithmetic(a, b):
            return _compare_sets(_as_set(a, builder), _as_set(b, builder))
    left, right = builder.build(a), builder.build(b)
    if isinstance(left, sp.MatrixBase) or isinstance(right, sp.MatrixBase):
        return _compare_matrices(left, right, arena)
    return _compare_values(left, right, arena)


_SETS = (Relation, Bracketed, SetOf, Listing, Union, Combined)


def _is_equation(node: Relation) -> bool:
    return node.operators == ("=",)


def _is_arithmetic(a: Node, b: Node) -> bool:
    """Tell vectors and matrices in formulas from sets: a set stands on both sides."""
    return not (isinstance(a, _SETS) and isinstance(b, _SETS))


# Values


def _compare_values(left: Any, right: Any, arena: Arena) -> Outcome:
    left, right = left.doit(), right.doit()
    difference = left - right
    if difference == 0:
        return Outcome(True, "equal by computer algebra")
    if left in _INFINITE or right in _INFINITE:
        defined = sp.nan not in (left, right) and sp.zoo not in (left, right)
        return Outcome(False if defined else None, "an infinite value against another")
    if difference.has(*_UNEVALUATED):
        return Outcome(None, "computer algebra finds no closed form")
    if _differs(difference, arena):
        return Outcome(False, "different values by computer algebra")
    if sp.simplify(difference) == 0:
        return Outcome(True, "equal by computer algebra")
    return Outcome(None, "not decided by computer algebra")


def _differs(difference: Any, arena: Arena) -> bool:
    """Tell whether a value at a keyed point is certainly not zero."""
    names = {str(symbol): symbol for symbol in difference.free_symbols}
    for trial in range(_POINTS):
        point = arena.point(names, 2 * trial)
        value = difference.subs(
            {
                symbol: sp.Integer(1 + trial)
                if symbol.is_integer
                else sp.Rational(point[name].numerator, point[name].denominator)
                for name, symbol in names.items()
            }
        ).evalf(_DIGITS)
        if value.is_comparable or value.is_number:
            real, imaginary = value.as_real_imag()
            if max(abs(real), abs(imaginary)) > sp.Float(10) ** (-_DIGITS // 2):
                return True
    return False


def _compare_matrices(left: Any, right: Any, arena: Arena) -> Outcome:
    if not (isinstance(left, sp.MatrixBase) and isinstance(right, sp.MatrixBase)):
        return Outcome(False, "a matrix against a value")
    if left.shape != right.shape:
        return Outcome(False, "matrices of different shape")
    outcomes = [_compare_values(x, y, arena) for x, y in zip(left, right, strict=True)]
    undecided = [outcome for outcome in outcomes if outcome.equal is None]
    if any(outcome.equal is False for outcome in outcomes):
        return Outcome(False, "an element differs by computer algebra")
    return undecided[0] if undecided else Outcome(True, "equal element by element")


# Sets of real numbers


def _as_set(node: Node, builder: Builder) -> Any:
    match node:
        case Relation(sides, ("in",)):
            return _as_set(sides[1], builder)
        case Relation(sides, operators):
            values = [builder.build(side) for side in sides]
            pairs = zip(operators, pairwise(values), strict=True)
            return reduce(sp.Intersection, [_solutions(name, *pair) for name, pair in pairs])
        case Bracketed(opening, closing, (lower, upper)):
            ends = builder.build(lower), builder.build(upper)
            return sp.Interval(*ends, opening == "(", closing == ")")
        case SetOf(items):
            return sp.FiniteSet(*map(builder.build, items))
        case Combined(operation, left, right):
            join = sp.Complement if operation == "setminus" else sp.Intersection
            return join(_as_set(left, builder), _as_set(right, builder))
        case Union(parts) | Listing(parts, False):
            return reduce(sp.Union, [_as_set(part, builder) for part in parts])
    raise NotBuilt(f"{type(node).__name__.lower()} is no set of numbers")


def _solutions(name: str, left: Any, right: Any) -> Any:
    """Return the real numbers for which a relation of one variable holds."""
    relation = _RELATIONS[name](left, right)
    if relation in (sp.true, sp.false):
        return sp.S.Reals if relation == sp.true else sp.EmptySet
    solutions = sp.solveset(relation, *relation.free_symbols, domain=sp.S.Reals)
    if solutions.has(sp.ConditionSet):
        raise NotBuilt("an inequality that is not solved")
    return solutions


def _compare_sets(left: Any, right: Any) -> Outcome:
    difference = sp.EmptySet if left == right else left.symmetric_difference(right)
    if difference == sp.EmptySet:
        return Outcome(True, "the same set")
    if isinstance(difference, sp.FiniteSet) and any(e.is_Rational for e in difference):
        return Outcome(False, "different sets")
    if left.is_subset(right) is False or right.is_subset(left) is False:
        return Outcome(False, "different sets")
    return Outcome(None, "sets that are not compared")


# Equations


def _compare_equations(a: Relation, b: Relation, builder: Builder) -> Outcome:
    """Compare zero sets of polynomials: the same factors, and none of them in a denominator."""
    fractions = []
    for relation in (a, b):
        left, right = map(builder.build, relation.sides)
        fractions.append(sp.fraction(sp.together(left - right)))
    variables = sorted(fractions[0][0].free_symbols | fractions[1][0].free_symbols, key=str)
    if not variables:
        return Outcome(None, "equations without variables")
    parts = [_zeros(top, bottom, variables) for top, bottom in fractions]
    if parts[0] == parts[1]:
        return Outcome(True, "equations with the same solutions")
    if len(variables) == 1:
        return _compare_sets(*(sp.solveset(top, variables[0], sp.S.Reals) for top, _ in fractions))
    return Outcome(None, "equations that are not compared")


def _zeros(top: Any, bottom: Any, variables: list[Any]) -> Any:
    """Return the square-free polynomial of an equation `top / bottom = 0`."""
    polynomial = sp.Poly(top, *variables)
    if bottom.free_symbols:
        common = sp.groebner([polynomial, sp.Poly(bottom, *variables)], *variables)
        if common.exprs != [1]:
            raise NotBuilt("an equation with a pole")
    factors = [factor for factor, _ in polynomial.sqf_list()[1]]
    return math.prod(factors, start=sp.Poly(1, *variables)).monic()
