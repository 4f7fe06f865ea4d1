"""Kills what a deployed run depends on at random moments: python -m benchmarks.outages --kills 200 --minutes 1 10

As `python -m benchmarks.kills`, but the run is deployed on a Prefect server with a worker, and SIGKILL goes to one of
TARGETS: the trainer, DVC, the flow, a supervisor, the worker, the server, or all of these at once. A server that was
killed stays away for a time that is uniform between the given minutes. A worker that was killed is started again, and
takes up the runs that it has left. A run that ended as Failed or Crashed is started again. A run that was marked as
Crashed while its flow lived is a false crash.

Prints what was killed, and the results; --json writes them to a file, too. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from benchmarks import tables
from benchmarks.kills import Counts, Project, kill_process, without_numbers
from lcmlora.io.files import write_json
from tests.integration.tracking_servers import PrefectServer
from tests.support.deployed import Deployed

TARGETS = ("trainer", "dvc", "flow", "supervisor", "worker", "server", "everything")
_ENDS = ("Promoted", "Reproduced", "UpToDate", "Rejected", "Registered", "Failed", "Crashed", "Cancelled")
_GOOD = ("Promoted", "Reproduced", "UpToDate")
_STUCK = 1800.0  # seconds after which a run counts as stuck, beside those for which the server was away
_UP = 10.0  # seconds between a worker's death and its next start; five minutes with the crontab of the guide


class Experiment:
    """One project, its server and its worker, and what happens to them."""

    def __init__(self, folder: Path, draw: random.Random, minutes: tuple[float, float]) -> None:
        self.project = Project(folder / "project")
        own = {k: v for k, v in self.project.environment.items() if k.startswith(("LCMLORA_", "OMP_"))}
        (folder / "server").mkdir()
        self.server = PrefectServer(folder / "server")
        self.server.start()
        self.site = Deployed(self.project.root, own["LCMLORA_GPU_LIMIT"], self.server, variables=own)
        self.deployment = self.site.deploy()
        self.counts, self.away = Counts(), list[float]()
        self._draw, self._minutes = draw, minutes
        self._back: float | None = None  # when the server comes back
        self._up: float | None = None  # when the worker comes back
        self.site.start_worker()

    def run(self, kills: int, pause: float) -> bool:
        """Starts a run, kills at random until it has ended or the number of kills is reached; returns whether it ended.

        Args:
            pause: seconds between two kills at most.
        """
        run = self.site.start_run(self.deployment)
        self.counts.runs += 1
        until = time.monotonic() + _STUCK
        moment = self._next(pause)
        while time.monotonic() < until:
            self._bring_back()
            if self.counts.kills.total() < kills and time.monotonic() > moment and self._kill():
                moment = self._next(pause)
                until += 60 * self._minutes[1]
            if self._back is None:
                state = self.site.state(run)
                if state == "Crashed" and any(each.kind == "flow" for each in self.project.processes()):
                    time.sleep(1)  # the flow may be ending
                    if any(each.kind == "flow" for each in self.project.processes()):
                        self.counts.wrong.append(f"a living run is marked as Crashed: {self.site.history(run)}")
                        return False
                if state in _ENDS:
                    return self._ended(run, state)
            time.sleep(0.3)
        self.counts.wrong.append(f"a run does not end: {self.site.history(run)}")
        return False

    def _next(self, pause: float) -> float:
        return time.monotonic() + self._draw.uniform(0, pause)

    def _bring_back(self) -> None:
        if self._back is not None and time.monotonic() > self._back:
            self._back = None
            self.server.start()
        if self._up is not None and self._back is None and time.monotonic() > self._up:
            self._up = None
            self.site.start_worker()

    def _kill(self) -> bool:
        """Kills one of the targets that are alive. Returns False if there are none at the moment."""
        alive = self.project.processes()
        possible = {each.kind for each in alive} | ({"server"} if self._back is None else set())
        possible |= {"worker"} if self._up is None else set()
        targets = [each for each in TARGETS if each in possible or (each == "everything" and possible)]
        if not targets:
            return False
        target = self._draw.choice(targets)
        victims = [each for each in alive if target in (each.kind, "everything")]
        stage = next((each.stage for each in alive if each.stage), None)
        if target not in ("worker", "server", "everything"):
            victims = [self._draw.choice(victims)]
        if target in ("server", "everything") and self._back is None:
            minutes = self._draw.uniform(*self._minutes)
            self.server.kill()
            self.away.append(minutes)
            self._back = time.monotonic() + 60 * minutes
        if target in ("worker", "everything"):
            self.site.kill_worker()
            self._up = time.monotonic() + _UP
        while victims:
            self.counts.processes += sum(kill_process(each.pid) for each in victims)
            victims = self.project.processes() if target == "everything" else []
        self.counts.kills[target] += 1
        self.counts.stages[stage or "start, or between or after stages"] += 1
        print(f"{self.counts.kills.total()} {target} {stage or ''}", file=sys.stderr, flush=True)
        return True

    def _ended(self, run: UUID, state: str) -> bool:
        if state not in _GOOD:
            with self.site.client() as client:
                end = client.read_flow_run(run).state
            message = end.message if end is not None else None
            self.counts.failed[f"{state}: {without_numbers(message or '')}"] += 1
            return False
        self.counts.completed += 1
        return True

    def check(self, expected: dict[str, Any] | None) -> dict[str, Any]:
        """Looks at what a completed run has left, and returns its results."""
        while self._back is not None or self._up is not None:
            self._bring_back()
            time.sleep(0.5)
        self.counts.wrong += self.site.left()
        self.site.kill_worker()
        self.counts.wrong += self.project.left()
        self.site.start_worker()
        found = self.project.results()
        for name, value in (expected or {}).items():
            if found[name] != value:
                self.counts.wrong.append(f"{name}: {found[name]}, expected {value}")
        return found

    def end(self) -> None:
        self.site.end()
        self.server.kill()


def _figures(experiment: Experiment) -> dict[str, Any]:
    figures: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(experiment.counts).items()}
    return figures | {"server_away_minutes": [round(minutes, 2) for minutes in experiment.away]}


def _table(experiment: Experiment) -> str:
    counts = experiment.counts
    rows = [[f"killed: {target}", str(counts.kills[target])] for target in TARGETS]
    rows += [["kills", str(counts.kills.total())], ["processes killed", str(counts.processes)]]
    rows += [["minutes that the server was away", f"{sum(experiment.away):.1f}"]]
    rows += [["runs", str(counts.runs)], ["runs that completed", str(counts.completed)]]
    rows += [["runs that failed and were started again", str(counts.failed.total())]]
    rows += [["not as it should be", str(len(counts.wrong))]]
    return tables.markdown(["", "count"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--minutes", type=float, nargs=2, default=(1.0, 10.0), help="a server stays away for")
    parser.add_argument("--pause", type=float, help="seconds between two kills at most; by default half of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts there")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lcmlora-outages-"))
    began = time.monotonic()
    experiment = Experiment(folder, random.Random(options.seed), tuple(options.minutes))
    counts = experiment.counts
    try:
        if not experiment.run(0, 0.0):
            raise SystemExit(f"the undisturbed run failed: {counts}")
        seconds = time.monotonic() - began
        expected = experiment.check(None)
        print(f"undisturbed: {seconds:.0f} s, {json.dumps(expected)}", file=sys.stderr, flush=True)
        experiment.project.forget()
        while not counts.wrong:
            over = counts.kills.total() >= options.kills
            if experiment.run(options.kills, options.pause or seconds / 2):
                experiment.check(expected)
                if over:
                    break
                experiment.project.forget()
            elif over:
                counts.wrong.append("the run after the last kill failed")
    finally:
        experiment.end()
    figures = _figures(experiment) | {"sha256": expected["digests"][0], "undisturbed_seconds": round(seconds)}
    figures["seconds"] = round(time.monotonic() - began)
    print(_table(experiment))
    print(json.dumps(figures, indent=2))
    if options.json:
        write_json(options.json, figures)
    if counts.wrong:
        print(f"the folder is {folder}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(folder)
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
