"""A year of nights in miniature, with retention: python -m benchmarks.year --nights 365 --seed 0

Each night a project gets new pictures, DVC runs its stages, and what they give is published, registered, passes the
gate or not, and becomes champion or not. The stages are copies of files with a trainer's sizes, so that a night takes
seconds; MLflow's database, the store, DVC and `lcmlora prune` are real. The clock is put forward by a day each night.
Some nights the process is killed in the middle of a change of the registry or the store (--kills, a share of the
nights), and does it again; so are prunes, which come every 30 nights. After each prune, every alias and channel is
followed and its release verified.

Prints, for every 30 nights, what has piled up and how long it takes to list it. --keep-everything shows the same
without retention. Prefect's database is not among it: its server deletes runs after 90 days by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from benchmarks import tables
from lcmlora import registry
from lcmlora.config import Config, load
from lcmlora.flows import prune
from lcmlora.io.files import sha256_file
from lcmlora.registry import events, promotion, registration
from lcmlora.registry.lookup import Version
from lcmlora.registry.tracking import log_run
from lcmlora.releases import bundle, catalog, publish
from lcmlora.releases.stores.directory import DirectoryStore
from tests.support import repositories
from tests.support.releases import settings as project_settings
from tests.support.releases import write_sealed

MODEL = "mini"
EVERY = 30  # nights between two prunes, and two rows of the table
WEIGHTS = 500_000  # bytes of an adapter
STEPS = 600  # of the distillation, each logged
_STAGES = """
stages:
  encode:
    cmd: mkdir -p data && cp pictures data/latents
    deps: [pictures]
    outs: [data/latents]
  distill:
    cmd: mkdir -p adapters && cp data/latents adapters/mini
    deps: [data/latents]
    outs: [adapters/mini]
"""
# What a kill comes before: changes of registry, artifacts and store.
_CHANGES: dict[Any, tuple[str, ...]] = {
    MlflowClient: (
        *("set_model_version_tag", "set_registered_model_tag", "set_registered_model_alias", "create_model_version"),
        *("delete_model_version", "set_tag", "log_artifacts", "log_batch", "delete_run"),
    ),
    DirectoryStore: ("create", "swap", "delete"),
    LocalArtifactRepository: ("delete_artifacts",),
}


class Killed(BaseException):
    """The end of the process in the middle of a night."""


class Year:
    """A project, its clock, and what happened."""

    def __init__(self, root: Path, seed: int, kills: float, *, keep: bool) -> None:
        self.root, self.chance, self.kills, self.keep = root, random.Random(seed), kills, keep
        self.night, self.killed, self.began = 0, 0, time.time()
        repositories.make(root, _STAGES)
        raw = project_settings(root, models=(MODEL,), registry={"tracking_uri": f"sqlite:///{root / 'mlflow.db'}"})
        raw["publish"] = {"to": str(root / "releases")}
        raw["retention"] = {"versions": 10, "days": 30, "dvc": "workspace"}
        (root / "params.yaml").write_text(yaml.safe_dump(raw))
        os.chdir(root)
        self.settings: Config = load()

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.began, UTC) + timedelta(days=self.night)

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """Within the block it is this night, for MLflow and for lcmlora."""
        real, number = time.time, iter(range(10**9))

        def text() -> str:  # later with each call, as the history is sorted by it
            moment = self.now() + timedelta(microseconds=next(number))
            return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None, year: Year = self) -> datetime:  # type: ignore[override]
                return year.now()

        with (
            mock.patch.object(time, "time", lambda: real() + self.night * 86400),
            mock.patch.object(events, "now", text),
            mock.patch.object(prune, "datetime", Clock),
        ):
            yield

    def one_night(self) -> None:
        self.night += 1
        content = self.chance.randbytes(WEIGHTS)
        (self.root / "pictures").write_bytes(content)
        command = [sys.executable, "-m", "dvc", "repro", "-q"]
        subprocess.run(command, check=True, env=os.environ | {"DVC_NO_ANALYTICS": "1"})
        shutil.rmtree("release", ignore_errors=True)
        folder = write_sealed(self.root / "release" / MODEL, weights=content, model=MODEL)
        rejected = ["blurred"] if self.chance.random() < 0.3 else []
        with log_run(
            self.settings.registry.model_copy(update={"system_metrics": False}), MODEL, {"seed": self.night}
        ) as run:
            for step in range(STEPS):
                run.log({"loss": 1 / (step + 1)}, step)
            run.tag_adapter(sha256_file(folder / bundle.WEIGHTS), {})
        self.surviving(lambda: self.release(folder, rejected))

    def release(self, folder: Path, rejected: list[str]) -> None:
        uri = publish.publish_release(folder, MODEL, self.settings.publish)
        made = registration.register_release(MODEL, self.settings.registry, folder, uri, rejected)
        if not rejected:
            promotion.promote_passed(made, self.settings.registry, reason="passed the gate")
            publish.point_channel(MODEL, made.sha256, self.settings.publish)

    def surviving(self, work: Callable[[], object]) -> None:
        """Does the work; some nights it is killed in the middle, and done again."""
        left = self.chance.randrange(60) if self.chance.random() < self.kills else None
        with contextlib.ExitStack() as stack:
            if left is not None:
                countdown = [left]

                def count() -> None:
                    countdown[0] -= 1
                    if countdown[0] < 0:
                        raise Killed

                for patch in _patches(count):
                    stack.enter_context(patch)
            try:
                work()
                return
            except Killed:
                self.killed += 1
        work()

    def prune(self) -> float:
        began = time.monotonic()

        def work() -> None:
            prune.delete(prune.find(self.settings), self.settings, "the year")

        self.surviving(work)
        return time.monotonic() - began

    def check(self) -> None:
        """Every alias names a version that can be pulled, every channel a whole release."""
        champion = registry.resolve(f"{MODEL}@champion", self.settings.registry)
        with tempfile.TemporaryDirectory() as folder:
            for alias in (*champion.aliases, promotion.PREVIOUS):
                out = Path(folder, alias)
                registry.pull(f"{MODEL}@{alias}", self.settings.registry, out, everything=True)
        catalog.verify_release(f"{MODEL}@champion", self.settings.publish)

    def row(self, pruning: float | None) -> list[str]:
        began = time.monotonic()
        found: list[Version] = registry.versions(self.settings.registry, f"lcm-lora-{MODEL}")
        listed = time.monotonic() - began
        began = time.monotonic()
        releases = catalog.list_releases(self.settings.publish, MODEL)
        stored = time.monotonic() - began
        places = ["mlflow.db", "mlruns", "releases", ".dvc/cache/files", ".dvc/cache/runs"]
        return [
            str(self.night),
            str(len(found)),
            str(len(releases)),
            *(f"{_bytes(self.root / place) / 1e6:.1f}" for place in places),
            f"{listed:.2f}",
            f"{stored:.2f}",
            "" if pruning is None else f"{pruning:.1f}",
            str(self.killed),
        ]


HEAD = (
    "night",
    "versions",
    "releases",
    "database, MB",
    "artifacts, MB",
    "releases, MB",
    "DVC cache, MB",
    "run-cache, MB",
    "list versions, s",
    "list releases, s",
    "prune, s",
    "kills",
)


def _patches(count: Callable[[], None]) -> Iterator[Any]:
    for cls, names in _CHANGES.items():
        for name in names:
            plain = getattr(cls, name)

            def counted(*arguments: Any, _plain: Any = plain, **named: Any) -> Any:
                count()
                return _plain(*arguments, **named)

            yield mock.patch.object(cls, name, counted)


def _bytes(path: Path) -> int:
    """Returns the bytes on disk: a file with two names counts once."""
    if path.is_file():
        return path.stat().st_size
    files = {(state := each.stat()).st_ino: state.st_size for each in path.rglob("*") if each.is_file()}
    return sum(files.values())


def simulate(nights: int, seed: int, kills: float, *, keep: bool) -> Iterator[list[str]]:
    """Yields the rows of the table."""
    with tempfile.TemporaryDirectory(prefix="lcmlora-year-") as folder:
        os.environ["LCMLORA_CACHE"] = str(Path(folder) / "cache")
        year = Year(Path(folder) / "project", seed, kills, keep=keep)
        for _ in range(nights):
            with year.clock():
                year.one_night()
                if year.night % EVERY == 0 or year.night == nights:
                    pruning = None if keep else year.prune()
                    year.check()
                    yield year.row(pruning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=float, default=0.2, help="share of the nights, and of the prunes, with a kill")
    parser.add_argument("--keep-everything", action="store_true", help="without retention")
    options = parser.parse_args()
    rows = []
    for row in simulate(options.nights, options.seed, options.kills, keep=options.keep_everything):
        print(" ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    print(tables.markdown(HEAD, rows))


if __name__ == "__main__":
    main()
