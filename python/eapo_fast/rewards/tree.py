"""The syntax tree of an answer: what the grammar builds and the comparison reads.

Nodes are plain values without behaviour, so a tree is safe to cache and to share. Their size is
bounded by the grammar's limits; nothing in a tree is ever evaluated as code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


class Unreadable(Exception):
    """A text is not an answer of the grammar, or exceeds its limits; the message says why."""


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational literal."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a written base, as `52_8`."""

    digits: str
    base: int

    @property
    def value(self) -> Fraction:
        """The number meant."""
        return Fraction(int(self.digits, self.base))


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, its subscript included."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """One of `pi`, `e`, `i`, `inf`."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    """Terms added up; a subtracted term is a product with -1."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """Factors multiplied."""

    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Quotient:
    """A fraction."""

    top: Node
    bottom: Node


@dataclass(frozen=True, slots=True)
class Power:
    """Base and exponent."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Call:
    """A known function: `root` takes (radicand, degree), `log` takes (argument, base)."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """A `sum`, `prod`, `int` or `lim` over a variable, which is bound unless there are no bounds.

    `bounds` are (lower, upper) of a sum, product or definite integral, (target,) of a limit, and
    empty for an antiderivative.
    """

    name: str
    body: Node
    variable: str
    bounds: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Signed:
    """A term behind a plus-minus (`sign` +1) or minus-plus (-1) sign."""

    sign: int
    operand: Node


@dataclass(frozen=True, slots=True)
class Percent:
    """A number of hundredths."""

    operand: Node


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with the unit written behind it; a degree mark is the unit `degree`."""

    operand: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Text:
    """Words: a name, a direction, a choice letter."""

    text: str


@dataclass(frozen=True, slots=True)
class Bracketed:
    """A tuple, point, vector or interval; the brackets are kept."""

    opening: str
    closing: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Items without brackets: "1, 2", "1 or 2"; `joined` is true when "and" joins them."""

    items: tuple[Node, ...]
    joined: bool = False


@dataclass(frozen=True, slots=True)
class SetOf:
    """A set given by its members."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of equal length."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Union:
    """Intervals or sets joined."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Combined:
    """A set without (`setminus`) another one, or what both have (`cap`)."""

    operation: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Ratio:
    """A proportion such as 2:3:4."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain `side op side op side`; operators are `= < <= > >= != in approx`."""

    sides: tuple[Node, ...]
    operators: tuple[str, ...]


Node: TypeAlias = (
    Number
    | Numeral
    | Symbol
    | Constant
    | Sum
    | Product
    | Quotient
    | Power
    | Call
    | Operator
    | Signed
    | Percent
    | Quantity
    | Text
    | Bracketed
    | Listing
    | SetOf
    | Matrix
    | Union
    | Combined
    | Ratio
    | Relation
)

COLLECTIONS = (Bracketed, Listing, SetOf, Matrix, Union, Combined, Ratio, Relation)
"""Nodes that are not a single value."""

LEAVES = (Number, Numeral, Symbol, Constant, Text)
"""Nodes without parts."""

INFINITY = Constant("inf")
MINUS_ONE = Number(Fraction(-1))
REALS = Bracketed("(", ")", (Product((MINUS_ONE, INFINITY)), INFINITY))


def negated(node: Node) -> Node:
    """Return minus the node; a literal changes its sign in place."""
    if isinstance(node, Number):
        return Number(-node.value)
    return Product((MINUS_ONE, node))


def children(node: Node) -> tuple[Node, ...]:
    """Return the direct parts of a node, left to right."""
    match node:
        case Sum(parts) | Product(parts) | Call(_, parts) | SetOf(parts) | Union(parts):
            return parts
        case Quotient(left, right) | Power(left, right) | Combined(_, left, right):
            return left, right
        case Operator(_, body, _, bounds):
            return body, *bounds
        case Signed(_, operand) | Percent(operand) | Quantity(operand, _):
            return (operand,)
        case Bracketed(_, _, items) | Listing(items) | Ratio(items) | Relation(items, _):
            return items
        case Matrix(rows):
            return tuple(item for row in rows for item in row)
        case _:
            return ()


def rebuilt(node: Node, change: Callable[[Node], Node]) -> Node:
    """Return the node with each of its direct parts changed."""

    def all_of(parts: tuple[Node, ...]) -> tuple[Node, ...]:
        return tuple(change(part) for part in parts)

    match node:
        case Sum(parts) | Product(parts) | SetOf(parts) | Union(parts) | Ratio(parts):
            return type(node)(all_of(parts))
        case Quotient(left, right) | Power(left, right):
            return type(node)(change(left), change(right))
        case Call(name, parts):
            return Call(name, all_of(parts))
        case Operator(name, body, variable, bounds):
            return Operator(name, change(body), variable, all_of(bounds))
        case Signed(sign, operand):
            return Signed(sign, change(operand))
        case Percent(operand):
            return Percent(change(operand))
        case Quantity(operand, unit):
            return Quantity(change(operand), unit)
        case Bracketed(opening, closing, parts):
            return Bracketed(opening, closing, all_of(parts))
        case Listing(parts, joined):
            return Listing(all_of(parts), joined)
        case Combined(operation, left, right):
            return Combined(operation, change(left), change(right))
        case Relation(parts, operators):
            return Relation(all_of(parts), operators)
        case Matrix(rows):
            return Matrix(tuple(map(all_of, rows)))
        case _:
            return node


def replaced(node: Node, old: Node, new: Node) -> Node:
    """Return the tree with one of its leaves replaced."""
    return new if node == old else rebuilt(node, lambda part: replaced(part, old, new))


def walk(node: Node) -> Iterator[Node]:
    """Yield the node and everything below it."""
    pending = [node]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(children(current))


def symbols(node: Node) -> set[str]:
    """Return the names of the free variables of a tree."""
    if isinstance(node, Symbol):
        return {node.name}
    if isinstance(node, Operator) and node.bounds:
        inner = symbols(node.body) - {node.variable}
        return inner.union(*map(symbols, node.bounds))
    names: set[str] = set()
    for child in children(node):
        names |= symbols(child)
    return names
