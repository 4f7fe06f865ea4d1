"""Where the metrics of runs and models come from: MLflow, Prefect, DVC and the disk.

Labels are names of the project's models, its stages, ends of runs and folders. The time of an event is exported as its
timestamp, from which Prometheus computes ages.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect.client.schemas.objects import StateType
from prometheus_client.core import GaugeMetricFamily

from lcmlora.config import Config
from lcmlora.flows import name_of, outcomes, overview
from lcmlora.flows.monitoring import stage_seconds
from lcmlora.flows.monitoring.trainings import RUNNING, Trainings
from lcmlora.flows.retrain import prepare_of, stages_of
from lcmlora.flows.standing import server
from lcmlora.project import Project
from lcmlora.registry.listing import current, search
from lcmlora.registry.listing.current import Current
from lcmlora.registry.lookup import PASSED, REJECTED, Version
from lcmlora.tasks import dvc
from lcmlora.tasks.processes import Processes

Families = list[GaugeMetricFamily]

WINDOW_DAYS = 7  # of `lcmlora_runs_ended`
_ENDS = (*outcomes.ENDS, "Crashed", "Cancelled", "TimedOut")
_OVER = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)
_OTHER = "other"  # any other name of a state, so that labels stay few

# The metrics of each source without their prefix `lcmlora_`: their help, and their labels.
Declared = dict[str, tuple[str, tuple[str, ...]]]
OF_MLFLOW: Declared = {
    "champion_info": ("The champion of a model.", ("model", "version", "sha256")),
    "champion_promoted_timestamp_seconds": ("When the champion was promoted.", ("model",)),
    "champion_excess": ("The champion's excess distance at the gate's steps.", ("model", "steps")),
    "champion_retrieval": ("The champion's retrieval@1 at the gate's steps.", ("model", "steps")),
    "newest_version_passed": ("1 if the newest version passed the gate.", ("model",)),
    "training_images_per_second": ("Pictures per second of the last training, or of the one that runs.", ("model",)),
    "training_loss": ("Loss of the last training, or of the one that runs.", ("model",)),
    "training_running": ("1 while a training reports to MLflow.", ("model",)),
}
OF_VERSIONS: Declared = {
    "versions": ("Registered versions, by the gate's decision.", ("model", "gate")),
}
OF_PREFECT: Declared = {
    "runs_ended": (f"Runs of the last {WINDOW_DAYS} days, by how they ended.", ("end",)),
    "runs_going": ("Runs that have begun and not ended.", ()),
    "run_last_end_timestamp_seconds": ("When a run of a model last ended so.", ("model", "end")),
    "run_next_timestamp_seconds": ("When the next run of a model is due.", ("model",)),
    "stage_seconds": ("Seconds that a stage took when it last ran.", ("model", "stage")),
}
OF_DVC: Declared = {
    "stale_stages": ("Stages that the next run will run.", ("model",)),
}
OF_DISK: Declared = {
    "disk_free_bytes": ("Free bytes of the disk that the project is on.", ()),
    "disk_size_bytes": ("Bytes of the disk that the project is on.", ()),
}
OF_FOLDERS: Declared = {"kept_bytes": ("Bytes of the project's files, by folder.", ("place",))}
DECLARED = OF_MLFLOW | OF_VERSIONS | OF_PREFECT | OF_DVC | OF_DISK | OF_FOLDERS


@dataclass(frozen=True)
class Source:
    """One source of metrics.

    Attributes:
        seconds: between two looks, at least: what a look costs decides it.
        collect: returns the metrics. Raises UserError where the source does not answer.
    """

    name: str
    seconds: float
    collect: Callable[[Config], Families]


def sources(seconds: float) -> list[Source]:
    """Returns the sources. Prefect is one of them only if a server is configured.

    Args:
        seconds: between two looks at a server. DVC is asked, and versions are counted, every 15 minutes at most;
            folders are added up once an hour.
    """
    prefect = [Source("prefect", seconds, of_prefect)] if overview.has_server() else []
    return [
        Source("mlflow", seconds, functools.partial(of_mlflow, trainings=Trainings())),
        Source("versions", max(seconds, 900.0), of_versions),
        *prefect,
        Source("dvc", max(seconds, 900.0), of_dvc),
        Source("disk", seconds, of_disk),
        Source("folders", max(seconds, 3600.0), of_folders),
    ]


class _Gauges:
    """Gauges of a source, which are filled value by value."""

    def __init__(self, declared: Declared) -> None:
        self._families = {
            name: GaugeMetricFamily(f"lcmlora_{name}", text, labels=labels) for name, (text, labels) in declared.items()
        }

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Adds a value; None adds nothing."""
        if value is not None:
            self._families[name].add_metric(labels, value)

    def families(self) -> Families:
        return list(self._families.values())


def of_mlflow(settings: Config, trainings: Trainings) -> Families:
    """Returns the metrics of champions, newest versions and trainings."""
    gauges = _Gauges(OF_MLFLOW)
    registered = current.read(settings.registry, {name_of(model) for model in settings.models})
    last = trainings.look(settings)
    for model in settings.models:
        champion, newest = registered.get(name_of(model), Current(None, None))
        _set_champion(gauges, model, champion, settings)
        gauges.set("newest_version_passed", newest.gate == PASSED if newest else None, model)
        if (run := last.get(model)) is not None:
            gauges.set("training_images_per_second", run.data.metrics.get("images_per_second"), model)
            gauges.set("training_loss", run.data.metrics.get("loss"), model)
        gauges.set("training_running", run is not None and run.info.status == RUNNING, model)
    return gauges.families()


def of_versions(settings: Config) -> Families:
    """Returns how many versions there are, which takes a look at all of them."""
    gauges = _Gauges(OF_VERSIONS)
    found = Counter((version.name, version.gate) for version in search.find(settings.registry, figures="none").versions)
    for model in settings.models:
        for decision in (PASSED, REJECTED):
            gauges.set("versions", found[name_of(model), decision], model, decision)
    return gauges.families()


def _set_champion(gauges: _Gauges, model: str, champion: Version | None, settings: Config) -> None:
    if champion is None:
        return
    gauges.set("champion_info", 1, model, str(champion.version), champion.sha256[:12])
    if champion.promoted:
        gauges.set("champion_promoted_timestamp_seconds", datetime.fromisoformat(champion.promoted).timestamp(), model)
    steps = settings.gate.steps
    for figure in overview.FIGURES:
        gauges.set(f"champion_{figure}", champion.figure(f"{figure}.student_{steps}"), model, str(steps))


def of_prefect(settings: Config) -> Families:
    """Returns the metrics of runs: how and when they ended, how long their stages took, when the next ones are due."""
    gauges = _Gauges(OF_PREFECT)
    now = datetime.now(UTC)
    since = now - timedelta(days=WINDOW_DAYS)
    known = server.read(list(settings.models))
    ended = [run for run in known.past if run.end_time is not None and server.has_begun(run)]
    counts = dict.fromkeys((*_ENDS, _OTHER), 0)
    last: dict[tuple[str, str], float] = {}
    for run in ended:
        time = run.end_time
        if time is None or run.state is None or run.state.type not in _OVER:
            continue
        end = run.state.name if run.state.name in _ENDS else _OTHER
        counts[end] += time >= since
        for model in settings.models:
            if server.concerns(run, model):
                last[model, end] = max(time.timestamp(), last.get((model, end), 0.0))
    for end, count in counts.items():
        gauges.set("runs_ended", count, end)
    gauges.set("runs_going", sum(run.state is not None and run.state.type in server.GOING for run in known.past))
    for (model, end), moment in sorted(last.items()):
        gauges.set("run_last_end_timestamp_seconds", moment, model, end)
    seconds = stage_seconds.read([run.id for run in ended])
    for model in settings.models:
        due, _ = known.next_run(model, now)
        gauges.set("run_next_timestamp_seconds", datetime.fromisoformat(due).timestamp() if due else None, model)
        stages = {prepare_of(model, settings), *stages_of(model, settings)}
        for stage, took in seconds.get(outcomes.stages_key(model), {}).items():
            if stage in stages:
                gauges.set("stage_seconds", took, model, stage.replace(f"@{model}", ""))
    return gauges.families()


def of_dvc(settings: Config) -> Families:
    """Returns how many stages of each model are stale. Nothing is changed, and no run is disturbed."""
    gauges = _Gauges(OF_DVC)
    names = {model: [prepare_of(model, settings), *stages_of(model, settings)] for model in settings.models}
    with Processes() as processes:
        found = dvc.look(list(dict.fromkeys(name for own in names.values() for name in own)), processes, settings)
    for model, own in names.items():
        gauges.set("stale_stages", len(found.reasons.keys() & {*own}), model)
    return gauges.families()


def of_disk(settings: Config) -> Families:
    """Returns how full the disk is that the project's folder is on."""
    gauges = _Gauges(OF_DISK)
    usage = shutil.disk_usage(Path.cwd())
    gauges.set("disk_free_bytes", usage.free)
    gauges.set("disk_size_bytes", usage.total)
    return gauges.families()


def of_folders(settings: Config) -> Families:
    """Returns the bytes that the project keeps in its folder."""
    gauges = _Gauges(OF_FOLDERS)
    for place, folder in _places(settings).items():
        gauges.set("kept_bytes", folder_bytes(folder), place)
    return gauges.families()


def _places(settings: Config) -> dict[str, Path]:
    """Returns the folders that grow, by their names. What others keep, such as a bucket, is not among them."""
    root = Project().root
    places = {
        "dvc_cache": root / ".dvc" / "cache",
        "scratch": root / "scratch",
        "data": root / "data",
        "servers": root / ".up",  # of `lcmlora up`: databases, logs, SeaweedFS with its releases and artifacts
        "mlruns": root / "mlruns",
    }
    folders = [store for store in settings.publish.stores if "://" not in store]
    return places | {
        f"releases {number}" if number > 1 else "releases": root / folder for number, folder in enumerate(folders, 1)
    }


def folder_bytes(folder: Path) -> int:
    """Returns the bytes of all files below a folder, each once however many hard links it has; 0 if there is none."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for entry in _files(folder):
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # deleted meanwhile
            continue
        if (found.st_dev, found.st_ino) not in seen:
            seen.add((found.st_dev, found.st_ino))
            total += found.st_size
    return total


def _files(folder: Path) -> Iterable[os.DirEntry[str]]:
    folders: list[str | Path] = [folder]
    while folders:
        for entry in _entries(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                yield entry


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):  # deleted meanwhile, or never made
        return
