"""What each stage ran with: settings, commit, versions, device, as they were when it ran and not when it is packaged.

A record lies in `timings/records`, beside the outputs and not in them: it has times and commits, and an output must
have the same bytes whenever and wherever it is made. It has the digest of the output that was made, so that it is found
for an output that DVC has restored from its cache, and not for another one that has taken its place. Git and DVC do not
have it. An output from another machine has no record here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pydantic import Field

import lcmlora
from lcmlora.config import Config
from lcmlora.dvc_files import commits, resolved
from lcmlora.dvc_files.commits import Commit
from lcmlora.errors import UserError
from lcmlora.io import temporaries
from lcmlora.io.documents import Document
from lcmlora.io.files import make_folder
from lcmlora.io.parsing import JsonObject
from lcmlora.io.terminal import note
from lcmlora.project import Project
from lcmlora.stages import Run

RAN_WITH = "ran_with"  # tag of a run

_MOST = 20  # records of a stage: DVC's cache has older outputs, too, but rarely
_LARGE, _PART = 1 << 20, 1 << 16  # bytes of a file, and at both ends of a larger one, by which it is told from others
_LIBRARIES = ("torch", "diffusers", "peft", "transformers", "numpy")


class StageRecord(Document):
    """What a stage ran with."""

    output: str  # digest of what it made, see `output_digest`
    settings: str  # SHA-256 of its entry in resolved.yaml
    sections: JsonObject  # the settings in force, by section
    git: Commit  # of the project
    package: Commit  # of lcmlora, where it was run from a repository
    versions: dict[str, str]  # of lcmlora, Python and libraries
    device: str
    began: str  # ISO 8601, UTC
    ended: str
    changed: list[str] = Field(default_factory=list)  # what a person changed while it ran


class Begun(Document):
    """A run of a stage that has begun and not ended yet, or was killed."""

    settings: str
    git: Commit


class _Records(Document):
    """The records of one stage, the newest first."""

    records: list[StageRecord] = Field(default_factory=list)
    begun: Begun | None = None


def find(project: Project, run: Run, config: Config) -> StageRecord | None:
    """Returns what the present output of a stage was made with, None where this is not known.

    Raises:
        UserError: the file of its records is damaged.
    """
    path, output = _file(project, run), output_of(project, run, config)
    if not path.is_file() or not output.exists():
        return None
    digest = output_digest(output)
    return next((each for each in _Records.read(path).records if each.output == digest), None)


@contextlib.contextmanager
def recorded(project: Project, run: Run, settings: Callable[[], Config]) -> Iterator[None]:
    """Encloses a stage's work, and records what it ran with when it ends well. Tells what was changed meanwhile.

    Of several processes that train together the first one records.

    Args:
        settings: reads params.yaml.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    config, git, package, began = settings(), commits.of_project(project.root), commits.of_package(), _now()
    entry, path = resolved.digest(config, run), _file(project, run)
    earlier: Begun | None = None
    with _reported():
        earlier = _begin(path, Begun(settings=entry, git=git))
    yield  # a launcher of other processes leaves this by SystemExit, and the first of them records
    changed = list(_changes(project, run, settings, entry, git))
    if earlier is not None and earlier.git != git:
        changed.append(f"it may have gone on from an unfinished run of commit {earlier.git.text}")
    for change in changed:
        note(f"{resolved.entry_name(run)}: {change}; what it ran with is recorded", "warning: ")
    with _reported():
        record = StageRecord(
            output=output_digest(output_of(project, run, config)),
            settings=entry,
            sections=_sections(config, run),
            git=git,
            package=package,
            versions=_versions(),
            device=_device(),
            began=began,
            ended=_now(),
            changed=changed,
        )
        _keep(path, record)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Reports that a record cannot be written, since the stage's own result matters more."""
    try:
        yield
    except OSError as error:
        note(f"what the stage runs with is not recorded: {error}", "warning: ")


def summary(project: Project) -> dict[str, str]:
    """Returns the commit and the version of now, as the tag that the MLflow run of a distillation gets.

    By it a registration on another machine, which has no records, knows what the adapter was trained with.
    """
    git = commits.of_project(project.root)
    return {RAN_WITH: json.dumps(git.plain() | {"lcmlora": lcmlora.__version__}, sort_keys=True)}


def output_of(project: Project, run: Run, config: Config) -> Path:
    """Returns the output by which a stage's record is found: its folder, or the file that sums it up."""
    model, name = run.model or "", run.name or ""
    outputs: dict[str, Callable[[], Path]] = {
        "pretrain": lambda: project.base("emoji"),
        "prepare": lambda: project.own_pictures(model) if model else project.pictures,
        "encode": lambda: project.latents(model),
        "reference": lambda: project.reference(model),
        "distill": lambda: project.distilled(model, config),
        "polish": lambda: project.adapter(model),
        "evaluate": lambda: project.metrics(model),
        "style": lambda: project.style(model, name),
        "finetune": lambda: project.finetune(model, name),
        "alone": lambda: project.alone(model, name),
        "study": lambda: project.study(model),
        "compatibility": lambda: project.compatibility(model),
        "package": lambda: project.release(model) / "pytorch_lora_weights.safetensors",
    }
    return outputs[run.stage]()


def output_digest(path: Path) -> str:
    """Returns a digest that tells outputs of a stage apart. Of a large file it reads both ends.

    It is no checksum: DVC has one of every byte.
    """
    found = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for file in files:
        size = file.stat().st_size
        name = "" if file == path else file.relative_to(path).as_posix()
        found.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as content:
            if size > _LARGE:
                found.update(content.read(_PART))
                content.seek(-_PART, os.SEEK_END)
            found.update(content.read())
    return found.hexdigest()


def _changes(project: Project, run: Run, settings: Callable[[], Config], entry: str, git: Commit) -> Iterator[str]:
    """Yields what differs now from the beginning of the stage."""
    try:
        if resolved.digest(settings(), run) != entry:
            yield "its settings were changed while it ran"
    except UserError as error:
        yield f"its settings were changed while it ran, and cannot be read now ({error})".replace("\n", "; ")
    now = commits.of_project(project.root)
    if now != git:
        yield f"the project's commit was {git.text} when it began and is {now.text} now"


def _sections(config: Config, run: Run) -> JsonObject:
    """Returns the settings in force that provenance names, by section."""
    if run.model is None:
        return {"data": config.data.model_dump(mode="json")}
    made = {
        "data": config.data_for(run.model),
        "encode": config.encode_for(run.model),
        "distill": config.distill_for(run.model),
        "evaluation": config.evaluation_for(run.model),
    }
    read = {"prepare": ("data",), "encode": ("data", "encode"), "distill": ("distill",), "polish": ("distill",)}
    names = read.get(run.stage, ("evaluation",))
    return {name: made[name].model_dump(mode="json") for name in names}


def _versions() -> dict[str, str]:
    found = {"lcmlora": lcmlora.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _device() -> str:
    """Returns the name of the GPU that this process has used, or that of the processor's kind."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return f"cpu {platform.machine()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _file(project: Project, run: Run) -> Path:
    return project.records / f"{resolved.entry_name(run)}.json"


def _begin(path: Path, run: Begun) -> Begun | None:
    """Keeps that a run has begun. Returns the one with these settings that did not end, from which it may go on."""
    make_folder(path.parent)
    with temporaries.locked(path):
        former = _read(path)
        earlier = former.begun if former.begun and former.begun.settings == run.settings else None
        if earlier is None:
            _Records(records=former.records, begun=run).write(path)
    return earlier


def _keep(path: Path, record: StageRecord) -> None:
    with temporaries.locked(path):
        others = [each for each in _read(path).records if each.output != record.output]
        _Records(records=[record, *others][:_MOST]).write(path)


def _read(path: Path) -> _Records:
    try:
        return _Records.read(path) if path.is_file() else _Records()
    except UserError as error:
        note(f"{error}; it is begun anew", "warning: ")
        return _Records()
