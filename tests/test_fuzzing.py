"""The fuzzing itself: it finds what it is there to find."""

from __future__ import annotations

import json
import os
import time

import pytest

from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, parse_json, parse_yaml
from tests.support.fuzzing import FULL, QUICK, check, mutated, outcomes


def faulty(content: bytes) -> None:
    if content == b"crash":
        os._exit(3)
    if content == b"hang":
        time.sleep(60)
    if content == b"memory":
        bytearray(8 << 30)
    if content == b"refuse":
        raise UserError("x: not this")
    if content == b"lines":
        raise UserError("x:\nnot this")


def test_every_kind_of_fault_is_found():
    inputs = [b"good", b"crash", b"hang", b"memory", b"refuse", b"lines"]
    kinds = [outcome.kind for _, outcome in outcomes(faulty, inputs, seconds=2.0)]
    assert kinds == ["taken", "crashed", "hung", "raised", "refused", "bad message"]
    with pytest.raises(AssertionError, match="1 of 2 inputs"):
        check(faulty, [b"good", b"memory"])


def test_mutations_are_the_same_for_the_same_seed_and_differ_from_the_examples():
    made = list(mutated([b"abc" * 100], 50, seed=1))
    assert made == list(mutated([b"abc" * 100], 50, seed=1)) != list(mutated([b"abc" * 100], 50, seed=2))
    assert sum(each != b"abc" * 100 for each in made) > 45


def both(content: bytes) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(content)
        except Malformed as error:
            assert "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize("count", [QUICK, pytest.param(FULL, marks=pytest.mark.slow)])
def test_json_and_yaml_are_taken_or_refused_in_a_line(count: int):
    value = {
        "a": [1, 2.5, None, True, "caf\N{LATIN SMALL LETTER E WITH ACUTE}"],
        "b": {"c": {"d": "x" * 100}},
        "e": "2026-01-01",
    }
    yaml = b"a: &a [1, ~, on]\nb: {<<: {x: 1}, c: *a}\nd: >\n  folded\n  text\ne: 2026-01-01 10:00:00\nf: !!binary aGk="
    counts = check(
        both, mutated([json.dumps(value).encode(), yaml], count, seed=0, words=[b"&a ", b"*a", b"<<: ", b"!!set "])
    )
    assert counts.total() == count
