"""How one answer may be read before it is compared: inequalities as sets, equations as values."""

from __future__ import annotations

from functools import partial, reduce
from operator import itemgetter

from eapo_fast.rewards.tree import (
    INFINITY,
    LEAVES,
    REALS,
    Bracketed,
    Call,
    Combined,
    Constant,
    Listing,
    Node,
    Number,
    Power,
    Product,
    Quotient,
    Ratio,
    Relation,
    SetOf,
    Signed,
    Sum,
    Symbol,
    Text,
    Union,
    negated,
    rebuilt,
    symbols,
    walk,
)

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
"""Relations that are compared, and what they become when their sides change places."""
_OF_SETS = (Relation, Union, Combined)
_FUNCTION_NAMES = frozenset("fghpqrFGHPQRWP")


def plain(node: Node) -> Node:
    """Expand plus-minus into a list and inequalities into intervals."""
    if isinstance(node, (Listing, SetOf)):
        items = [part for item in node.items for part in _spread(item)]
        if isinstance(node, SetOf):
            return SetOf(tuple(items))
        return _conditions(items, node.joined) or Listing(tuple(items), node.joined)
    if isinstance(node, Relation):
        return interval(node) or node
    if isinstance(node, (Union, Combined)):
        return rebuilt(node, lambda part: plain(part) if isinstance(part, _OF_SETS) else part)
    if isinstance(node, Product):
        node = _without_label(node)
    if isinstance(node, Sum):
        node = _without_members(node)
    spread = _spread(node)
    return spread[0] if len(spread) == 1 else Listing(tuple(spread))


def _conditions(items: list[Node], joined: bool) -> Node | None:
    """Read a list of inequalities as one set, or as one set for each of several variables."""
    intervals = [interval(item) for item in items]
    parts = tuple(part for part in intervals if part is not None)
    if len(parts) < len(items):
        return None
    names = [min(symbols(item), default="") for item in items]
    if len(set(names)) == len(names):
        return Bracketed(
            "(",
            ")",
            tuple(part for _, part in sorted(zip(names, parts, strict=True), key=itemgetter(0))),
        )
    if all(isinstance(part, Combined) for part in parts) or (joined and len(set(names)) == 1):
        return reduce(partial(Combined, "cap"), parts)
    return None if joined else Union(parts)


def _without_label(node: Product) -> Node:
    """Return the point of `A(1, 2)`."""
    match node.factors:
        case (Symbol(name), Bracketed("(", ")", items) as point) if (
            name.isupper() and len(items) > 1
        ):
            return point
        case _:
            return node


def _without_members(node: Sum) -> Node:
    """Read `R - {3}` as a difference of sets."""
    match node.terms:
        case (left, Product((Number(), SetOf() as right))) if isinstance(left, (Bracketed, Union)):
            return Combined("setminus", left, right)
        case _:
            return node


def _spread(node: Node) -> list[Node]:
    if isinstance(node, LEAVES) or not any(isinstance(part, Signed) for part in walk(node)):
        return [node]
    return [_with_sign(node, 1), _with_sign(node, -1)]


def _with_sign(node: Node, sign: int) -> Node:
    """Replace every plus-minus by one of its signs (the upper signs belong together)."""
    if isinstance(node, Signed):
        inner = _with_sign(node.operand, sign)
        return inner if node.sign * sign > 0 else negated(inner)
    return rebuilt(node, lambda part: _with_sign(part, sign))


def interval(node: Node) -> Node | None:
    """Read `x > 5`, `1 < x <= 2` and `x in S` as the set they describe."""
    if not isinstance(node, Relation):
        return None
    sides, operators = node.sides, node.operators
    if operators == ("in",) and is_name(sides[0]):
        return sides[1]
    if operators == ("!=",) and isinstance(sides[0], Symbol) and is_constant(sides[1]):
        return Combined("setminus", REALS, SetOf((sides[1],)))
    if any(operator not in ("<", "<=", ">", ">=") for operator in operators):
        return None
    if len(sides) == 2 and isinstance(sides[1], Symbol):
        sides, operators = (sides[1], sides[0]), (FLIPPED[operators[0]],)
    if len(sides) == 2 and isinstance(sides[0], Symbol) and is_constant(sides[1]):
        closed = "=" in operators[0]
        if operators[0].startswith("<"):
            return Bracketed("(", "]" if closed else ")", (negated(INFINITY), sides[1]))
        return Bracketed("[" if closed else "(", ")", (sides[1], INFINITY))
    return _boundedinterval(sides, operators)


def _boundedinterval(sides: tuple[Node, ...], operators: tuple[str, ...]) -> Node | None:
    if len(sides) != 3 or not is_name(sides[1]):
        return None
    if not (is_constant(sides[0]) and is_constant(sides[2])):
        return None
    if {operator[0] for operator in operators} == {">"}:
        sides, operators = sides[::-1], operators[::-1]
    elif {operator[0] for operator in operators} != {"<"}:
        return None
    opening = "[" if "=" in operators[0] else "("
    closing = "]" if "=" in operators[1] else ")"
    return Bracketed(opening, closing, (sides[0], sides[2]))


def is_constant(node: Node) -> bool:
    return not any(isinstance(part, (Symbol, Relation)) for part in walk(node))


def is_name(node: Node) -> bool:
    """Tell whether a side names the answer: `x`, `f(x)`, `(x, y)`, `\\text{Area}`, `AB / CD`."""
    match node:
        case Symbol() | Text():
            return True
        case Product((Symbol(), Symbol("t"))):
            return True
        case Product((Symbol(name), Symbol() | Constant())):
            return name.rstrip("'") in _FUNCTION_NAMES or _is_measure(node)
        case Product((Power(Symbol(name), _), Symbol())):
            return name in _FUNCTION_NAMES
        case Product((Symbol(name), Bracketed("(", ")", items))):
            return name in _FUNCTION_NAMES and all(isinstance(item, Symbol) for item in items)
        case Quotient(Product((Symbol("d"), Symbol())), Product((Symbol("d"), Symbol()))):
            return True
        case Product(factors):
            return all(isinstance(factor, Symbol) for factor in factors)
        case Bracketed(_, _, items):
            return all(isinstance(item, Symbol) for item in items)
        case _:
            return _is_measure(node)


def _is_measure(node: Node) -> bool:
    """Tell a length, area or ratio of such: capital letters only, as in `|AB|`, `S_1 : S_2`."""
    match node:
        case Symbol(name):
            return name[0].isupper()
        case Product(parts) | Ratio(parts):
            return all(map(_is_measure, parts))
        case Quotient(top, bottom):
            return _is_measure(top) and _is_measure(bottom)
        case Call("abs", (operand,)):
            return _is_measure(operand)
        case _:
            return False


def assigned(node: Node) -> Node:
    """Return the value of `name = value`; of a chain of constants the last."""
    if not isinstance(node, Relation) or any(o not in ("=", "approx") for o in node.operators):
        return node
    if node.operators[-1] == "approx" and not (len(node.sides) == 2 and is_name(node.sides[0])):
        shorter = node.sides[:-1]
        return assigned(Relation(shorter, node.operators[:-1])) if len(shorter) > 1 else shorter[0]
    if is_name(node.sides[0]):
        return node.sides[-1]
    if is_name(node.sides[-1]):
        return node.sides[0]
    return node.sides[-1] if all(is_constant(side) for side in node.sides) else node
