"""The ledger of what stages have used of devices: timings/costs.jsonl in the project, one line for each run of a stage.

A stage that is running has a file of its own, which is written anew every minute, so that a kill loses no more than
that. The next run of the stage takes such a file over. Stages that DVC skips or restores use nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lcmlora.config import Config
from lcmlora.io.files import atomic_write, write_json
from lcmlora.io.parsing import Malformed, as_object, parse_json, read_json
from lcmlora.project import Project
from lcmlora.registry.costs.spent import Spent, Use, add_up
from lcmlora.tasks import energy

_EVERY = 60.0  # seconds
_KEPT = timedelta(days=400)  # a year to look back on, and a month
_RANKED = ("encode", "distill", "polish")  # stages that run on `launch.processes` devices


@dataclass(frozen=True)
class Entry:
    """One run of a stage."""

    time: str  # of its end, or of the last minute before it was killed; ISO 8601, UTC
    model: str
    stage: str
    device: str
    seconds: float  # of all devices
    joules: float | None
    version: str | None = None  # NAME/VERSION that it was counted for


def model_of(stage: str, settings: Config) -> str | None:
    """Returns the model of a DVC stage such as distill@emoji or style@emoji-ink, None where it has none."""
    _, _, rest = stage.partition("@")
    named = [model for model in settings.models if rest == model or rest.startswith(f"{model}-")]
    return max(named, key=len, default=None)


@dataclass
class Metered:
    """A measurement; `used` is set to False where the stage turns out to have used nothing."""

    used: bool = True


@contextlib.contextmanager
def metering(stage: str, settings: Config) -> Iterator[Metered]:
    """Counts the time and energy of the block for the model of this stage, however it ends.

    Two runs of one stage never measure at once: the caller holds the stage's lock.
    """
    metered, model = Metered(), model_of(stage, settings)
    if model is None:
        yield metered
        return
    _take_over(stage)
    used, device = _devices(stage, model, settings)
    count = max(len(used), 1)
    began, energy_before = time.monotonic(), energy.joules(used)

    def measured() -> Entry:
        after = energy.joules(used)
        joules = None if after is None or energy_before is None or after < energy_before else after - energy_before
        return Entry(_now(), model, stage, device, count * (time.monotonic() - began), joules)

    over = threading.Event()
    writer = threading.Thread(target=_keep_noting, args=(stage, measured, over), daemon=True)
    writer.start()
    try:
        yield metered
    finally:
        over.set()
        writer.join()
        if metered.used:
            _append(measured())
        _running(stage).unlink(missing_ok=True)


def _keep_noting(stage: str, measured: Callable[[], Entry], over: threading.Event) -> None:
    while not over.wait(_EVERY):
        atomic_write(_running(stage), lambda path: path.write_text(_line(measured())))


def _devices(stage: str, model: str, settings: Config) -> tuple[list[energy.Gpu], str]:
    """Returns the GPUs that a stage uses, none where it computes on the CPU, and the device's name."""
    kind = stage.partition("@")[0]
    section = settings.section(
        {"encode": "encode", "distill": "distill", "polish": "distill"}.get(kind, "evaluation"), model
    )
    found = [] if getattr(section, "device", "auto") == "cpu" else energy.gpus()
    if not found:
        return [], "cpu"
    used = found[: settings.launch_for(model).processes] if kind in _RANKED else found[:1]
    return used, used[0].name


def _ledger() -> Path:
    return Project().durations.with_name("costs.jsonl")


def _running(stage: str) -> Path:
    return _ledger().with_name(f"costs-{re.sub(r'[^A-Za-z0-9@._-]', '_', stage)}.json")


def _take_over(stage: str) -> None:
    """Adds what a killed run of this stage has noted."""
    path = _running(stage)
    if path.is_file():
        for entry in _parse(path.read_text(encoding="utf-8")):
            _append(entry)
        path.unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(entry: Entry) -> str:
    return json.dumps({key: value for key, value in asdict(entry).items() if value is not None}) + "\n"


def _append(entry: Entry) -> None:
    with _locked() as path, path.open("ab") as file:
        file.write(_line(entry).encode())


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    path = _ledger()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(".costs.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def entries() -> list[Entry]:
    """Returns all that the ledger has, the oldest first, and what runs at the moment or was killed.

    A line that was cut off by a kill is left out.
    """
    files = [_ledger(), *sorted(_ledger().parent.glob("costs-*.json"))]
    return [entry for path in files if path.is_file() for entry in _parse(path.read_text(encoding="utf-8"))]


def _parse(text: str) -> list[Entry]:
    found = []
    for line in text.splitlines():
        try:
            fields = parse_json(line)
        except Malformed:
            continue
        if isinstance(fields, dict) and {"time", "model", "stage", "device", "seconds"} <= fields.keys():
            known: dict[str, Any] = {key: fields.get(key) for key in Entry.__dataclass_fields__}
            found.append(Entry(**known))
    return found


def uncounted(model: str) -> list[Entry]:
    """Returns what was used for a model since its last version, runs that failed or were killed included."""
    return [entry for entry in entries() if entry.model == model and entry.version is None]


def uncounted_sum(model: str, settings: Config) -> Spent | None:
    """Returns the sum of `uncounted`, None where nothing was used."""
    found = uncounted(model)
    return spent(found, settings) if found else None


def count_for(model: str, version: str) -> None:
    """Notes that all that was used for a model so far is counted for a version. Entries of long ago go."""
    oldest = (datetime.now(UTC) - _KEPT).isoformat()
    with _locked() as path:
        found = _parse(path.read_text(encoding="utf-8")) if path.is_file() else []
        counted = [replace(e, version=version) if e.model == model and e.version is None else e for e in found]
        text = "".join(_line(entry) for entry in counted if entry.time >= oldest)
        atomic_write(path, lambda temporary: temporary.write_text(text))


def spent(found: Sequence[Entry], settings: Config) -> Spent:
    """Returns the sum of entries, with the prices of now."""
    return add_up((Use(e.device, e.seconds, e.joules) for e in found), settings.costs)


def since(model: str, moment: datetime) -> list[Entry]:
    """Returns what was used for a model since a moment (UTC)."""
    return [entry for entry in entries() if entry.model == model and entry.time >= moment.isoformat()]


@dataclass(frozen=True)
class Budget:
    """What a model has spent of its budget in this calendar month (UTC)."""

    model: str
    spent: float
    budget: float
    currency: str

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self.spent >= self.budget

    @property
    def line(self) -> str:
        """The budget in one line."""
        month = datetime.now(UTC).strftime("%Y-%m")
        return f"{self.spent:.2f} of {self.budget:.2f} {self.currency} are spent in {month} (costs.budget)"


def budget_of(model: str, settings: Config) -> Budget | None:
    """Returns the state of a model's budget, None where there is none.

    It is what this folder has spent: each clone of a project that computes has a budget of its own. A device without a
    price counts nothing.
    """
    if settings.costs.budget is None:
        return None
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    total = 0.0
    for entry in since(model, month):
        total += spent([entry], settings).price or 0.0
    return Budget(model, total, settings.costs.budget, settings.costs.currency)


def is_first_notice(model: str) -> bool:
    """Returns whether nobody was told in this month that the model's budget is spent, and notes that it is told now."""
    path, month = _ledger().with_name("budgets.json"), datetime.now(UTC).strftime("%Y-%m")
    with _locked():
        told = as_object(read_json(path), str(path)) if path.is_file() else {}
        if told.get(model) == month:
            return False
        write_json(path, {**told, model: month})
    return True
