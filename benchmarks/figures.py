"""The emoji base's figures in README.md and docs: python -m benchmarks.figures [--check].

Writes what stands there between two comments from metrics/emoji.json and compatibility/emoji.json, docs/grid.png from
the evaluation's contact sheet, and on pages with figures of longer experiments of which adapter and captions these are
(benchmarks/origins.py). Run it after `dvc repro evaluate@emoji`. --check writes nothing and fails if a page has other
figures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import origins, tables
from lcmlora.errors import UserError
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import REAL, Key, Metrics
from lcmlora.project import Project

ADAPTER = "lcmlora.adapter"  # a PNG's text: the SHA-256 of the weights
GRID = Path("docs/grid.png")
_SIGN = "\N{MINUS SIGN}"
_AGREEMENT = {"agree": "agree", "disagree": "disagree", "undecided": "within chance", None: ""}
_RANK = {"student": "the student is nearer", "solver": "the solver is nearer", "neither": "neither is"}


def readme(metrics: Metrics) -> str:
    """Returns the README's table of figures and the sentences below it."""
    told = (
        "Excess is the Fréchet distance to the teacher's pictures, less its distance to itself with other seeds; "
        f"smaller is better. {_ranks(metrics)} Figures of {metrics.drawn}, with their 95 % intervals; this table by "
        "`python -m benchmarks.figures`."
    )
    return f"{_comparison(metrics, whole=False)}\n{told}\n"


def pairs(metrics: Metrics) -> str:
    """Returns the comparison of student and best solver for docs/evaluation.md, and the sentences below it."""
    return f"{_comparison(metrics, whole=True)}\n{_sentences(metrics)}"


def _comparison(metrics: Metrics, whole: bool) -> str:
    """Returns the table of student and best solver, `whole` with the second features and the distance to reality."""
    savings, check = bool(metrics.savings), whole and metrics.check is not None
    real = (metrics.distance_real or {}) if whole else {}
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
    return tables.markdown(head, rows, words=2)


def _ranks(metrics: Metrics) -> str:
    """Returns at how many network evaluations who is nearer to the teacher by more than chance."""
    found: dict[str, list[int]] = {}
    for student, won in sorted(metrics.advantage.items(), key=lambda pair: metrics.network_evaluations[pair[0]]):
        low, high = won.interval or (-math.inf, math.inf)
        winner = "student" if high < 0 else "solver" if low > 0 else "neither"
        found.setdefault(winner, []).append(metrics.network_evaluations[student])
    parts = [f"at {_listed(numbers)} evaluations {_RANK[winner]}" for winner, numbers in found.items()]
    return f"By more than chance, {'; '.join(parts)}."


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _sentences(metrics: Metrics) -> str:
    student = metrics.pairs[len(metrics.pairs) // 2][1]
    teacher, retrieval = metrics.teacher, metrics.retrieval
    steps = metrics.label(student).partition(", ")[2]
    told = [
        f"Excess is the Fréchet distance to the teacher's pictures less its [floor](glossary.md#evaluation) of "
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


def compatibility(found: Compatibility, adapter: str | None) -> str:
    """Returns the table of additions for docs/compatibility.md, and the sentences around it.

    Args:
        adapter: of today.
    """
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
    earlier = origins.of_adapter("compatibility", found.adapter, adapter or "")
    return "\n".join(filter(None, [earlier, tables.markdown(head, rows), "".join(failures + left_out), source]))


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


# Page, the name of the comments between which the text stands, and what writes it.
BLOCKS: list[tuple[Path, str, Callable[[Metrics], str]]] = [
    (Path("README.md"), "figures", readme),
    (Path("docs/evaluation.md"), "pairs", pairs),
    (Path("docs/evaluation.md"), "figures", page),
]


def _texts(project: Project) -> dict[tuple[Path, str], str]:
    """Returns what is to stand on the pages, by page and block."""
    metrics = Metrics.read(project.metrics(origins.MODEL))
    found = {(path, block): text(metrics) for path, block, text in BLOCKS}
    if project.compatibility(origins.MODEL).exists():
        tried = Compatibility.read(project.compatibility(origins.MODEL))
        found[Path("docs/compatibility.md"), "figures"] = compatibility(tried, metrics.adapter)
    return found


def save_picture(picture: Image.Image, path: Path, adapter: str | None) -> None:
    """Writes a picture of an adapter's results as PNG, with the SHA-256 of the adapter's weights in it."""
    facts = PngInfo()
    facts.add_text(ADAPTER, adapter or "")
    picture.save(path, pnginfo=facts, optimize=True)


def adapter_of(path: Path) -> str | None:
    """Returns the SHA-256 of the adapter whose results a picture shows; None where it does not say."""
    with Image.open(path) as picture:
        found = picture.info.get(ADAPTER)
    return found if isinstance(found, str) else None


def stale(project: Project) -> list[Path]:
    """Returns the pages and pictures that are not those of the emoji base as it is measured now."""
    pages = {path for (path, block), text in _texts(project).items() if tables.read(path, block) != text}
    adapter = Metrics.read(project.metrics(origins.MODEL)).adapter
    return [*sorted(pages), *origins.stale(project), *([GRID] if adapter_of(GRID) != adapter else [])]


def write(project: Project) -> None:
    """Writes the figures into the pages, the sentences on their origin, and the contact sheet.

    Raises:
        UserError: the contact sheet is another adapter's, and this machine has not the present one.
    """
    for (path, block), text in _texts(project).items():
        tables.write(path, text, block)
    origins.write(project)
    adapter, sheet = Metrics.read(project.metrics(origins.MODEL)).adapter, project.evaluation(origins.MODEL)
    if (sheet / "grid.png").exists():
        with Image.open(sheet / "grid.png") as picture:
            save_picture(picture, GRID, adapter)
    elif adapter_of(GRID) != adapter:
        raise UserError(f"{sheet}: no such folder; run `dvc repro evaluate@{origins.MODEL}`, then this command again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a page has other figures")
    arguments = parser.parse_args()
    project = Project()
    found = ", ".join(map(str, stale(project)))
    if arguments.check:
        if found:
            raise SystemExit(f"{found}: other figures than those of the emoji base; python -m benchmarks.figures")
        return
    write(project)
    print(f"{found or 'nothing'}: written")


if __name__ == "__main__":
    main()
