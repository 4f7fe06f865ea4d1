"""`lcmlora status`: the standing of every model."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.flows.verbs import enter, note_unused_servers, standalone
from lcmlora.io.terminal import say

if TYPE_CHECKING:
    from lcmlora.flows.overview import Standing


def status(
    call: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object for each model.")] = False,
) -> None:
    """Show the champion, newest version, last run, stale stages and next run of each model.

    Below the table: what runs now and since when, why the last run failed, why stages are stale, and what keeps runs
    from starting. It changes nothing, waits for nothing, and disturbs no run.

    Runs and schedules come from a Prefect server: run `source .up/environment` for that of `lcmlora up`, or set
    PREFECT_API_URL.

    Examples:

      lcmlora status

      lcmlora status --json
    """
    settings = enter(call).settings()
    from dataclasses import asdict

    from lcmlora.flows import overview

    note_unused_servers()
    server = overview.has_server()
    if not server:
        print("note: PREFECT_API_URL is not set, so runs and schedules are not known", file=sys.stderr)
    standings = overview.standings(settings, server=server)
    if as_json:
        print(json.dumps([asdict(standing) for standing in standings], indent=2))
        return
    from lcmlora.cli.registry import print_table, whole_seconds

    rows = [
        (
            standing.model,
            (standing.champion or "none") + (f" since {whole_seconds(standing.since)}" if standing.since else ""),
            f"{standing.newest} {standing.newest_gate}" if standing.newest else "none",
            f"{standing.last_run.end} {standing.last_run.time}" if standing.last_run else "",
            _stale(standing),
            standing.due or "",
        )
        for standing in standings
    ]
    print_table(("model", "champion", "newest version", "last run", "stale", "next run"), rows)
    for standing in standings:
        for line in standing.needs:
            say(f"{standing.model}: {line}")


def _stale(standing: Standing) -> str:
    if standing.unknown:
        return "not known"
    names = [name.replace(f"@{standing.model}", "") for name in standing.stale]
    return ", ".join(names) or ("" if standing.running else "nothing")


if __name__ == "__main__":
    standalone("flows.status", status)
