"""The flow that leaves the weekly summary, of the last days: champions, versions, runs, and tasks for a person."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds
    from lcmlora.flows.verbs import standalone, summary

    standalone("flows.report", summary)

import datetime
from pathlib import Path
from typing import Annotated, NamedTuple

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed
from pydantic import Field

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.flows import name_of, outcomes, overview
from lcmlora.flows.overview import Run, Standing
from lcmlora.io.terminal import LINE
from lcmlora.io.terminal import markdown as plain
from lcmlora.registry.events import Event
from lcmlora.registry.listing import recent
from lcmlora.tasks import costs
from lcmlora.tasks.outages.own_state import outlasting


@flow(name="report")
def leave_digest(days: Annotated[int, Field(gt=0)] = 7, params: str = "params.yaml") -> State:
    """Leaves the weekly summary, artifact `digest`: the standing of each model, history of versions, ends of runs.

    Ends as Reported, or as Quiet if nothing happened.

    Args:
        days: how many days back.
        params: the file with the settings.
    """
    try:
        settings = config.load(Path(params))
        with outlasting(settings.flow.patience):
            found = collect(settings, days)
            create_markdown_artifact(found.text, key="digest")
    except UserError as error:
        return Failed(message=str(error))
    counts = f"{found.events} events of versions, {found.runs} runs in {days} days"
    return Completed(name="Reported" if found.events or found.runs else "Quiet", message=counts)


class Summary(NamedTuple):
    """A summary in Markdown, and how much it tells of."""

    text: str
    events: int
    runs: int


def collect(settings: config.Config, days: int) -> Summary:
    """Returns the summary of the last days. Without a Prefect server it has no runs.

    Raises:
        Unavailable: MLflow or Prefect does not answer.
    """
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    server = overview.has_server()
    standings = overview.standings(settings, server=server)
    runs = overview.runs_since(began) if server else []
    models = {name_of(standing.model): standing.model for standing in standings if standing.newest}
    events = [(models[each.name], each.event) for each in recent.read(settings.registry, models.keys(), began)]
    text = weekly_summary(days, standings, events, runs, settings.gate.steps)
    return Summary(f"{text}\n\n{_costs(settings, began)}", len(events), len(runs))


def _costs(settings: config.Config, began: datetime.datetime) -> str:
    """Returns the part about what was spent since then, in Markdown."""
    rows = []
    for model in settings.models:
        spent = costs.spent(costs.since(model, began), settings)
        budget = costs.budget_of(model, settings)
        rows.append((model, *(value for _, value in spent.rows()), budget.line if budget else "none"))
    titles = ("model", "device time", "energy", "price", "budget of the month")
    return f"## Costs of this folder\n\n{outcomes.markdown(titles, rows)}"


def weekly_summary(
    days: int, standings: list[Standing], events: list[tuple[str, Event]], runs: list[Run], steps: int
) -> str:
    """Returns the weekly summary in Markdown.

    Args:
        events: with their models.
        steps: of the gate, at which the figures are shown.
    """
    ends: dict[str, int] = {}
    for run in runs:
        ends[run.end] = ends.get(run.end, 0) + 1
    stale = [f"* {plain(s.model)}: {plain(', '.join(s.stale))} stale since the last run" for s in standings if s.stale]
    now = [f"* {plain(f'{s.model}: {line}', LINE)}" for s in standings for line in s.needs]
    failed = [
        f"* {plain(f'{run.time} {run.name}: {run.end}: {run.message}', LINE)}"
        for run in runs
        if run.end in _NEEDS_A_PERSON
    ]
    waiting = [f"* {plain(f'{s.newest}: {s.newest_gate}')}" for s in standings if "awaiting" in (s.newest_gate or "")]
    parts = [
        f"# The last {days} days",
        outcomes.markdown(
            ("model", "champion", "since", f"excess@{steps}", f"retrieval@{steps}", "last run", "next run"),
            [
                (
                    s.model,
                    s.champion or "none",
                    (s.since or "")[:10],
                    *("" if s.figures[key] is None else f"{s.figures[key]:.4g}" for key in overview.FIGURES),
                    s.last_run.end if s.last_run else "",
                    s.due or "",
                )
                for s in standings
            ],
        ),
        "## Versions",
        outcomes.markdown(
            ("time", "model", "version", "what", "who", "why"),
            [(e.time[:19] + "Z", model, f"/{e.version}", e.action, e.who, e.reason or "") for model, e in events],
        )
        if events
        else "None was registered, promoted, rejected or rolled back.",
        "## Runs",
        ", ".join(f"{count} {plain(end)}" for end, count in sorted(ends.items())) or "None.",
        *(["## Now", "\n".join(now)] if now else []),
        *(["## For a person", "\n".join([*waiting, *stale, *failed])] if waiting or stale or failed else []),
    ]
    return "\n\n".join(parts)


_NEEDS_A_PERSON = ("Failed", "Crashed", "Rejected", "OverBudget", "TimedOut", outcomes.UNSENT)
