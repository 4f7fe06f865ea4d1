"""A page on which people compare two adapters blindly, prompt by prompt, and what they have chosen.

The page is one HTML file. Which adapter is on which side stands in a key file, which whoever judges need not see.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcmlora.errors import UserError
from lcmlora.io.parsing import as_object, read_json
from lcmlora.templates.loading import load_template

if TYPE_CHECKING:
    from PIL.Image import Image

Side = Literal["left", "right"]
_LEFT: Side = "left"
_RIGHT: Side = "right"


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads such a file. Raises UserError where it is none."""
        value = as_object(read_json(path), str(path))
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class Key(_File):
    """Which adapter is on which side of each pair."""

    page: str
    first: str  # the exact references of versions, or how the adapters were named
    second: str
    second_side: dict[str, Side]  # by the pair's name

    def write(self, path: Path) -> None:
        """Writes the file, which only its owner can read."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2) + "\n")


class Choices(_File):
    """What a person has chosen, as the page saves it."""

    page: str
    who: Annotated[str, Field(max_length=60)]
    choices: dict[str, Literal["left", "right", "neither"]]


@dataclass(frozen=True)
class Verdict:
    """How often each adapter was chosen.

    p_value: of the sign test: how often as one-sided a result comes of adapters that people cannot tell apart. Pairs of
        which neither picture is better say nothing, and are left out of it.
    """

    first: int
    second: int
    neither: int
    p_value: float

    @property
    def text(self) -> str:
        """The verdict in one line, as the history keeps it."""
        return (
            f"preferred in {self.second} of {self.first + self.second} pairs, {self.neither} without a choice, sign "
            f"test p = {self.p_value:.3g}"
        )


def render(
    model: str,
    prompts: Sequence[str],
    first: Sequence[Image],
    second: Sequence[Image],
    steps: int,
    names: tuple[str, str],
) -> tuple[str, Key]:
    """Returns the page, and the key to its sides. Sides and names of pairs are random, and different each time.

    Args:
        first, second: what each adapter draws of the prompts, from the same noise.
        names: of the two adapters, for the key; the page has neither.
    """
    page = secrets.token_hex(6)
    pairs, sides = [], {}
    for prompt, one, two in zip(prompts, first, second, strict=True):
        name = secrets.token_hex(4)
        left, right = (two, one) if secrets.randbelow(2) else (one, two)
        sides[name] = _LEFT if left is two else _RIGHT
        pairs.append({"name": name, "prompt": prompt, "left": _embedded(left), "right": _embedded(right)})
    script = load_template("pairs.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = load_template("pairs.html.j2").render(
        model=model, page=page, steps=steps, pairs=pairs, script=Markup(script), script_digest=digest
    )
    return text, Key(page=page, first=names[0], second=names[1], second_side=sides)


def _embedded(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def judge(key: Key, choices: Choices) -> Verdict:
    """Returns the verdict of a person's choices.

    Raises:
        UserError: they were made on another page, or none was made.
    """
    if choices.page != key.page:
        raise UserError(f"the choices were made on page {choices.page[:40]!r}, and the key is that of {key.page!r}")
    if unknown := choices.choices.keys() - key.second_side.keys():
        raise UserError(f"the page has no pair {sorted(unknown)[0][:40]!r}")
    if not choices.choices:
        raise UserError("there is no choice in the file")
    decided = {name: side for name, side in choices.choices.items() if side != "neither"}
    second = sum(side == key.second_side[name] for name, side in decided.items())
    first, neither = len(decided) - second, len(choices.choices) - len(decided)
    return Verdict(first, second, neither, sign_test(first, second))


def sign_test(one: int, other: int) -> float:
    """Returns the exact two-sided p-value of a fair coin that falls so often on each side; 1 without a throw."""
    throws = one + other
    tail = sum(math.comb(throws, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**throws)
