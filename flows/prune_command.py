"""`lcmlora prune` on a terminal."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from lcmlora.errors import UserError
from lcmlora.flows.verbs import enter, note_unused_servers
from lcmlora.io.terminal import note, say


def prune(
    call: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    by: Annotated[str | None, typer.Option(help="Who decided, for the history; this user by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with what is kept and why.")] = False,
) -> None:
    """Delete versions, releases, runs, DVC's cache, abandoned work and old logs that nothing needs any more.

    It keeps what an alias or a channel names, in all stores; what waits for
    approval; this folder's adapters; and what `retention` in params.yaml
    says. It lists what goes, with bytes, and asks. It may be interrupted:
    the next call goes on.

    Examples:

      lcmlora prune --dry-run          list what would be deleted

      lcmlora prune                    list it, ask, and delete it
    """
    settings = enter(call).settings()
    from lcmlora.flows import prune as pruning
    from lcmlora.registry import events
    from lcmlora.tasks import cleaning

    note_unused_servers()
    found = pruning.find(settings)
    if as_json:
        rows = [{"kind": r.kind, "name": r.name, "bytes": r.bytes, "why": r.why} for r in found.rows]
        kept = [{"version": reference, "why": why} for reference, why in found.registry.kept]
        print(json.dumps({"delete": rows, "keep": kept}, indent=2))
    elif found.rows:
        from lcmlora.cli.registry import print_table

        print_table(
            ("what", "which", "size", "why"), [(r.kind, r.name, pruning.size(r.bytes), r.why) for r in found.rows]
        )
    for line in pruning.notes(settings):
        note(f"note: {line}")
    if not as_json:
        say(found.total)
    if dry_run or not found.rows:
        return
    if not yes and not _agreed():
        say("nothing was deleted")
        return
    with cleaning.pruning():
        for line in pruning.delete(found, settings, by or events.user()):
            note(line)
    if not as_json:
        say("deleted")


def _agreed() -> bool:
    """Asks on the terminal. Raises UserError where there is none."""
    if not sys.stdin.isatty():
        raise UserError("nothing was deleted: there is no terminal to ask on; with --yes it is deleted")
    return typer.confirm("Delete all of this? It cannot be undone")
