"""Lists, status and report of a large registry: python -m benchmarks.registries [--versions 48 1000 10000]

Fills databases with synthetic versions of up to 500 models, as nightly runs leave them, and asks each of them what the
command line, `status`, the report and the metrics ask: directly in sqlite and PostgreSQL, and through an MLflow server
whose database is that in PostgreSQL. Needs PostgreSQL on this machine. Writes docs/large-registry.json and the tables
in docs/large-registry.md. 10,000 versions take 1.5 GB in each database.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import tables
from lcmlora import registry
from lcmlora.config import Registry
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import record
from lcmlora.io.files import write_json
from lcmlora.io.parsing import read_json
from lcmlora.registry import promotion
from lcmlora.registry.listing import current, recent, search
from lcmlora.registry.listing.conditions import condition
from tests.integration.tracking_servers import PostgreSQL, Server
from tests.support import many_versions

PAGE, JSON = Path("docs/large-registry.md"), Path("docs/large-registry.json")
PLACES = ("sqlite", "PostgreSQL", "server")
_MODELS = {48: 12, 1_000: 50, 10_000: 500}  # by versions
_ASKED = 200  # models of status and report
_DAYS = 7  # of the report
_PARAMS = 20  # settings of a run, which nothing here asks for
_REPEATS = 3


class MLflowServer(Server):
    """`mlflow server` with one worker and without passwords."""

    def __init__(self, root: Path, database: str) -> None:
        super().__init__(root)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._database = database

    def _command(self) -> list[str]:
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--artifacts-destination", str(self.root / "artifacts")]
        return [sys.executable, "-m", "mlflow", "server", *options]

    def _settings(self) -> dict[str, str]:
        return {"MLFLOW_BACKEND_STORE_URI": self._database}

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def _questions(settings: Registry, models: int) -> dict[str, Callable[[], object]]:
    """Returns what is asked within one process, by the words of the table."""
    name = many_versions.model_name(models // 2)
    asked = [many_versions.model_name(number) for number in range(min(models, _ASKED))]
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=_DAYS)
    two = [condition("objective=tcd"), condition(f"{many_versions.EXCESS}<80")]
    rare = [condition("objective=tcd"), condition(f"{many_versions.EXCESS}<60.2")]
    return {
        "list, the newest 100": lambda: search.find(settings, newest=100),
        "list, two filters, the newest 100": lambda: search.find(settings, conditions=two, newest=100),
        "list, two filters that few meet": lambda: search.find(settings, conditions=rare, newest=100),
        "list all": lambda: search.find(settings),
        "list a model": lambda: search.find(settings, name, newest=100),
        "show": lambda: registry.resolve(f"{name}/2", settings),
        "history of a model": lambda: promotion.history(name, settings),
        "status: champions and newest versions": lambda: current.read(settings, asked),
        f"report: events of {_DAYS} days": lambda: recent.read(settings, asked, since),
    }


def _commands(models: int) -> dict[str, list[str]]:
    """Returns what is asked by a command of its own."""
    name = many_versions.model_name(models // 2)
    two = ["--where", "objective=tcd", "--where", f"{many_versions.EXCESS}<80"]
    return {
        "--version, which asks nothing": ["--version"],
        "registry list": ["registry", "list"],
        "registry list, two filters": ["registry", "list", *two],
        "registry list --limit 0": ["registry", "list", "--limit", "0"],
        "registry show": ["registry", "show", f"{name}/2"],
        "registry history": ["registry", "history", name],
    }


def _median(action: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Returns the median of seconds; what takes long is asked once."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < 5:
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _run(arguments: list[str], uri: str, folder: str) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "lcmlora", *arguments]
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)


def _measure(uri: str, models: int, folder: str) -> dict[str, dict[str, float]]:
    settings = Registry(tracking_uri=uri, experiment="lcmlora", alias="champion")
    search.find(settings, newest=1)  # imports, connections and what a server does at its first search are not timed
    asked = {words: _median(ask) for words, ask in _questions(settings, models).items()}
    run = {
        words: _median(lambda given=given: _run(given, uri, folder), repeats=1)  # type: ignore[misc]
        for words, given in _commands(models).items()
    }
    return {"asked": asked, "run": run}


def _fill(uri: str, versions: int) -> float:
    settings = Registry(tracking_uri=uri, experiment="lcmlora", alias="champion")
    models = _MODELS[versions]
    began = time.perf_counter()
    many_versions.fill(settings, models, versions // models, _figures(), params=_PARAMS)
    return time.perf_counter() - began


def _figures() -> dict[str, float]:
    return record(Metrics.read(Path("metrics/emoji.json")))


@contextmanager
def _server(database: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = MLflowServer(Path(folder), database)
        server.start()
        try:
            yield server.uri
        finally:
            server.kill()


def measure(sizes: list[int]) -> None:
    """Measures each number of versions in each place, and keeps what was found at once."""
    if missing := PostgreSQL.missing():
        raise SystemExit(missing)
    postgresql = PostgreSQL()
    try:
        postgresql.start()
        with tempfile.TemporaryDirectory() as folder:
            for versions in sizes:
                here, name = f"sqlite:///{folder}/{versions}.db", f"registry{versions}"
                postgresql.create(name)
                there, models = postgresql.uri(name), _MODELS[versions]
                for place, uri in (("sqlite", here), ("PostgreSQL", there)):
                    print(f"{versions:,} versions in {place}: filled in {_fill(uri, versions):.0f} s", flush=True)
                    _keep(versions, place, _measure(uri, models, folder))
                with _server(there) as uri:
                    _keep(versions, "server", _measure(uri, models, folder))
    finally:
        postgresql.remove()


def _keep(versions: int, place: str, found: dict[str, dict[str, float]]) -> None:
    kept = read_json(JSON)["seconds"] if JSON.exists() else {}
    kept.setdefault(str(versions), {})[place] = found
    write_json(JSON, {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "seconds": kept})


def show(found: dict[str, Any]) -> str:
    """Returns the tables of docs/large-registry.md."""
    asked = _table(found["seconds"], "asked", list(_questions(Registry(tracking_uri="sqlite://"), 1)))
    run = _table(found["seconds"], "run", list(_commands(1)))
    return (
        f"Asked within one process, in seconds ({found['machine']}).\n\n{asked}\n"
        f"Each as a command of its own, `lcmlora ...`, from its start to its end, in seconds.\n\n{run}"
    )


def _table(seconds: dict[str, Any], kind: str, rows: Sequence[str]) -> str:
    measured = [(place, size) for place in PLACES for size in sorted(seconds, key=int) if place in seconds[size]]
    head = ["", *(f"{place}, {int(size):,}" for place, size in measured)]
    cells = [[words, *(f"{seconds[size][place][kind][words]:.2f}" for place, size in measured)] for words in rows]
    return tables.markdown(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--versions",
        type=int,
        nargs="+",
        choices=list(_MODELS),
        default=list(_MODELS),
        help="the numbers of versions to measure; figures of the others stay as they are",
    )
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    given = parser.parse_args()
    if not given.tables:
        measure(given.versions)
    tables.write(PAGE, show(read_json(JSON)))


if __name__ == "__main__":
    main()
