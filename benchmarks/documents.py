"""The documents that show the emoji base's adapter, made again: python -m benchmarks.documents [PART ...]

Without PARTs, all that are not of the present adapter (metrics/emoji.json), those that cost least first. --list says
for each part of what it is and what it costs, and makes nothing. Parts:

  figures     README.md, docs/evaluation.md, docs/grid.png, and on every page of which adapter its figures are
  report      docs/report.png, the top of the release's report page; needs chromium
  compatibility
              docs/compatibility.md: the adapter together with what people add to a base
  universal   docs/universal.md: the adapter added to styles and a checkpoint
  objectives  docs/objectives.md: the objectives over three seeds
  sources     docs/sources.md: with pictures or without, at equal time
  polish      docs/polish.md: polish against more of the same distillation, over three seeds

Evaluation and release come from `dvc repro`, which runs what is stale. Everything can be stopped and started again:
stages go on from their last batch, and the runs of a long part are kept in scratch/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

from benchmarks import figures, origins
from lcmlora import config, stages
from lcmlora.bases import folders
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import Metrics
from lcmlora.io.files import write_json
from lcmlora.io.parsing import read_yaml
from lcmlora.project import Project
from lcmlora.releases.bundle import PROVENANCE, REPORT, Provenance

MODEL = origins.MODEL
PICTURE = Path("docs/report.png")
_WINDOW = (1440, 1225)  # CSS pixels of the report's picture
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


class Part(NamedTuple):
    """One or several documents, and how they are made again.

    cost: on two cores of a Xeon, once the stages before it have run.
    state: returns what is not of the present adapter, in words; nothing if all is.
    """

    cost: str
    state: Callable[[Project], str]
    make: Callable[[Project], None]


def _run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    if status := subprocess.run(command, check=False).returncode:
        raise UserError(f"{' '.join(command)}: ended with {status}; run this command again to go on")


def _python(module: str, *arguments: str) -> None:
    _run(sys.executable, "-m", module, *arguments)


def _lcmlora(*arguments: str) -> None:
    _python("lcmlora", *arguments)


def _state_of_figures(project: Project) -> str:
    return ", ".join(map(str, figures.stale(project)))


def _make_figures(project: Project) -> None:
    if not (project.evaluation(MODEL) / "grid.png").exists():
        _python("dvc", "repro", f"evaluate@{MODEL}")
    figures.write(project)


def _state_of_report(project: Project) -> str:
    adapter = Metrics.read(project.metrics(MODEL)).adapter
    return "" if figures.adapter_of(PICTURE) == adapter else str(PICTURE)


def _make_report(project: Project) -> None:
    folder = project.release(MODEL)
    _python("dvc", "repro", f"package@{MODEL}")
    with tempfile.TemporaryDirectory() as temporary:
        shot = Path(temporary, "report.png")
        screenshot(folder / REPORT, shot)
        with Image.open(shot) as picture:
            figures.save_picture(picture.convert("RGB"), PICTURE, Provenance.read(folder / PROVENANCE).adapter)


def screenshot(page: Path, out: Path, size: tuple[int, int] = _WINDOW) -> None:
    """Writes a PNG of the top of a page, as Chromium shows it in a window of this size in CSS pixels.

    Raises:
        UserError: there is no Chromium, or it writes no picture.
    """
    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if found is None:
        raise UserError(f"{', '.join(_CHROMIUM)}: none is installed, and the report's picture needs one")
    # Chromium's own sandbox refuses to run for root; the page is ours, and its policy lets it load nothing.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [found, "--headless", *sandbox, "--hide-scrollbars", "--disable-gpu", f"--screenshot={out}"]
    command += [f"--window-size={size[0]},{size[1]}", page.absolute().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not out.exists():
        raise UserError(f"{found}: wrote no picture of {page}: {' '.join(done.stderr.split())[-300:]}")


def _make_universal(project: Project) -> None:
    """Runs the study of the model, which params.yaml need not ask for. What a style or a checkpoint is made of decides
    where its mark lies, so that one which is finished is not made again."""
    raw = read_yaml(project.params_file)
    raw["study"]["models"] = [MODEL]
    work = project.scratch("documents")
    work.mkdir(parents=True, exist_ok=True)
    params = work / "params.yaml"
    params.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    settings = config.load(params)
    options = ("--params", str(params), "--project", str(project.root))
    for kind, name in settings.studied(MODEL):
        for stage in (kind, "alone"):
            done = work / f"{stage}-{name}-{_key(project, settings, kind, name)}.json"
            if not done.exists():
                _lcmlora(*options, stage, MODEL, name)
                write_json(done, {})
    _python("dvc", "repro", f"evaluate@{MODEL}")
    _lcmlora(*options, "study", MODEL)
    _python("benchmarks.universal", MODEL)


def _key(project: Project, settings: config.Config, kind: config.Kind, name: str) -> str:
    runs = [stages.Run(stage, MODEL, name) for stage in (kind, "alone")]
    decisive = {run.stage: [stages.algorithms(run.stage), stages.decisive_settings(settings, run)] for run in runs}
    return config.digest(decisive, folders.identity(settings.base(MODEL), project.base(MODEL)))[:12]


def _state_of_compatibility(project: Project) -> str:
    tried, adapter = Compatibility.read(project.compatibility(MODEL)), Metrics.read(project.metrics(MODEL)).adapter
    return "" if tried.adapter == adapter else f"adapter {tried.adapter[:12]}"


def _make_compatibility(project: Project) -> None:
    _lcmlora("compatibility", MODEL)
    _python("dvc", "repro", "--single-item", f"package@{MODEL}")  # the release has the table, too
    figures.write(project)


def _make_objectives(project: Project) -> None:
    _python("dvc", "repro", f"encode@{MODEL}", f"reference@{MODEL}")
    _python("benchmarks.objectives", MODEL)


def _make_sources(project: Project) -> None:
    _python("dvc", "repro", f"encode@{MODEL}", f"reference@{MODEL}")
    _python("benchmarks.sources", MODEL, "--seconds", "150")


def _make_polish(project: Project) -> None:
    _python("dvc", "repro", f"encode@{MODEL}", f"reference@{MODEL}")
    long = {"steps": 5600, "ema": 0.995}
    # About as many network evaluations as the 150 steps with two updates of the fake score.
    others = [
        {"steps": 190, "fake_updates": 1},
        {"steps": 91, "fake_updates": 5},
        {"steps": 170, "student_steps": [1]},
        {"steps": 130, "student_steps": [4]},
        {"consistency": 0.0},
        {"consistency": 0.3},
        {"lr": 2.5e-4, "fake_lr": 5e-4, "w": 2.0},
        {"anchor": 0.05},
    ]
    settings = {"--polish": {"steps": 150}, "--others": others, "--long": long}
    _python("benchmarks.polish", MODEL, *(text for key, value in settings.items() for text in (key, json.dumps(value))))


def _state_of_page(name: str) -> Callable[[Project], str]:
    def state(project: Project) -> str:
        return ", ".join(origins.differences(origins.read(name), origins.present(project)))

    return state


PARTS: dict[str, Part] = {
    "figures": Part("seconds", _state_of_figures, _make_figures),
    "report": Part("a minute", _state_of_report, _make_report),
    "compatibility": Part("38 minutes", _state_of_compatibility, _make_compatibility),
    "universal": Part("34 minutes, 25 of them once for each base", _state_of_page("universal"), _make_universal),
    "sources": Part(
        "about an hour: 12 runs of 150 s, and two evaluations of each", _state_of_page("sources"), _make_sources
    ),
    "objectives": Part(
        "about 90 minutes: 12 distillations, and two evaluations of each",
        _state_of_page("objectives"),
        _make_objectives,
    ),
    "polish": Part(
        "about four hours: 10 trainings, and two evaluations of each",
        _state_of_page("polish"),
        _make_polish,
    ),
}


def chosen(names: Sequence[str], project: Project) -> list[str]:
    """Returns these parts, or all that are not of the present adapter, in the order of PARTS."""
    return [name for name, part in PARTS.items() if (name in names if names else part.state(project))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--list", action="store_true", help="only say what each part is of, and what it costs")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    project = Project()
    for name, part in PARTS.items():
        print(f"{name:13} {part.cost}\n{'':13} {part.state(project) or 'of the present adapter'}")
    if options.list:
        return
    try:
        for name in chosen(options.parts, project):
            print(f"\n{name}: {PARTS[name].cost}", flush=True)
            PARTS[name].make(project)
            if name in origins.PAGES:
                print(f"docs/{name}.md: its sentences quote figures of the tables; read them again", flush=True)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
