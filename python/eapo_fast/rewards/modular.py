"""Identity of rational functions, by evaluation modulo a random prime at a random point.

Prime and point are drawn from a hash of both answers, so no answer can be made for them. `pi` and
`e` are transcendental and act as variables. Unequal values prove different functions; that equal
values hide different functions of degree d, or integers of b bits, has a chance below
`(d + b) / 2^110`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from eapo_fast.rewards.limits import Meter
from eapo_fast.rewards.tree import (
    Call,
    Constant,
    Node,
    Number,
    Numeral,
    Percent,
    Power,
    Product,
    Quantity,
    Quotient,
    Sum,
    Symbol,
)
from eapo_fast.rewards.values import Inexact, Undefined

_PRIME_BITS = 127
_LARGEST_DEGREE = 1 << 40
_LARGEST_FACTORIAL = 1000

Residue = tuple[int, int]
"""A value modulo the prime, and a bound of the degrees of its numerator and denominator."""


@dataclass(frozen=True, slots=True)
class Field:
    """A prime field and a point in it, drawn for one pair of answers."""

    key: str
    prime: int
    root_of_minus_one: int

    def at(self, trial: int) -> Field:
        """Return the same field with another point."""
        return replace(self, key=f"{self.key}\0{trial}")

    def value(self, name: str) -> int:
        """Return the value of a variable."""
        return int.from_bytes(_digest(f"{self.key}\0{name}"), "big") % self.prime

    def residue(self, node: Node, meter: Meter) -> Residue:
        """Evaluate a rational function.

        Raises:
            Inexact: It is no rational function, or its degree is too large for a random point.
            Undefined: A denominator is zero (certainly, but for a chance of `degree / prime`).
            Unreadable: The work exceeds the meter.
        """
        meter.spend(2)
        match node:
            case Number() | Numeral():
                return self._ratio((node.value.numerator, 0), (node.value.denominator, 0))
            case Symbol(name):
                return self.value(name), 1
            case Constant("i"):
                return self.root_of_minus_one, 0
            case Constant(("pi" | "e") as name):
                return self.value(f"\\{name}"), 1
            case Sum(terms):
                parts = [self.residue(term, meter) for term in terms]
                return sum(value for value, _ in parts) % self.prime, _checked(
                    sum(degree for _, degree in parts)
                )
            case Product(factors):
                result, degree = 1, 0
                for factor in factors:
                    value, more = self.residue(factor, meter)
                    result, degree = result * value % self.prime, _checked(degree + more)
                return result, degree
            case Quotient(top, bottom):
                return self._ratio(self.residue(top, meter), self.residue(bottom, meter))
            case Percent(operand):
                return self._ratio(self.residue(operand, meter), (100, 0))
            case Quantity(operand, _):
                return self.residue(operand, meter)
            case Power(base, Number(exponent)) if exponent.denominator == 1:
                return self._power(self.residue(base, meter), exponent.numerator, meter)
            case Call("factorial", (Number(argument),)):
                return self._factorial(argument, meter), 0
        raise Inexact

    def _ratio(self, top: Residue, bottom: Residue) -> Residue:
        if not bottom[0] % self.prime:
            raise Undefined("division by zero")
        value = top[0] * pow(bottom[0], -1, self.prime) % self.prime
        return value, _checked(top[1] + bottom[1])

    def _power(self, base: Residue, count: int, meter: Meter) -> Residue:
        value, degree = base
        if not value and count <= 0:
            raise Undefined("zero to a power that is not positive")
        meter.spend(count.bit_length())
        return pow(value, count, self.prime), _checked(max(degree, 1) * abs(count))

    def _factorial(self, argument: object, meter: Meter) -> int:
        if argument not in range(_LARGEST_FACTORIAL + 1):
            raise Inexact
        result = 1
        for factor in range(2, int(argument) + 1):  # type: ignore[call-overload]
            result = result * factor % self.prime
            meter.spend()
        return result


def draw_field(key: str) -> Field:
    """Draw a prime that is 1 modulo 4, so that -1 has a root, and the key of a point."""
    import flint

    candidate = int.from_bytes(_digest(key), "big") | 1 << (_PRIME_BITS - 1)
    candidate &= (1 << _PRIME_BITS) - 4
    candidate += 1
    while not flint.fmpz(candidate).is_probable_prime():
        candidate += 4
    root, base = 1, 2
    while root * root % candidate != candidate - 1:
        root = pow(base, (candidate - 1) // 4, candidate)
        base += 1
    return Field(key, candidate, root)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(
        text.encode(errors="surrogatepass"), digest_size=(_PRIME_BITS + 7) // 8
    ).digest()


def _checked(degree: int) -> int:
    if degree > _LARGEST_DEGREE:
        raise Inexact
    return degree
