"""What a cut leaves of a row, without sorting it: the border between kept and lost tokens.

Tokens are ranked by logit, equals by id, and a cut keeps the first ones. The border is the logit of
the first token that is lost, found by narrowing a bracket of float32 numbers around it: each read
of the row sums up what lies above eight numbers of the bracket. Once the bracket holds `ROOM`
tokens or fewer, another read puts them aside, in order, and the search goes on among them alone.
All sums have a fixed order; no program reads what another one writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eapo_fast.kernels.linear_token_stats.triton_logits import entries
from eapo_fast.kernels.triton_functions import LOG2E

WAYS = tl.constexpr(8)
"""Parts that a bracket is cut into by one read of the row."""
EVEN_ROUNDS = tl.constexpr(4)
"""Reads that cut it into parts of equal width; later ones halve what numbers there are."""
MARGIN = tl.constexpr(1.0)
"""Nats that the first bracket is longer than it has to be, for sums that are rounded."""


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """int32 in the order of the floats; one key for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    """The float of an int64 key."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _border(low):  # type: ignore[no-untyped-def]
    """The float of the key of a border; -1 would be the other zero, which equals the first."""
    return _value(tl.where(low == -1, low - 1, low))


@triton.jit
def _weight(y, top, kept):  # type: ignore[no-untyped-def]
    """exp(y - top) and y - top where `kept`, else 0."""
    distance = tl.where(kept, y - top, 0.0)
    return tl.where(kept, tl.exp2(distance * LOG2E), 0.0), distance


@triton.jit
def _cuts(low, high, turn):  # type: ignore[no-untyped-def]
    """Keys [WAYS] that cut [low, high), rising from `low` on."""
    way = tl.arange(0, WAYS)
    least = _value(low)
    width = _value(high) - least
    even = _key(least + width * (way.to(tl.float32) / WAYS)).to(tl.int64)
    step = (high - low + (WAYS - 1)) // WAYS
    found = tl.where(turn < EVEN_ROUNDS, even, low + way * step)
    found = tl.minimum(tl.maximum(found, low), high)
    return tl.where(way == 0, low, found)


@triton.jit  # type: ignore[untyped-decorator]
def _narrowed(  # type: ignore[no-untyped-def]
    row,
    size,
    bias,
    inverse,
    cap,
    low,
    high,
    inside,
    above,
    others,
    top,
    wanted,
    most,
    enough,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Narrow [low, high) around the first key that is lost, to `enough` tokens or a single key.

    A key is lost if tokens with it and above weigh `wanted` or are more than `most`. `above` and
    `others` are weight and number of the tokens from `high` on, `inside` is the number of those
    within; the row need not hold those from the first `high` on.
    """
    first_above = above
    first_others = others
    if not RAW:
        first_above = 0.0
        first_others = 0.0
    turn = 0
    while (high - low > 1) & (inside > enough):
        cut = _cuts(low, high, turn)
        border = tl.minimum(cut, 0x7FFFFFFF).to(tl.int32)
        mass = tl.zeros([WAYS, BLOCK], tl.float32)
        number = tl.zeros([WAYS, BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            _, y = entries(row, start, size, bias, inverse, cap, BIAS, CAP, RAW, BLOCK)
            weight, _ = _weight(y, top, y > float("-inf"))
            passed = (_key(y)[None, :] >= border[:, None]) & (y > float("-inf"))[None, :]
            mass += tl.where(passed, weight[None, :], 0.0)
            number += passed.to(tl.float32)
        masses = first_above + tl.sum(mass, 1)
        numbers = first_others + tl.sum(number, 1)
        lost = (cut == low) | (masses >= wanted) | (numbers > most)
        lost = lost & (cut < high)
        within = tl.min(tl.where(lost, numbers, float("inf")), 0)
        above = tl.max(tl.where(lost, above, tl.where(cut < high, masses, above)), 0)
        others = tl.max(tl.where(lost, others, tl.where(cut < high, numbers, others)), 0)
        low, high = (
            tl.max(tl.where(lost, cut, low), 0),
            tl.min(tl.where(lost, high, cut), 0),
        )
        inside = within - others
        turn += 1
    return low, high, inside, above, others


@triton.jit
def _ties(y, equal, above, others, top, wanted, most, floor):  # type: ignore[no-untyped-def]
    """How many of `equal` tokens with this y are kept beside those above them."""
    weight, _ = _weight(y, top, equal > 0.0)
    fits = above + equal * weight < wanted
    room = tl.where(fits, 0.0, (wanted - above) / tl.where(weight > 0.0, weight, 1.0))
    count = tl.minimum(tl.floor(room), equal)
    count = tl.where(above + count * weight >= wanted, count - 1.0, count)
    count = tl.where(fits, equal, count)
    return tl.where(y < floor, 0.0, tl.maximum(tl.minimum(count, most - others), 0.0))


@triton.jit
def _bracket(top, bottom, mass, vocab, share, floor):  # type: ignore[no-untyped-def]
    """Keys [low, high) around the first one that is lost, from what is known of the row.

    What is lost weighs at least (1 - share) of the mass, and its first token the most. Nothing
    may be lost: then `low` lies below all tokens.
    """
    high = _key(top).to(tl.int64) + 1
    lightest = tl.log(tl.maximum(1.0 - share, 0.0) * mass / vocab) - MARGIN
    bound = _key(top + lightest).to(tl.int64) - 1
    low = _key(tl.maximum(floor, bottom)).to(tl.int64) - 1
    low = tl.maximum(low, tl.where((share <= 1.0) & (bound < high), bound, low))
    return tl.where(mass == mass, low, high - 1), high


@triton.jit  # type: ignore[untyped-decorator]
def _passed(  # type: ignore[no-untyped-def]
    row, aside, names, bias, vocab, inverse, cap, top, low, high, ties,
    BIAS: tl.constexpr, CAP: tl.constexpr, SEARCH: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Mass and moment of the tokens from `high` on; those of [low, high) are put aside in order.

    Also how many there are, and the id of the last of the first `ties` of them.
    """
    masses = tl.zeros([ROOM], tl.float32)
    moments = tl.zeros([ROOM], tl.float32)
    last = -1
    count = 0
    for start in range(0, vocab, ROOM):
        column, y = entries(row, start, vocab, bias, inverse, cap, BIAS, CAP, False, ROOM)
        key = _key(y)
        real = y > float("-inf")
        weight, distance = _weight(y, top, real & (key >= high))
        masses += weight
        moments += weight * distance
        if SEARCH:
            own = real & (key >= low) & (key < high)
            place = count + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(aside + place, y, mask=own & (place < ROOM))
            tl.store(names + place, column, mask=own & (place < ROOM))
            last = tl.maximum(last, tl.max(tl.where(own & (place < ties), column, -1), 0))
            count += tl.sum(own.to(tl.int32), 0)
    return tl.sum(masses, 0), tl.sum(moments, 0), count, last


@triton.jit  # type: ignore[untyped-decorator]
def truncate(  # type: ignore[no-untyped-def]
    row,
    aside,  # [ROOM] fp32
    names,  # [ROOM] int32
    bias,
    vocab,
    inverse,
    cap,
    top,
    bottom,
    mass,
    share,  # of the mass that the kept tokens stay below; inf: no such cut
    most,  # kept tokens; inf: no such cut
    reach,  # ln of the least share of the largest p that is kept; -inf: no such cut
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SEARCH: tl.constexpr,  # whether there is more to a cut than `reach`
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mass and moment of the kept tokens, relative to the largest; the border and the last id.

    Kept are the tokens above the border, and those at it up to that id.
    """
    floor = top + reach
    wanted = share * mass
    low = _key(tl.maximum(floor, bottom)).to(tl.int64) - 1
    high = low + 1
    inside = 0.0
    above = 0.0
    others = 0.0
    ties = 0.0
    if SEARCH:
        low, high = _bracket(top, bottom, mass, vocab, share, floor)
        low, high, inside, above, others = _narrowed(
            row, vocab, bias, inverse, cap, low, high, vocab + 0.0, above, others, top, wanted,
            most, ROOM + 0.0, BIAS, CAP, False, BLOCK,
        )  # fmt: skip
        ties = _ties(_border(low), inside, above, others, top, wanted, most, floor)
    kept, moment, count, last = _passed(
        row, aside, names, bias, vocab, inverse, cap, top, low, high, ties, BIAS, CAP, SEARCH, ROOM
    )
    least = _border(low)
    if SEARCH:
        if high - low > 1:
            tl.debug_barrier()
            low, high, inside, above, others = _narrowed(
                aside, count, bias, inverse, cap, low, high, inside, above, others, top, wanted,
                most, 1.0, BIAS, CAP, True, BLOCK,
            )  # fmt: skip
            place = tl.arange(0, ROOM)
            y = tl.load(aside + place, mask=place < count, other=float("-inf"))
            name = tl.load(names + place, mask=place < count, other=-1)
            key = _key(y)
            own = (place < count) & (key >= low) & (key < high)
            weight, distance = _weight(y, top, (place < count) & (key >= high))
            kept += tl.sum(weight, 0)
            moment += tl.sum(weight * distance, 0)
            least = tl.max(tl.where(own, y, _border(low)), 0)
            ties = _ties(least, inside, above, others, top, wanted, most, floor)
            rank = tl.cumsum(own.to(tl.int32), 0)
            last = tl.max(tl.where(own & (rank <= ties), name, -1), 0)
        one, far = _weight(least, top, ties > 0.0)
        kept += ties * one
        moment += ties * one * far
    broken = mass != mass
    return tl.where(broken, mass, kept), tl.where(broken, mass, moment), least, last


@triton.jit
def kept_of(y, column, least, last):  # type: ignore[no-untyped-def]
    """Whether tokens are on the kept side of a border."""
    return (y > float("-inf")) & ((y > least) | ((y == least) & (column <= last)))
