"""Kills a run of the flow at random moments, many times: python -m benchmarks.kills --kills 200 --seed 0

A miniature project with the real dvc.yaml and the real trainer runs once undisturbed. A copy of it runs with `python -m
flows.retrain` while SIGKILL goes to one of TARGETS: the trainer, DVC, the flow, a supervisor, or all of these at once
with Prefect's temporary server. The moment is uniform between the start or the last kill and half the time of an
undisturbed run; finished stages stay finished, so kills come in all stages. A run that failed or was killed is started
again at once, while processes of the last one may still be ending. When a run completes, its registry and release are
compared with the undisturbed ones. Then outputs, caches and scratch folders are deleted, but not the registry and the
releases: the next run must come to the same version.

Prints what was killed in which stage, and the results; --json writes them to a file, too. The exit status is 1 if
anything was wrong.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import tables
from lcmlora.io.files import write_json
from lcmlora.io.private import runtime_folder
from lcmlora.releases import bundle
from tests.evaluation.clips import save_clip
from tests.support import projects
from tests.support.miniature import save_base

ROOT = Path(__file__).parents[1]
MODEL = "sd15"
TARGETS = ("trainer", "dvc", "flow", "supervisor", "everything")
STEPS = 40
_MARK = "LCMLORA_KILLS"  # environment: the project that a process works in
_STUCK = 600.0  # seconds after which a run counts as stuck


@dataclass(frozen=True)
class Process:
    """A process of a project."""

    pid: int
    kind: str  # of TARGETS, or "server", "watcher"
    stage: str | None  # of the trainer


@dataclass
class Counts:
    """The kills of a project, its runs, and what was wrong."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    stages: collections.Counter[str] = field(default_factory=collections.Counter)
    processes: int = 0  # killed
    runs: int = 0
    completed: int = 0
    failed: collections.Counter[str] = field(default_factory=collections.Counter)  # runs, by their last error
    resumed: int = 0  # distillations that continued from a checkpoint
    steps_kept: int = 0  # steps before those checkpoints
    wrong: list[str] = field(default_factory=list)


class Project:
    """A miniature project in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)
        projects.make(root, lambda name: save_base(root / "source" / name, name), "sqlite:///mlflow.db", MODEL)
        raw = yaml.safe_load((root / "params.yaml").read_text())
        raw["distill"] |= {"steps": STEPS, "checkpoint_every": 2, "validate_every": 10, "lr": 1e-5}
        # Features of few dimensions need few pictures. At two network evaluations even a student that is hardly trained
        # draws better than the solver, so it is promoted: by the figures alone, as its one test caption says nothing of
        # others.
        save_clip(root / "clip")
        raw["evaluation"] |= {"features": "clip", "features_source": "clip", "pictures": 24, "batch": 24}
        raw["evaluation"] |= {"solver_evaluations": [2], "student_steps": [2, 4]}
        raw["gate"] |= {"steps": 2, "min_retrieval": 0.0, "beyond_chance": False}
        raw["publish"] = {"to": "releases"}
        raw["flow"] = {"retry_seconds": 0.5}
        (root / "params.yaml").write_text(yaml.safe_dump(raw))
        shutil.copy(ROOT / "dvc.yaml", root)
        shutil.copytree(ROOT / "study", root / "study")
        for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
            subprocess.run(command, cwd=root, check=True)

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_", "LCMLORA_"))}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(self.root / "prefect"),
            "LCMLORA_GPU_LIMIT": f"kills-{self.root.parent.name}-{self.root.name}",
            "OMP_NUM_THREADS": "1",
            _MARK: str(self.root),
        }

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.retrain"]
        with (self.root / "log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    def forget(self) -> None:
        """Deletes all that a run makes, except the registry and the releases."""
        for name in ("data", "reference", "adapters", "evaluation", "metrics", "plots", "release", "scratch"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        shutil.rmtree(self.root / ".dvc/cache", ignore_errors=True)
        (self.root / "dvc.lock").unlink(missing_ok=True)

    def steps_done(self) -> int:
        """Returns the step of the checkpoint from which the next run continues."""
        found = [torch.load(path, weights_only=True)["step"] for path in self.root.glob("scratch/distill/*/*.pt")]
        return max(found, default=0)

    def processes(self) -> list[Process]:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if f"{_MARK}={self.root}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    continue
                found.append(_named(int(folder.name), (folder / "cmdline").read_text().split("\0")))
            except (OSError, ValueError):
                continue
        return found

    def results(self) -> dict[str, Any]:
        """Returns the versions and releases of the project."""
        from mlflow import MlflowClient

        uri = f"sqlite:///{self.root}/mlflow.db"
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        versions = client.search_model_versions(f"name = 'lcm-lora-{MODEL}'")
        folder = self.root / "releases" / MODEL
        prefixes = sorted(path for path in folder.glob("sha256-*"))
        return {
            "versions": [version.tags["sha256"] for version in versions],
            "champion": dict(client.get_registered_model(f"lcm-lora-{MODEL}").aliases),
            "releases": [path.name for path in prefixes if (path / "manifest.json").is_file()],
            "half releases": [path.name for path in prefixes if not (path / "manifest.json").is_file()],
            "temporary files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*.part")),
            "digests": [bundle.digest(path) for path in prefixes],
        }

    def left(self) -> list[str]:
        """Returns what is wrong 15 seconds after the last run: live processes, held locks, stale stages."""
        until = time.monotonic() + 15
        while (alive := self.processes()) and time.monotonic() < until:
            time.sleep(0.2)
        wrong = [f"{each.kind} {each.pid} is alive" for each in alive]
        limit = self.environment["LCMLORA_GPU_LIMIT"]
        locks = [*self.root.glob("scratch/**/.lock"), *self.root.glob(".dvc/tmp/*lock")]
        locks.append(runtime_folder() / f"{limit}.lock")
        wrong += [f"{path} is locked" for path in locks if path.name != "rwlock" and _is_locked(path)]
        command = [sys.executable, "-m", "dvc", "status"]
        asked = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        # `pretrain` is the project's own, whose files are not copied here; it is frozen. `resolve` always is due.
        stale = [line for line in asked.stdout.splitlines() if line.endswith(":") and not line.startswith(("\t", " "))]
        if asked.returncode or set(stale) - {"pretrain:", "resolve:"}:
            wrong.append(f"dvc status: {asked.returncode} {asked.stdout} {asked.stderr}")
        return wrong


def _named(pid: int, words: list[str]) -> Process:
    names = [Path(word).name for word in words]
    if "supervisor.py" in names:
        return Process(pid, "watcher" if "--marked" in words else "supervisor", None)
    if "uvicorn" in names:
        return Process(pid, "server", None)
    if "flows.retrain" in names or "prefect.engine" in names:
        return Process(pid, "flow", None)
    if "lcmlora" in names:
        return Process(pid, "trainer", names[names.index("lcmlora") + 1])
    return Process(pid, "dvc" if "dvc" in names else "other", None)


def _is_locked(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def disturb(project: Project, expected: dict[str, Any], seconds: float, kills: int, seed: int) -> Counts:
    """Runs the project until it was killed so many times and has then completed.

    Args:
        expected: the results of the undisturbed run.
        seconds: the time of the undisturbed run.
    """
    counts, draw = Counts(), random.Random(seed)
    while not counts.wrong:
        over = counts.kills.total() >= kills
        kept = project.steps_done()
        counts.resumed += kept > 0
        counts.steps_kept += kept
        flow = project.start()
        counts.runs += 1
        if not over:
            _kill(project, flow, counts, draw, seconds, kills)
        try:
            status = flow.wait(_STUCK)
        except subprocess.TimeoutExpired:
            counts.wrong.append(f"a run does not end: {project.log[-3000:]}")
            return counts
        if status == 0:
            counts.completed += 1
            found = project.results()
            counts.wrong += [
                f"{name}: {found[name]}, expected {expected[name]}"
                for name in expected
                if found[name] != expected[name]
            ]
            counts.wrong += project.left()
            if over:
                return counts
            project.forget()
        elif status != -signal.SIGKILL:
            counts.failed[_reason(project.log)] += 1
            if over:
                counts.wrong.append(f"the run after the last kill failed: {project.log[-3000:]}")
    return counts


def _kill(
    project: Project, flow: subprocess.Popen[bytes], counts: Counts, draw: random.Random, seconds: float, kills: int
) -> None:
    """Kills until the flow has ended, or the number of kills is reached."""
    while counts.kills.total() < kills:
        target = draw.choice(TARGETS)
        moment = time.monotonic() + draw.uniform(0, seconds / 2)
        while True:
            if flow.poll() is not None:
                return
            if time.monotonic() > moment:
                alive = project.processes()
                victims = [each for each in alive if target in (each.kind, "everything")]
                if victims:  # if there is no such process now, the next one is killed as it starts
                    break
            time.sleep(0.02)
        stage = next((each.stage for each in alive if each.stage), None)
        if target != "everything":
            victims = [draw.choice(victims)]
        counts.kills[target] += 1
        counts.stages[stage or ("between or after stages" if "Stage '" in project.log else "start")] += 1
        while victims:
            draw.shuffle(victims)
            for victim in victims:
                counts.processes += kill_process(victim.pid)
            victims = project.processes() if target == "everything" else []
        print(f"{project.root.name}: {counts.kills.total()} {target} {stage or ''}", file=sys.stderr, flush=True)


def kill_process(pid: int) -> bool:
    """Returns whether there was a process to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _reason(log: str) -> str:
    """Returns the last error of a run, with N for numbers."""
    lines = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
    return without_numbers(lines[-1] if lines else log[-300:])


def without_numbers(text: str) -> str:
    """Returns a text with N for numbers, so that equal errors are counted together."""
    return re.sub(r"\d+", "N", text)


def _undisturbed(root: Path) -> tuple[dict[str, Any], float]:
    project = Project(root)
    began = time.monotonic()
    status = project.start().wait(_STUCK)
    seconds = time.monotonic() - began
    if status != 0:
        raise SystemExit(f"the undisturbed run failed: {project.log}")
    if wrong := project.left():
        raise SystemExit(f"after the undisturbed run: {wrong}")
    return project.results(), seconds


def _sum(all_counts: list[Counts]) -> Counts:
    total = Counts()
    for counts in all_counts:
        for name, value in vars(counts).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="projects among which the kills are divided")
    parser.add_argument("--json", type=Path, help="write the counts there")
    parser.add_argument("--keep", action="store_true", help="leave the projects' folders")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lcmlora-kills-"))
    began = time.monotonic()
    expected, seconds = _undisturbed(folder / "undisturbed")
    print(f"undisturbed: {seconds:.0f} s, {json.dumps(expected)}", file=sys.stderr, flush=True)
    projects_ = [Project(folder / f"disturbed-{number}") for number in range(options.at_once)]
    shares = [options.kills // options.at_once + (n < options.kills % options.at_once) for n in range(options.at_once)]
    with concurrent.futures.ThreadPoolExecutor(options.at_once) as threads:
        work = [
            threads.submit(disturb, project, expected, seconds, share, options.seed + number)
            for number, (project, share) in enumerate(zip(projects_, shares, strict=True))
        ]
        counts = _sum([each.result() for each in work])
    figures: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in vars(counts).items()}
    figures |= {"sha256": expected["digests"][0], "seconds": round(time.monotonic() - began)}
    figures["undisturbed_seconds"] = round(seconds)
    print(_table(counts))
    print(json.dumps(figures, indent=2))
    if options.json:
        write_json(options.json, figures)
    if counts.wrong:
        print(f"the folders are in {folder}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(folder)
    return 1 if counts.wrong else 0


def _table(counts: Counts) -> str:
    rows = [[f"killed: {target}", str(counts.kills[target])] for target in TARGETS]
    rows += [[f"within: {stage}", str(count)] for stage, count in counts.stages.most_common()]
    rows += [["kills", str(counts.kills.total())], ["processes killed", str(counts.processes)]]
    rows += [["runs", str(counts.runs)], ["runs that completed", str(counts.completed)]]
    rows += [["runs that failed and were started again", str(counts.failed.total())]]
    rows += [["distillations resumed", str(counts.resumed)], ["steps that these kept", str(counts.steps_kept)]]
    rows += [["not as it should be", str(len(counts.wrong))]]
    return tables.markdown(["", "count"], rows)


if __name__ == "__main__":
    sys.exit(main())
