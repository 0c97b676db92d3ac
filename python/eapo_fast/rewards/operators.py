"""The grammar of sums, integrals and limits, rounding brackets and matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction

from eapo_fast.rewards.cursor import Cursor, nested
from eapo_fast.rewards.tree import (
    Call,
    Constant,
    Matrix,
    Node,
    Number,
    Operator,
    Product,
    Quotient,
    Relation,
    Sum,
    Symbol,
    Unreadable,
    replaced,
)

_MATRICES = frozenset(
    ("matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "smallmatrix", "array")
)


class Operators(Cursor, ABC):
    """Reads what has bounds or rows; a subclass reads the values in them."""

    @abstractmethod
    def sum(self) -> Node:
        """Read added terms."""

    @abstractmethod
    def product(self) -> Node:
        """Read multiplied factors."""

    @abstractmethod
    def argument(self) -> Node:
        """Read a LaTeX argument."""

    def chain(self, part: Callable[[], Node], mark: str) -> tuple[Node, ...]:
        """Read `part (mark part)*`."""
        parts = [part()]
        while self.accept(mark):
            parts.append(part())
        return tuple(parts)

    @nested
    def matrix(self, name: str) -> Node:
        """Read the rows of a matrix environment."""
        if name not in _MATRICES:
            raise Unreadable(f"unknown environment {name}")
        if name == "array" and self.at("{"):
            while not self.accept("}"):
                if self.advance().kind == "end":
                    raise Unreadable("unbalanced braces")
        rows: list[tuple[Node, ...]] = []
        while self.token.kind != "end":
            rows.append(self.chain(self.sum, "&"))
            if not self.accept("\\\\") or self.token.kind == "close":
                break
        if self.advance()[:2] != ("close", name):
            raise Unreadable(f"{name} is not closed")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("the rows of a matrix differ in length")
        matrix = Matrix(tuple(rows))
        return Call("det", (matrix,)) if name == "vmatrix" else matrix

    def rounding(self, name: str, closing: str) -> Node:
        """Read up to the closing bracket of a floor or ceiling."""
        content = self.sum()
        if self.advance()[:2] != ("command", closing):
            raise Unreadable(f"\\{closing} is missing")
        return Call(name, (content,))

    def operator(self, name: str) -> Node:
        """Read a sum, product, integral or limit with its bounds."""
        if name == "lim":
            return self.limit()
        lower = upper = None
        for _ in range(2):
            if self.accept("_"):
                lower = self.argument()
            elif self.accept("^"):
                upper = self.argument()
        if name == "int":
            return self.integral(() if lower is None or upper is None else (lower, upper))
        match lower:
            case Relation((Symbol(variable), first), ("=",)) if upper is not None:
                return Operator(name, self.product(), variable, (first, upper))
            case Relation((Constant("i" | "e" as letter), first), ("=",)) if upper is not None:
                body = replaced(self.product(), Constant(letter), Symbol(letter))
                return Operator(name, body, letter, (first, upper))
        raise Unreadable(f"\\{name} without bounds")

    def limit(self) -> Node:
        """Read `_{x to a} term`."""
        self.expect("_")
        self.expect("{")
        variable = self.advance()
        self.expect("to")
        target = self.sum()
        self.expect("}")
        if variable.kind != "symbol":
            raise Unreadable("a limit without a variable")
        return Operator("lim", self.product(), variable.text, (target,))

    def integral(self, bounds: tuple[Node, ...]) -> Node:
        """Read an integrand up to its differential; what is added behind it is added."""
        self.integrals += 1
        content = self.sum()
        self.integrals -= 1
        terms = list(content.terms) if isinstance(content, Sum) else [content]
        for index, term in enumerate(terms):
            found = _differential(term)
            if found is not None:
                integrand, variable = found
                body = Sum((*terms[:index], integrand)) if index else integrand
                value = Operator("int", body, variable, bounds)
                rest = terms[index + 1 :]
                return Sum((value, *rest)) if rest else value
        raise Unreadable("an integral without a differential")


def product_of(factors: list[Node]) -> Node:
    """Return the product of at least one factor."""
    return factors[0] if len(factors) == 1 else Product(tuple(factors))


def _differential(term: Node) -> tuple[Node, str] | None:
    """Split `f d x` into f and x; also `(dx / g)` into 1/g and x."""
    if isinstance(term, Quotient):
        found = _differential(term.top)
        return (Quotient(found[0], term.bottom), found[1]) if found else None
    factors = _flat(term)
    match factors:
        case [*rest, Symbol("d"), Symbol(name)]:
            return product_of(rest or [Number(Fraction(1))]), name
        case [*rest, Quotient() as last]:
            found = _differential(last)
            return (product_of([*rest, found[0]]), found[1]) if found else None
    return None


def _flat(node: Node) -> list[Node]:
    if not isinstance(node, Product):
        return [node]
    return [part for factor in node.factors for part in _flat(factor)]
