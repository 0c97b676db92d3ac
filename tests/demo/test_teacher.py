from __future__ import annotations

import re

from eapo_fast.demo.chains import Chain, is_sound, keyed_generator, parse_steps
from eapo_fast.demo.problems import prompt_of
from eapo_fast.demo.teacher import Habits, Piece, Teacher, advice_text, draw_chain

CHAIN = Chain(id="x", steps=parse_steps(["48/2", "a+48", "3*4", "b+c"]))


def write(habits: Habits, seed: int, chain: Chain = CHAIN) -> list[Piece]:
    return Teacher(chain, habits, keyed_generator(seed, 0)).write()


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_clean_solution() -> None:
    expected = "a=48/2=24\nb=24+48=72\nc=3*4=12\nd=72+12=84\n\\boxed{84}"
    assert text(write(Habits(), 1)) == expected
    assert prompt_of(CHAIN) == "a=48/2;b=a+48;c=3*4;d=b+c?"


def test_advice_is_not_the_policys_text_and_is_copied() -> None:
    habits = Habits(slip=1.0, asking=1.0, ask=(1.0, 1.0), ask_ahead=0.5)
    blocks = 0
    for seed in range(200):
        pieces = write(habits, seed)
        joined = text(pieces)
        assert all(p.text.startswith("<advice>") == (not p.own) for p in pieces)
        for query, reply, value in re.findall(
            r"<consult><q>([^<]+)</q></consult><advice><a i=\"1\">(\d+)</a></advice>(\d+)", joined
        ):
            blocks += 1
            assert value == reply
            assert f"={query}=" in joined
    assert blocks > 50


def test_declined_consults_and_blocks_of_several_queries_occur() -> None:
    habits = Habits(asking=1.0, ask=(0.5, 0.5), ask_ahead=0.5)
    joined = "".join(text(write(habits, seed)) for seed in range(100))
    assert "<advice>unavailable</advice>" in joined
    assert '<a i="2">' in joined
    assert '<a i="1">unavailable</a>' in joined


def test_slips_are_carried_on() -> None:
    lines = text(write(Habits(slip=1.0, off_by_one=1.0), 2)).splitlines()
    assert lines[0] == "a=48/2=25"
    assert lines[1] == "b=25+48=74"


def test_advice_text_follows_the_protocol() -> None:
    assert advice_text(["72"]) == '<advice><a i="1">72</a></advice>'
    assert advice_text(["", ""]) == "<advice>unavailable</advice>"
    assert advice_text(["", "7"]) == '<advice><a i="1">unavailable</a><a i="2">7</a></advice>'


def test_drawn_chains_stay_in_their_limits() -> None:
    for index in range(50):
        chain = draw_chain(keyed_generator(1, index), 6, max_value=99)
        assert len(chain.steps) == 6
        assert all(1 <= value <= 99 for value in chain.values)
    assert is_sound(CHAIN, max_value=99)
