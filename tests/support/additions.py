"""One class of each kind that lcmlora/plugins.py has a table for, as another package would add it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self
from zipfile import ZipFile

import torch
from torch import Tensor

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.schedule import Prediction
from lcmlora.config import Distill, Publish
from lcmlora.data.reading.candidates import Candidate, Rejection, clean_caption
from lcmlora.data.sources.source import EncodedPictures
from lcmlora.diffusion.objectives import Objective
from lcmlora.diffusion.samplers import StudentSampler
from lcmlora.evaluation.measures.distances import Distance
from lcmlora.releases.stores.store import Entry, Store, write_blocks
from lcmlora.settings.fields import Share


class Zip(EncodedPictures):
    """A zip file of pictures, which are called by their captions."""

    def candidates(self) -> tuple[list[Candidate], list[Rejection]]:
        names = sorted(ZipFile(self.data.path).namelist())
        return [Candidate(name, clean_caption(Path(name).stem), name) for name in names], []

    def read(self, place: str) -> bytes:
        return ZipFile(self.data.path).read(place)


class MeanShift(Distance):
    """The squared distance of the sets' means."""

    title = "mean shift"

    def weighted(self, a: Tensor, a_weights: Tensor, b: Tensor, b_weights: Tensor) -> Tensor:
        return (a_weights @ a / len(a) - b_weights @ b / len(b)).square().sum()


class MeanColour:
    """The mean colour of a picture."""

    distance = "mean-shift"
    name = "mean-colour/3"
    dimensions = 3

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        del device, source

    def __call__(self, pictures: Tensor) -> Tensor:
        return pictures.mean(dim=(2, 3)).float()


class Brightness:
    """How bright a picture is."""

    name = "brightness"

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        del device, source

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        del prompts
        return pictures.float().mean(dim=(1, 2, 3))


def contrast(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """How far the brightest and the darkest value of a picture are apart; a plain function."""
    del prompts
    return pictures.amax(dim=(1, 2, 3)) - pictures.amin(dim=(1, 2, 3))


class Memory(Store):
    """Releases in the memory of this process."""

    form = "memory://prefix"
    objects: ClassVar[dict[str, bytes]] = {}

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @classmethod
    def open(cls, settings: Publish, key: str, consequence: str) -> Self:
        del key, consequence
        return cls(settings.to.rstrip("/"))

    def create(self, name: str, content: Path | bytes, sha256: str) -> bool:
        del sha256
        read = content if isinstance(content, bytes) else content.read_bytes()
        return self.objects.setdefault(f"{self.uri}/{name}", read) is read

    def digest(self, name: str, *, reread: bool = False) -> str | None:
        del reread
        found = self.read(name)
        return found and found[1]

    def read(self, name: str) -> tuple[bytes, str] | None:
        found = self.objects.get(f"{self.uri}/{name}")
        return None if found is None else (found, hashlib.sha256(found).hexdigest())

    def fetch(self, name: str, target: Path, size: int) -> bool:
        if found := self.read(name):
            write_blocks([found[0]], size, target, f"{self.uri}/{name}")
        return found is not None

    def swap(self, name: str, content: bytes, tag: str | None) -> bool:
        if same := self.digest(name) == tag:
            self.objects[f"{self.uri}/{name}"] = content
        return same

    def entries(self, prefix: str) -> list[Entry]:
        found = sorted(key for key in self.objects if key.startswith(f"{self.uri}/{prefix}"))
        time = datetime.now(UTC)
        return [Entry(key.removeprefix(f"{self.uri}/"), len(self.objects[key]), time) for key in found]


class Ddim(StudentSampler):
    """From timestep to timestep without noise."""

    adds_noise = False

    def jump(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Tensor:
        return self.schedule.state(*prediction, s)

    def step(self, x: Tensor, prediction: Prediction, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        return self.jump(x, prediction, t, s)


class HalfwaySettings(Distill):
    """`distill` with the objective `halfway`."""

    fraction: Share = 0.5
    """Where the jump ends, as a share of the timestep that the teacher steps to."""


class Halfway(Objective[HalfwaySettings]):
    """To a fraction of where the teacher steps to, by default half."""

    title = "Halfway distillation"
    papers = ("2611.00001",)
    settings_class = HalfwaySettings
    least_grid = 2

    @classmethod
    def sampler_of(cls, settings: HalfwaySettings) -> Sampler:
        return Sampler("DDIMScheduler", None, settings.grid)

    def destination(self, index: Tensor, u: Tensor) -> Tensor:
        return (self.lower[index] * self.settings.fraction).long()


def owls() -> None:
    """Count owls. A verb of the command line."""
    print("two owls")
