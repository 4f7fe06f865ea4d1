from __future__ import annotations

import os
from pathlib import Path

import pytest

from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, as_object, parse_json, parse_yaml, read_bytes, read_json, read_yaml

DEEP = 100_000


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'"caf\xe9"', "not UTF-8: byte 0xe9 at 4"),
        (b"[" * DEEP + b"]" * DEEP, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply"),
        (b"NaN", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"9" * 5000, "not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'["\\ud800"]', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
    ],
)
def test_json_that_is_none_or_no_file_could_hold_is_refused_in_a_line(content: bytes, reason: str):
    with pytest.raises(Malformed, match=reason) as refused:
        parse_json(content)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_json_is_read_with_and_without_a_byte_order_mark():
    assert (
        parse_json(b'\xef\xbb\xbf{"a": [1, "\xf0\x9f\xa6\x89"]}')
        == {"a": [1, "\N{OWL}"]}
        == parse_json('{"a": [1, "\\ud83e\\udd89"]}')
    )


def bomb(levels: int, merged: bool) -> str:
    lines = ["a0: &a0 {x: 1, y: 2}" if merged else "a0: &a0 [1, 2]"]
    for n in range(levels):
        each = f"*a{n}, *a{n}"
        lines.append(f"a{n + 1}: &a{n + 1} " + (f"{{<<: [{each}]}}" if merged else f"[{each}]"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [1", "not YAML"),
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("[" * DEEP, "nested too deeply"),
        ("a: &a [*a]", "line 1: contains an alias of itself"),
        (bomb(40, merged=False), "more than 1000000 values"),
        (bomb(40, merged=True), "more than 1000000 values"),
        ("!!python/object/apply:os.system [touch x]", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("when: 2026-13-45", "not YAML"),
        ("{[1]: 2}: 3", "not YAML"),
        (b"a: caf\xe9", "not UTF-8"),
        ("a:\t- 1\n\t- 2", "not YAML"),
        ("n: " + "9" * 5000, "not YAML"),
    ],
)
def test_yaml_that_is_none_or_a_bomb_is_refused_in_a_line(content: str | bytes, reason: str):
    with pytest.raises(Malformed, match=reason) as refused:
        parse_yaml(content)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_yaml_may_have_aliases_and_merged_keys_which_are_no_repetitions():
    text = "a: &a {x: 1, y: 1}\np: {b: &b {<<: *a, x: 2}}\nc: {<<: *b, y: 3}\nd: [*a, *a]"
    assert parse_yaml(text) == {
        "a": {"x": 1, "y": 1},
        "p": {"b": {"x": 2, "y": 1}},
        "c": {"x": 2, "y": 3},
        "d": [{"x": 1, "y": 1}] * 2,
    }


def test_a_file_is_named_and_only_an_ordinary_one_is_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"[1, 2, 3]")
    for name, reason in (("pipe", "not an ordinary file"), ("folder", "Is a directory"), ("none", "No such file")):
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            read_bytes(tmp_path / name)
    with pytest.raises(UserError, match="large: more than 8 bytes"):
        read_json(tmp_path / "large", limit=8)
    assert read_json(tmp_path / "large") == [1, 2, 3] == read_yaml(tmp_path / "large")
    (tmp_path / "large").write_bytes(b"[1, 2")
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match="large: not "):
            read(tmp_path / "large")
    with pytest.raises(UserError, match=r"x: expected an object, got \[1\]"):
        as_object([1], "x")


@pytest.mark.parametrize("text", ["1e999", "[-1e400]", '{"a": 1.0E+309}'])
def test_a_number_that_no_computer_keeps_is_refused_and_not_infinite(text: str):
    with pytest.raises(Malformed, match="larger than any number"):
        parse_json(text)


def test_utf_16_is_named():
    with pytest.raises(Malformed, match="not UTF-8 but UTF-16"):
        parse_json('{"a": 1}'.encode("utf-16"))


def test_a_number_that_python_does_not_show_is_refused():
    with pytest.raises(Malformed, match="a number of 36000 bits"):
        parse_yaml("a: 0x" + "f" * 9000)
