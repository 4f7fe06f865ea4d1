"""The outcome of each model of a run: table on the terminal, name of the flow's end, artifacts in Prefect."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from rich.console import Console
from rich.table import Table

from lcmlora.config import Config
from lcmlora.evaluation.figures import STUDENT, Key, Metrics
from lcmlora.evaluation.gate import unmeasured_diversity
from lcmlora.io.terminal import cell, shown
from lcmlora.io.terminal import markdown as plain
from lcmlora.project import Project
from lcmlora.registry import tracking
from lcmlora.registry.approval.standing import Standing
from lcmlora.registry.costs.spent import Spent
from lcmlora.releases.stores.store import page_of
from lcmlora.tasks.dvc import StageResult
from lcmlora.tasks.output import slug

# The flow ends as the first of these that one of its models ended with.
ENDS = (
    *("Failed", "Rejected", "OverBudget", "AwaitingApproval", "NotPushed"),
    *("Promoted", "Registered", "Reproduced", "UpToDate"),
)
UNSENT = "NotPushed"  # of the flow alone, and of no model: DVC's remote did not take the results
NOT_PUSHED = "results are on this machine alone, and the next run sends them"

STAGES_KEY = "stages-%"  # of the artifacts with the seconds of stages, as a pattern of SQL

_CARD, _SHEET = "README.md", "grid.png"  # of a release
_PICTURE_BYTES = 1_000_000  # largest picture in a card; the report page has larger ones


@dataclass
class Outcome:
    """The outcome of one model, which is filled in while the flow runs."""

    model: str
    ran: list[StageResult] = field(default_factory=list)
    up_to_date: list[str] = field(default_factory=list)  # stages
    differing: list[str] | None = None  # stages whose entry in dvc.lock differs from Git's; None where Git has none
    running: str | None = None  # stage
    figures: Metrics | None = None
    champion: str | None = None  # the version that the gate compared with
    gate_failures: list[str] | None = None
    version: str | None = None  # lcm-lora-emoji/3
    deleted: bool = False  # a person deleted this version, and it is not registered again
    aliases: list[str] = field(default_factory=list)
    created: bool = False  # the version, by this run
    promoted: bool = False  # by this run
    approval: Standing | None = None  # what a person said of the version, or since when one is asked
    awaiting: bool = False  # the version waits for approval
    asked: bool = False  # for approval, by this run
    run_id: str | None = None
    uris: list[str | None] = field(default_factory=list)  # of the release, one for each store; None where it failed
    changed: list[str] = field(default_factory=list)  # what a person changed while the run went on
    spent: Spent | None = None  # on devices, since the last version
    over_budget: str | None = None  # why a scheduled run has left the model to a person
    errors: list[str] = field(default_factory=list)
    not_pushed: str | None = None  # why the results could not be sent to DVC's remote

    @property
    def published(self) -> list[str]:
        """The addresses at which the release is published."""
        return [uri for uri in self.uris if uri]

    @property
    def end(self) -> str:
        """One of ENDS. `Reproduced`: stages ran, and gave an adapter that was registered before."""
        if self.errors:
            return "Failed"
        if self.gate_failures and (self.created or self.ran):
            return "Rejected"
        if self.over_budget:
            return "OverBudget"
        if self.awaiting and (self.asked or self.ran):
            return "AwaitingApproval"
        if self.promoted:
            return "Promoted"
        if self.created:
            return "Registered"
        return "Reproduced" if self.ran else "UpToDate"

    @property
    def line(self) -> str:
        """Model and end, with the version or the errors, in one line."""
        return f"{self.model}: " + ("; ".join(self.errors) or " ".join(filter(None, (self.end, self.version))))


def end(outcomes: Sequence[Outcome]) -> str:
    """Returns the name of the flow's end."""
    ends = [outcome.end for outcome in outcomes] + [UNSENT for outcome in outcomes if outcome.not_pushed]
    return min(ends, key=ENDS.index, default="UpToDate")


def rows(outcome: Outcome, gate_steps: int) -> list[tuple[str, str]]:
    """Returns the rows of a model's table: name and value."""

    def short(stage: str) -> str:
        return stage.replace(f"@{outcome.model}", "")

    pairs = [("ran", ", ".join(f"{short(r.stage)} {r.seconds:.0f} s" for r in outcome.ran) or "nothing")]
    pairs += [("up to date", ", ".join(map(short, outcome.up_to_date)))] if outcome.up_to_date else []
    if outcome.ran and outcome.differing is not None:
        pairs.append(_compared(list(map(short, outcome.differing)), outcome.figures))
    if outcome.figures is not None:
        pairs += _figures(outcome.figures, gate_steps)
        if reason := unmeasured_diversity(outcome.figures, Key.of(STUDENT, gate_steps)):
            pairs.append(("diversity", f"not measured: {reason}"))
    if outcome.gate_failures is not None:
        passed = "passed" + (f", compared with {outcome.champion}" if outcome.champion else "")
        pairs += [("gate", f"failed: {line}") for line in outcome.gate_failures] or [("gate", passed)]
    if outcome.approval is not None:
        pairs.append(("approval", outcome.approval.text))
    if outcome.deleted:
        advice = f"not registered again (`lcmlora registry readmit {outcome.model}` allows it)"
        pairs.append(("version", f"{outcome.version} was deleted in MLflow: {advice}"))
    elif outcome.version:
        aliases = "".join(f" @{alias}" for alias in sorted(outcome.aliases))
        pairs.append(("version", outcome.version + aliases + (" (new)" if outcome.created else "")))
    if outcome.spent is not None:
        pairs.append(("cost", outcome.spent.line))
    if outcome.over_budget:
        pairs.append(("budget", outcome.over_budget))
    if outcome.published:
        pairs += [("release", _relative(uri)) for uri in outcome.published]
    elif outcome.figures is not None:
        pairs.append(("release", f"release/{outcome.model}, not published"))
    pairs += [("not pushed", f"{outcome.not_pushed}; {NOT_PUSHED}")] if outcome.not_pushed else []
    pairs += [("changed", f"while it ran: {change}") for change in outcome.changed]
    return pairs + [("error", error) for error in outcome.errors]


def _compared(differing: list[str], figures: Metrics | None) -> tuple[str, str]:
    """Returns the row that says whether the results are those in Git, so that there is nothing to commit."""
    if differing:
        return "new", f"{', '.join(differing)}: not as in Git, commit dvc.lock, metrics and plots"
    digest = f", adapter {figures.adapter[:12]}" if figures and figures.adapter else ""
    return "reproduced", f"all as in Git, nothing to commit{digest}"


def _figures(figures: Metrics, gate_steps: int) -> list[tuple[str, str]]:
    """Returns the rows with the student's excess beside that of the best solver of the same cost, and the retrieval."""
    pairs = []
    excess, retrieval, gated = figures.excess, figures.retrieval, Key.of(STUDENT, gate_steps)
    for steps in sorted({2, gate_steps}):
        student, best = Key.of(STUDENT, steps), min(figures.solvers_at(steps), key=excess.__getitem__, default=None)
        if student in excess:
            settings = f": {figures.baselines[best].text}" if best in figures.baselines else ""
            beside = f", best solver {excess[best]:.1f} ({best}{settings})" if best else ", no solver"
            pairs.append((f"excess at {steps} evaluations", f"student {excess[student]:.1f}{beside}"))
    if gated in figures.savings:
        pairs.append(("the same distance", f"takes solvers {figures.savings[gated].text} times as many evaluations"))
    if agreement := figures.agreement(gated):
        ranks = {"agree": "rank both alike", "disagree": "rank both the other way round", "undecided": "within chance"}
        pairs.append(("second features", ranks[agreement]))
    measured = [key for key in (gated, figures.teacher) if key in retrieval]
    return [*pairs, ("retrieval@1", ", ".join(f"{key} {retrieval[key]:.3f}" for key in measured))]


def _relative(uri: str) -> str:
    """Returns a relative path for an address in the current folder, any other address as it is."""
    path = Path(urlparse(uri).path)
    return str(path.relative_to(Path.cwd())) if uri.startswith("file:") and path.is_relative_to(Path.cwd()) else uri


def print_table(lines: Sequence[tuple[str, str, str]], total: str) -> None:
    """Prints model, name and value in three columns on standard output."""
    table = Table(show_header=False, caption=total)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for number, (model, name, value) in enumerate(lines):
        first = number == 0 or lines[number - 1][0] != model
        if first and number:
            table.add_section()
        table.add_row(*map(cell, (model if first else "", name, value)))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def leave_artifacts(outcomes: Sequence[Outcome], settings: Config, total: str) -> None:
    """Leaves the table, and each model's card, figures and links, as artifacts on Prefect's page of the run."""
    lines = [(outcome.model, *row) for outcome in outcomes for row in rows(outcome, settings.gate.steps)]
    table = f"{markdown(('model', '', ''), lines)}\n\n{plain(total)}"
    create_markdown_artifact(table, key="retrain", description="Outcome of each model")
    for outcome in outcomes:
        key = slug(outcome.model)
        if outcome.figures is not None:
            create_table_artifact(_methods(outcome.figures), key=f"figures-{key}", description=_counts(outcome.figures))
        if outcome.ran:
            seconds = [{"stage": result.stage, "seconds": result.seconds} for result in outcome.ran]
            create_table_artifact(seconds, key=stages_key(outcome.model), description="Stages that ran")
        if (release := packaged(outcome)) is not None:
            text = card(release)
            create_markdown_artifact(text, key=f"card-{key}", description=f"Model card of {outcome.model}'s release")
        if outcome.awaiting and outcome.version:
            text = _approval_page(outcome, settings)
            create_markdown_artifact(text, key=f"approval-{key}", description=f"{outcome.version} waits for approval")
        page = tracking.run_page(settings.registry, outcome.run_id) if outcome.run_id else None
        if page:
            create_link_artifact(page, link_text=f"MLflow run of {shown(outcome.version)}", key=f"mlflow-{key}")
        for number, uri in enumerate(outcome.published):
            mark = f"-{number + 1}" if number else ""
            create_link_artifact(
                page_of(uri), link_text=f"Release of {shown(outcome.version)}", key=f"release-{key}{mark}"
            )


def stages_key(model: str) -> str:
    """Returns the key of the artifact with the seconds of the stages that ran last; `lcmlora metrics` reads it."""
    return STAGES_KEY.replace("%", slug(model))


def _approval_page(outcome: Outcome, settings: Config) -> str:
    """Returns what a person needs to decide on a version that waits for approval: figures, pictures, what to type."""
    assert outcome.version is not None
    alias = settings.registry.alias
    rows = _figures(outcome.figures, settings.gate.steps) if outcome.figures else []
    waiting = outcome.approval.deadline(settings.gate.approval_days) if outcome.approval else None
    until = f" It counts as rejected after {waiting:%Y-%m-%d %H:%M} UTC." if waiting else ""
    page = tracking.run_page(settings.registry, outcome.run_id) if outcome.run_id else None
    links = " ".join(map(plain, filter(None, [page, *outcome.published])))
    compared = f", also beside {plain(outcome.champion)}, the {alias}" if outcome.champion else f"; there is no {alias}"
    return "\n\n".join(
        filter(
            None,
            [
                f"# {plain(outcome.version)} waits for a person",
                f"It passed the gate{compared}.{until}",
                markdown(("figure", "student, and what it stands beside"), rows),
                _embedded(Project().release(outcome.model) / _SHEET, "contact sheet"),
                f"To make it {alias}: `lcmlora approve {outcome.version} --reason ...`, or run the deployment "
                f"`approve` with the reference `{outcome.version}`. To turn it down: `lcmlora reject {outcome.version} "
                "--reason ...`, or run the deployment `reject`.",
                f"Figures, card and report: {links}" if links else "",
            ],
        )
    )


def packaged(outcome: Outcome) -> Path | None:
    """Returns the folder of the release that a run has packaged, or has found up to date; None where it has not.

    A run that failed before leaves the release of an earlier one in the folder.
    """
    release = Project().release(outcome.model)
    return release if outcome.figures is not None and (release / _CARD).is_file() else None


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown. Its cells are escaped, so that they show as text."""
    rows = [list(map(plain, titles)), ["---"] * len(titles), *(list(map(plain, line)) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def card(folder: Path) -> str:
    """Returns a release's card without its front matter and with its pictures embedded, for Prefect's pages."""
    text = (folder / _CARD).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"!\[([^\]]*)\]\(([^)]+)\)", lambda found: _embedded(folder / found[2], found[1]), text)


def _embedded(path: Path, caption: str) -> str:
    if not path.is_file() or path.stat().st_size > _PICTURE_BYTES:
        return ""
    return f"![{caption}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"


def _methods(figures: Metrics) -> list[dict[str, str]]:
    """Returns a row for each sampler and number of steps, the fewest network evaluations first."""
    cost, excess, retrieval = figures.network_evaluations, figures.excess, figures.retrieval
    return [
        {
            "drawn with": shown(name),
            "network evaluations": str(cost[name]),
            "excess": f"{excess[name]:.1f}",
            "retrieval@1": f"{retrieval[name]:.3f}" if name in retrieval else "",
        }
        for name in sorted(excess, key=lambda name: (cost.get(name, 0), excess[name]))
        if name in cost
    ]


def _counts(figures: Metrics) -> str:
    return plain(f"{figures.features.name}, {figures.pictures} pictures, seed {figures.seed}")
