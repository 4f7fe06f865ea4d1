"""The small JSON files of a base, as diffusers and transformers write them: read, and checked value by value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject, Malformed, as_object, parse_json, read_bytes

LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched

# The JSON values by which a part of a base decides what is drawn; the base's digest is made of them.
DigestInput = Mapping[str, object]


class LibraryConfig(dict[str, object]):
    """A JSON object in which diffusers or transformers describe a base or one of its parts.

    These are model_index.json, scheduler_config.json, tokenizer_config.json, and the config.json of each part. Both
    libraries take it as the dict that it is. Values that lcmlora computes with are taken by the methods below, which
    check their types; a number or a list that is absent or null has the default.

    place: the file, as errors name it.
    """

    def __init__(self, values: Mapping[str, object], place: Path | str) -> None:
        super().__init__(values)
        self.place = str(place)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns the configuration in a file. Raises UserError, which names the file."""
        return cls(read_object(path), path)

    @classmethod
    def of_module(cls, module: Any) -> Self:
        """Returns the configuration of a module of diffusers."""
        return cls(module.config, f"the configuration of {type(module).__name__}")

    def text(self, key: str) -> str | None:
        """Returns a text. Raises UserError if the value is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.unexpected(key, "a text")
        return value

    def integer(self, key: str, default: int) -> int:
        """Returns a whole number. Raises UserError if the value is none."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.unexpected(key, "a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        """Returns a number. Raises UserError if the value is none."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.unexpected(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; null is false, as for the libraries. Raises UserError if the value is neither."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.unexpected(key, "true or false")
        return bool(value)

    def length(self, key: str, default: int) -> int:
        """Returns the number of entries of a list. Raises UserError if the value is none."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, list | tuple):
            raise self.unexpected(key, "a list")
        return len(value)

    def unexpected(self, key: str, expected: str) -> UserError:
        """Returns the error about a value that is not as expected."""
        return UserError(f"{self.place}: {key} is {ascii(self.get(key))[:100]}; expected {expected}")


def read_small_file(path: Path) -> bytes:
    """Returns the content of a small text file of a base. Raises UserError, also for a Git LFS pointer."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: is a link to nothing; get the file again")
    content = read_bytes(path)
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer and not the file; run `git lfs pull` where the base was cloned")
    return content


def read_object(path: Path) -> JsonObject:
    """Returns the object in a JSON file of a base. Raises UserError, which names the file."""
    try:
        return as_object(parse_json(read_small_file(path)), str(path))
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None
