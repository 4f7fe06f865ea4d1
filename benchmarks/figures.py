"""The emoji base's figures in README.md and docs: python -m benchmarks.figures [--check].

Writes what stands there between two comments from metrics/emoji.json and compatibility/emoji.json, and docs/grid.png
from the evaluation's contact sheet. Run it after `dvc repro evaluate@emoji`. --check writes nothing and fails if a page
has other figures.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from benchmarks import tables
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import REAL, Key, Metrics
from lcmlora.project import Project

_BLOCK = "figures"
_SIGN = "\N{MINUS SIGN}"
_AGREEMENT = {"agree": "agree", "disagree": "disagree", "undecided": "within chance", None: ""}


def readme(metrics: Metrics) -> str:
    """Returns the README's table of figures and the sentences below it."""
    check, savings, real = metrics.check is not None, bool(metrics.savings), metrics.distance_real or {}
    head = ["network evaluations", "best solver", "its excess", "the student's", "difference"]
    head += ["same distance takes solvers"] * savings + ["second features"] * check
    head += ["to real pictures: solver", "student"] * bool(real)
    rows = []
    for rival, student in metrics.pairs:
        won = metrics.advantage[student]
        rows.append(
            [
                str(metrics.network_evaluations[student]),
                _solver(metrics, rival),
                _number(metrics.excess[rival]) if rival else "",
                f"**{_number(metrics.excess[student])}**",
                f"{_number(won.difference)}{_span(won.interval)}",
                *([f"{metrics.savings[student].text} times as many"] if savings else []),
                *([_AGREEMENT[metrics.agreement(student)]] if check else []),
                *(["" if key is None else _number(real[key]) for key in (rival, student)] if real else []),
            ]
        )
    return tables.markdown(head, rows, words=2) + "\n" + _sentences(metrics)


def _sentences(metrics: Metrics) -> str:
    student = metrics.pairs[len(metrics.pairs) // 2][1]
    teacher, retrieval = metrics.teacher, metrics.retrieval
    steps = metrics.label(student).partition(", ")[2]
    told = [
        f"Excess is the Fréchet distance to the teacher's pictures less its [floor](docs/glossary.md#evaluation) of "
        f"{_number(metrics.floor)}; smaller is better. In {steps} the student's caption "
        f"retrieval is {retrieval[student]:.3f}, the teacher's in {teacher.steps} {retrieval[teacher]:.3f}"
        + (f", that of real pictures {retrieval[Key(REAL)]:.3f}." if REAL in retrieval else ".")
    ]
    if metrics.distance_real:
        told.append(f"The teacher's distance to real pictures is {_number(metrics.distance_real[teacher])}.")
    where = f"{metrics.drawn}, seed {metrics.seed}, features {metrics.features.name}"
    second = f", second features {metrics.check.features.name}" if metrics.check else ""
    bounds = f", {metrics.intervals.resamples} bootstrap resamples" if metrics.intervals else ""
    told.append(
        f"(`metrics/emoji.json`, written by `dvc repro evaluate@emoji`: {where}{second}{bounds}; this table by "
        "`python -m benchmarks.figures`.)"
    )
    return " ".join(told) + "\n"


def page(metrics: Metrics) -> str:
    """Returns the table of all sets for docs/evaluation.md."""
    real, cost = metrics.distance_real or {}, metrics.network_evaluations
    head = ["", "settings", "evaluations", "excess", "to real pictures", "retrieval", "diversity"]
    head += ["excess, second features"] if metrics.check else []
    rows = []
    for key in sorted(cost, key=lambda key: (cost[key], key)):
        second = metrics.check.excess.get(key) if metrics.check else None
        rows.append(
            [
                key.name,
                metrics.baselines[key].text if key in metrics.baselines else metrics.count_label(key),
                str(cost[key]),
                _number(metrics.excess[key]) + _span(metrics.interval("excess", key)) if key in metrics.excess else "0",
                _number(real[key]) if key in real else "",
                f"{metrics.retrieval[key]:.3f}",
                f"{metrics.diversity[key]:.3f}" if key in metrics.diversity else "",
                *([_number(second) if second is not None else ""] if metrics.check else []),
            ]
        )
    return tables.markdown(head, rows, words=2)


def compatibility(found: Compatibility) -> str:
    """Returns the table of additions for docs/compatibility.md, and the sentences below it."""
    students = found.students
    head = ["addition", *(f"{key.steps} step{'' if key.steps == 1 else 's'}" for key in students)]
    rows = []
    for tried in found.rows:
        cells = [tried.cells[key] for key in students]
        rows.append(
            [
                tried.title,
                *(
                    ("" if cell.excess is None else _number(cell.excess))
                    + _span(cell.interval)
                    + (" **failed**" if cell.failed else "")
                    for cell in cells
                ),
            ]
        )
    failures = [f"* {found.tried[name].title}, {key.label}: {reason}.\n" for name, key, reason in found.failures]
    left_out = [f"* {name} was not tried: {reason}.\n" for name, reason in found.left_out.items()]
    where = (
        f"{found.pictures} pictures of {found.prompts} captions in each set, teacher {found.teacher_steps} steps at "
        f"guidance {found.guidance_scale:g}, seeds {found.seeds['teacher']} and {found.seeds['compared']}, features "
        f"{found.features.name}, {found.resamples} bootstrap resamples, adapter {found.adapter[:12]}"
    )
    source = f"(`compatibility/emoji.json`: {where}; this table by `python -m benchmarks.figures`.)\n"
    return "\n".join(filter(None, [tables.markdown(head, rows), "".join(failures + left_out), source]))


def _solver(metrics: Metrics, key: Key | None) -> str:
    if key is None:
        return ""
    return f"{key.name}, {metrics.baselines[key].text}" if key in metrics.baselines else metrics.label(key)


def _number(value: float) -> str:
    """Returns three figures, or all before the point."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return text.replace("-", _SIGN)


def _span(interval: tuple[float, float] | None) -> str:
    return f" ({_number(interval[0])} to {_number(interval[1])})" if interval else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a page has other figures")
    arguments = parser.parse_args()
    project = Project()
    metrics = Metrics.read(project.metrics("emoji"))
    pages = {Path("README.md"): readme(metrics), Path("docs/evaluation.md"): page(metrics)}
    if project.compatibility("emoji").exists():
        pages[Path("docs/compatibility.md")] = compatibility(Compatibility.read(project.compatibility("emoji")))
    stale = [str(path) for path, text in pages.items() if tables.read(path, _BLOCK) != text]
    if arguments.check:
        if stale:
            raise SystemExit(
                f"{', '.join(stale)}: other figures than those of the emoji base; python -m benchmarks.figures"
            )
        return
    for path, text in pages.items():
        tables.write(path, text, _BLOCK)
    sheet = project.evaluation("emoji") / "grid.png"
    if sheet.exists():
        shutil.copyfile(sheet, "docs/grid.png")
    print(f"{', '.join(stale) or 'nothing'}: written")


if __name__ == "__main__":
    main()
