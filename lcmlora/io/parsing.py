"""Reading JSON and YAML that others wrote: within limits, with one line that says what is wrong with it."""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from lcmlora.errors import UserError
from lcmlora.io.terminal import joined, shown

JsonObject = dict[str, Any]  # an object of a JSON or YAML file that others wrote: any value may be of any type

MAX_BYTES = 64 << 20  # of a file that is read whole; the largest of ours, a manifest of 100,000 shards, has 20 MB
MAX_DEPTH = 64  # levels of lists and objects; Python's own limit depends on how deep the caller is

MAX_YAML = 4 << 20  # bytes of a YAML file, of which PyYAML reads 100,000 in a second
MAX_BITS = 14_000  # of an integer; Python shows none of over 4,300 digits, which YAML can write in hexadecimal
MAX_VALUES = 1_000_000  # of a YAML document
_LARGEST = 1 << 53  # of integers in settings; above it neither JSON nor a float has them all
_SHOWN = 200  # characters of a reason


class Malformed(ValueError):
    """The text is not what it should be. Its message is one line without the name of the file."""


def parse_json(content: bytes | str, *, nan_is_null: bool = False) -> Any:
    """Returns the value of a JSON document (RFC 8259: NaN and Infinity are refused, a byte order mark is passed over).

    Args:
        nan_is_null: read NaN and Infinity as null, since Python writes them for what a table of data lacks.

    Raises:
        Malformed: not UTF-8, no JSON, nested over MAX_DEPTH levels, an object that has a key twice, a number of
            thousands of digits, or half a surrogate pair, which no file or database takes.
    """
    text = decoded(content)
    try:
        value = _DECODERS[nan_is_null].decode(text)
    except RecursionError:
        raise Malformed(f"nested too deeply (at most {MAX_DEPTH} levels)") from None
    except Malformed:
        raise
    except ValueError as error:  # of json, and of int() for thousands of digits
        raise Malformed(f"not JSON: {joined(error, _SHOWN)}") from None
    check_value(value)
    return value


def parse_yaml(content: bytes | str) -> Any:
    """Returns the value of a YAML document, of plain data alone.

    Raises:
        Malformed: as `parse_json`; or aliases that make millions of values of a few lines, an alias of what contains
            it, or more than one document.
    """
    text = decoded(content)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, 1, {})  # before anything is built
        value = loader.construct_document(node)
    except RecursionError:
        raise Malformed(f"nested too deeply (at most {MAX_DEPTH} levels)") from None
    except Malformed:
        raise
    except Exception as error:  # PyYAML's constructors raise whatever a value leads to
        raise Malformed(f"not YAML: {joined(error, _SHOWN)}") from None
    check_value(value)
    return value


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Returns the content of an ordinary file.

    Raises:
        UserError: no such file, no ordinary one (a pipe would block for ever), not readable, or over `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a zero in the name
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path}: not an ordinary file")
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: more than {limit} bytes")
    return content


def read_json(path: Path, *, limit: int = MAX_BYTES) -> Any:
    """Returns the value in a JSON file. Raises UserError, which names the file."""
    try:
        return parse_json(read_bytes(path, limit=limit))
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None


def read_yaml(path: Path, *, limit: int = MAX_YAML) -> Any:
    """Returns the value in a YAML file. Raises UserError, which names the file."""
    try:
        return parse_yaml(read_bytes(path, limit=limit))
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None


def as_object(value: Any, place: str) -> JsonObject:
    """Returns the value if it is an object whose keys are texts. Raises UserError, which names the place, if not."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{place}: expected an object, got {joined(repr(value), _SHOWN)}")
    return value


def decoded(content: bytes | str) -> str:
    """Returns the text without a byte order mark. Raises Malformed where it is not UTF-8."""
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise Malformed("not UTF-8 but UTF-16, as some editors save text; save it as UTF-8") from None
        raise Malformed(f"not UTF-8: byte 0x{content[error.start]:02x} at {error.start}") from None


def check_value(value: Any) -> None:
    """Raises Malformed where it is nested over MAX_DEPTH levels, has half a surrogate pair in a text, or a number that
    Python does not show."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        following: list[Any] = []
        for each in level:
            if isinstance(each, str):
                if not each.isascii() and any("\ud800" <= c <= "\udfff" for c in each):
                    raise Malformed(f"half a surrogate pair in {ascii(each)[:_SHOWN]}")
            elif isinstance(each, int):
                if each.bit_length() > MAX_BITS:
                    raise Malformed(f"a number of {each.bit_length()} bits")
            elif isinstance(each, dict):
                following += each
                following += each.values()
            elif isinstance(each, list | tuple | set):
                following += each
        if not following:
            return
        level = following
    raise Malformed(f"nested too deeply (at most {MAX_DEPTH} levels)")


def check_plain(value: Any, where: str) -> None:
    """Raises UserError, which names the place, if a key is no text, or a value is one that no setting can have."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(
                    f"{where}: the key {shown(repr(key), 80)} is no text ({kind_of(key)}); put it in quotes"
                )
            check_plain(inner, f"{where}: {shown(key, 80)}" if where.count(": ") == 0 else f"{where}.{shown(key, 80)}")
    elif isinstance(value, list | tuple | set):
        for number, inner in enumerate(value):
            check_plain(inner, f"{where}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: got {value}: expected a finite number")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise UserError(f"{where}: got a number of {value.bit_length()} bits: expected one up to {_LARGEST}")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}: got {shown(repr(value), 200)}: a zero byte, which no name and no path has")
    elif not isinstance(value, str | int | float | None):
        raise UserError(f"{where}: got {shown(repr(value), 200)} ({kind_of(value)}): put it in quotes, if it is a text")


def kind_of(value: object) -> str:
    """Returns what kind of value it is, in words."""
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _size(node: yaml.Node, level: int, known: dict[int, int]) -> int:
    """Returns the number of values in a node with its aliases written out. Raises Malformed."""
    line = f"line {node.start_mark.line + 1}"
    if level > MAX_DEPTH:
        raise Malformed(f"{line}: nested too deeply (at most {MAX_DEPTH} levels)")
    if (size := known.get(id(node))) is not None:
        if not size:
            raise Malformed(f"{line}: contains an alias of itself")
        return size
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [each for pair in node.value for each in pair]
        keys: set[str] = set()
        for key, _ in node.value:
            # YAML takes the last of two equal keys, so that the first has no effect, and nobody notices.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise Malformed(f"line {key.start_mark.line + 1}: the key {ascii(key.value)[:_SHOWN]} stands twice")
                keys.add(key.value)
    size = 1 + sum(_size(each, level + 1, known) for each in inner)
    if size > MAX_VALUES:
        raise Malformed(f"{line}: more than {MAX_VALUES} values, with what its aliases stand for")
    known[id(node)] = size
    return size


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"the key {ascii(twice)[:_SHOWN]} stands twice in an object")
    return made


def _null(constant: str) -> None:
    return None


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise Malformed(f"not JSON: {digits[:_SHOWN]} is larger than any number that a computer keeps")
    return number


def _refused(constant: str) -> Any:
    raise Malformed(f"not JSON: {constant} is no number")


_DECODERS = {
    nan_is_null: json.JSONDecoder(
        parse_constant=_null if nan_is_null else _refused, parse_float=_finite, object_pairs_hook=_object
    )
    for nan_is_null in (False, True)
}
