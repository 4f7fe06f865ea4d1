"""The record of what made a project's generated files: `.lcmlora/project.json`, which is committed with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lcmlora import __version__
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_write
from lcmlora.io.parsing import read_bytes

PLACE = ".lcmlora/project.json"

Workers = Literal["docker", "kubernetes"]


class Options(BaseModel):
    """What `lcmlora init` was asked for that params.yaml does not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The project's name, for the title of its README."""
    workers: tuple[Workers, ...] = ()
    """For which pools of workers, besides processes, the project has job templates (`--with`)."""
    from_source: bool = False
    """Whether it is lcmlora's own repository, which also makes the emoji base and has documents of its own."""

    @property
    def slug(self) -> str:
        """The project's name as Prefect takes it, of the work pool and the deployments. Two projects on one server need
        different ones."""
        found = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip(".-")[:60]
        return found if found and not found.lower().startswith("prefect") else f"lcmlora-{found}".rstrip("-")


class Record(BaseModel):
    """What made a project's generated files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lcmlora: str
    """The version of lcmlora that wrote them."""
    options: Options
    """What they were made for, besides params.yaml."""
    files: dict[str, str]
    """The SHA-256 of the text that was generated for each file, by its path. A file with another one was edited by
    hand; one that is not listed belongs to the person. resolved.yaml is always written anew, and has none."""

    def write(self, root: Path) -> None:
        """Writes the record of the project in this folder."""
        path = root / PLACE
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self.model_dump_json(indent=2) + "\n"
        atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))


def read(root: Path) -> Record:
    """Returns the record of the project in this folder.

    Raises:
        UserError: there is none, or it was written by a later version.
    """
    path = root / PLACE
    if not path.is_file():
        raise UserError(f"{path}: no such file, so nothing says what made this project; `lcmlora init` makes a new one")
    try:
        return Record.model_validate_json(read_bytes(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {where}: {first['msg']}; it was edited, or written by a later version than {own_version()}"
        ) from None


def advice(root: Path) -> str | None:
    """Returns what a person should do where the generated files of a project are of another version, else None.

    Raises:
        UserError: the record cannot be read.
    """
    if not (root / PLACE).is_file() or (written_by := read(root).lcmlora) == own_version():
        return None
    return f"the project is of lcmlora {written_by}; `lcmlora upgrade` brings it to {own_version()}"


def own_version() -> str:
    """Returns the version of this package."""
    return __version__
