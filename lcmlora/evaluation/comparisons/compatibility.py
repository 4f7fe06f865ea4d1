"""The figures of stage `compatibility`: the student together with what people add to the base, as a typed document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from lcmlora.evaluation.figures import STUDENT, FeatureSet, Key
from lcmlora.io.documents import Document, Interval, Number
from lcmlora.io.files import sha256_file

NOTHING = "nothing"  # the name of the sets without an addition

AdditionKind = Literal[
    "nothing", "lora", "img2img", "inpainting", "controlnet", "ip-adapter", "int8 weights", "fp16 VAE"
]


class Cell(Document):
    """The student in some steps with an addition, against the teacher with the same addition.

    excess: the distance of the two less the distance of two sets of the teacher's; None where there is none.
    failed: why this is not to be recommended; None where nothing speaks against it.
    """

    excess: Number | None = None
    interval: Interval | None = None
    failed: str | None = None


class Tried(Document):
    """One addition at one strength, and what the student makes of it."""

    kind: AdditionKind
    title: str  # how a reader calls it
    added: dict[str, str | int | float]  # what exactly: weight, strength, SHA-256 of files
    floor: Number | None = None  # the distance of two of the teacher's sets, both with the addition
    cells: dict[Key, Cell]


class Compatibility(Document):
    """compatibility/MODEL.json."""

    adapter: str  # SHA-256 of its weights
    base: str  # digest
    features: FeatureSet
    pictures: int  # of each set
    prompts: int
    seeds: dict[str, int]
    teacher_steps: int
    guidance_scale: Number  # of the teacher
    resamples: int
    level: Number
    limit: Number  # an addition fails beyond so many times the excess without it
    tried: dict[str, Tried]  # by name, `nothing` first
    left_out: dict[str, str] = Field(default_factory=dict)  # by name: why it was not tried

    @property
    def rows(self) -> list[Tried]:
        """The additions in the order of their kinds, `nothing` first, whatever the order in the file."""
        kinds = get_args(AdditionKind)
        return [self.tried[name] for name in sorted(self.tried, key=lambda n: (kinds.index(self.tried[n].kind), n))]

    @property
    def failures(self) -> Iterator[tuple[str, Key, str]]:
        """Yields every cell that failed: the addition's name, the student's key, and why."""
        for name, tried in self.tried.items():
            for key, cell in tried.cells.items():
                if cell.failed is not None:
                    yield name, key, cell.failed

    @property
    def students(self) -> list[Key]:
        """The student's keys, the fewest steps first."""
        return sorted({key for tried in self.tried.values() for key in tried.cells}, key=lambda key: key.steps)


def shortfalls(found: Compatibility | None, asked: Sequence[str], steps: int) -> list[str]:
    """Returns a line for each addition that is asked for and failed, or was not tried, at so many steps.

    Args:
        found: None if no addition was tried with this adapter.
    """
    lines, key = [], Key.of(STUDENT, steps)
    for name in asked:
        tried = found.tried.get(name) if found else None
        if tried is None or key not in tried.cells:
            if found is None:
                reason = "no addition was, with this adapter; add the model to compatibility.models"
            else:
                known = ", ".join(each for each in found.tried if each != NOTHING) or "none"
                students = ", ".join(found.students)
                reason = found.left_out.get(name, f"additions that were: {known}, at {students}")
            lines.append(f"{key}: {name} was not tried (gate.compatible): {reason}")
        elif (failed := tried.cells[key].failed) is not None:
            lines.append(f"{key}: {name}: {failed} (gate.compatible)")
    return lines


def read_of(path: Path, adapter: Path) -> Compatibility | None:
    """Returns the figures in a file, if they are of this adapter; None if they are of another, or there are none.

    Args:
        adapter: the file of its weights.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    found = Compatibility.read(path)
    return found if found.adapter == sha256_file(adapter) else None
