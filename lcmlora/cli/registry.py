"""`lcmlora registry`: look up, compare, promote, roll back and download versions. Heavy imports happen in the verbs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.cli.context import context_of
from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.io.terminal import LINE, cell, note, say

if TYPE_CHECKING:
    from lcmlora.config import Config, Gate, Registry
    from lcmlora.registry.lookup import Version
    from lcmlora.registry.references import Places

app = typer.Typer(
    no_args_is_help=True,
    help="""Look up, compare, promote, roll back and download the adapters in MLflow's registry.

    A model has numbered versions; each is one adapter. The alias @champion
    names the version that production uses. registry.tracking_uri in
    params.yaml names the registry, in which model `emoji` is lcm-lora-emoji.

    Examples:

      lcmlora registry list emoji

      lcmlora registry promote emoji/3
    """,
)

Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="A version: MODEL@ALIAS, MODEL/VERSION, models:/..., 12 digits of a SHA-256; or the folder, file or "
        "s3://... address of its adapter.",
        show_default=False,
        autocompletion=completion.adapters,
    ),
]
Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model, such as emoji; its versions are registered under lcm-lora-emoji.",
        show_default=False,
        autocompletion=completion.models,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
By = Annotated[str | None, typer.Option(help="Who decided, for the history; this user by default.")]

_LISTED = 100  # versions of a list that a person reads


def _places(call: typer.Context) -> Places:
    context = context_of(call)
    return context.places(context.settings_if_any())


def _registry(call: typer.Context) -> tuple[Registry, Gate]:
    """Returns the settings of the registry and the gate: the project's, or those of the environment outside one."""
    context = context_of(call)
    config = context.settings_if_any()
    from lcmlora.config import Gate

    registry = context.places(config).registry
    if registry is None:
        raise UserError(
            "there is no registry: set MLFLOW_TRACKING_URI, or run in a project's folder or name it with --project"
        )
    return registry, Gate() if config is None else config.gate


@app.command("list")
def list_versions(
    call: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Only versions of this model, such as emoji.", autocompletion=completion.models
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Only versions for which this holds: KEY=VALUE of a field or tag, FIGURE<NUMBER or FIGURE>NUMBER. "
            "Repeatable."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"How many versions at most; 0 lists all. By default {_LISTED}, and with --json all.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the versions with their aliases, gate decisions and main figures, the newest first.

    --json has all figures of each version, which takes a hundred times as long for each as the main ones.

    Examples:

      lcmlora registry list emoji

      lcmlora registry list --where objective=tcd --where "excess.student_4<80"
    """
    settings, gate = _registry(call)
    from lcmlora.registry.listing import conditions, search
    from lcmlora.registry.lookup import registered_name

    tests = [conditions.condition(text) for text in where or ()]
    name = None if name is None else registered_name(name)
    if limit is None:
        limit = 0 if as_json else _LISTED
    figures: search.Figures = "all" if as_json else "main"
    found, more = search.find(settings, name, tests, newest=limit or None, figures=figures)
    if as_json:
        print(json.dumps([version.plain() for version in found], indent=2))
        _note_more(limit, more)
        return
    _print_list(found, gate.steps)
    _note_foreign([f"{version.reference}: {tag}" for version in found for tag in version.foreign_events])
    _note_more(limit, more)


def _print_list(found: Sequence[Version], steps: int) -> None:
    """Prints a row for each version, with its figures at this number of steps."""
    rows = [
        (
            version.reference,
            " ".join(f"@{alias}" for alias in version.aliases),
            ", ".join(filter(None, (version.gate, version.approval))),
            _figure(version, f"excess.student_{steps}"),
            _figure(version, f"retrieval.student_{steps}"),
            version.objective,
            version.sha256[:12],
            version.created,
        )
        for version in found
    ]
    titles = ("version", "alias", "gate", f"excess@{steps}", f"retrieval@{steps}", "objective", "sha256", "created")
    print_table(titles, rows)


def _note_more(limit: int, more: bool) -> None:
    if more:
        note(f"note: these are the newest {limit}; --limit 0 lists all, and --where or MODEL fewer")


def _figure(version: Version, name: str) -> str:
    value = version.figure(name)
    return "" if value is None else f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"


@app.command()
def show(call: typer.Context, reference: Reference, as_json: AsJson = False) -> None:
    """Show a version: base, data, commit, figures, costs, release, run, aliases, and when it was promoted.

    Example: lcmlora registry show emoji@champion --json
    """
    places = _places(call)
    from lcmlora.registry.costs import spent
    from lcmlora.registry.references import find_version

    version = find_version(reference, places)
    if as_json:
        print(json.dumps(version.plain(), indent=2))
        return
    facts = version.plain()
    metrics, base = facts.pop("metrics"), facts.pop("base")
    facts.pop("tags")
    facts["foreign_events"] = ", ".join(version.foreign_events)
    facts["aliases"] = " ".join(facts["aliases"])
    facts["promoted"] = version.promoted and whole_seconds(version.promoted)
    rows = [(key, str(value)) for key, value in facts.items() if value not in (None, "")]
    rows += [(f"base {key}", str(value)) for key, value in base.items() if value]
    rows += spent.of_tags(version.tags)
    shown = {key: value for key, value in metrics.items() if "student_" in key and "interval" not in key}
    print_table(("", version.reference), rows + [(key, f"{value:.4g}") for key, value in sorted(shown.items())])
    print(f"{len(metrics) - len(shown)} more figures: --json")


@app.command()
def compare(call: typer.Context, first: Reference, second: Reference, as_json: AsJson = False) -> None:
    """Compare the facts and figures of two versions. Only those that differ are printed.

    Example: lcmlora registry compare emoji@previous emoji@champion
    """
    places = _places(call)
    from lcmlora import registry
    from lcmlora.registry.references import find_version

    one, two = (find_version(reference, places) for reference in (first, second))
    rows = registry.compare(one, two)
    if as_json:
        plain = [{"figure": r.figure, "first": r.first, "second": r.second, "change": r.change} for r in rows]
        print(json.dumps({"first": one.reference, "second": two.reference, "rows": plain}, indent=2))
        return
    shown = [row for row in rows if row.change != 0 and row.first != row.second]
    print_table(
        ("", one.reference, two.reference, "change"),
        [(row.figure, _short(row.first), _short(row.second), _short(row.change)) for row in shown],
    )
    print(f"{len(rows) - len(shown)} of {len(rows)} are the same")


@app.command()
def history(call: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Print the history of a model's versions: registered, passed, rejected, promoted, rolled back; by whom and why.

    Example: lcmlora registry history emoji
    """
    settings, _ = _registry(call)
    from dataclasses import asdict

    from lcmlora.registry import promotion
    from lcmlora.registry.lookup import registered_name

    name = registered_name(name)
    events = promotion.history(name, settings)
    if as_json:
        print(json.dumps([asdict(event) for event in events], indent=2))
        return
    rows = []
    for event in events:
        alias = f"@{event.alias}" + (f" (was /{event.former})" if event.former else "") if event.alias else ""
        action = event.action + (" against the gate" if event.override else "")
        rows.append((whole_seconds(event.time), f"/{event.version}", action, alias, event.who, event.reason or ""))
    print_table(("time", "version", "what", "alias", "who", "why"), rows)
    _note_foreign(promotion.foreign_events(name, settings))


def whole_seconds(time: str) -> str:
    """Returns a time of the registry, ISO 8601 in UTC, for a person to read."""
    return time[:19] + "Z"


def _note_foreign(tags: Sequence[str]) -> None:
    """Notes tags that are named like events, and that lcmlora did not write, on standard error."""
    if not tags:
        return
    from lcmlora.io.terminal import shown

    first = ", ".join(map(shown, tags[:5])) + (", ..." if len(tags) > 5 else "")
    print(f"note: {len(tags)} tags that no version of lcmlora wrote: {first}", file=sys.stderr)


@app.command()
def promote(
    call: typer.Context,
    reference: Reference,
    reason: Annotated[str | None, typer.Option(help="Why, for the history.", show_default=False)] = None,
    override: Annotated[bool, typer.Option("--override", help="Promote it against the gate; needs --reason.")] = False,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Make a version champion. It must have passed the gate and not be worse than the present champion.

    If the version's release is published, the channel of the same name points to it afterwards.

    Examples:

      lcmlora registry promote emoji/3

      lcmlora registry promote emoji/3 --override --reason "sharper eyes, agreed with design"
    """
    config = context_of(call).settings()
    from lcmlora.registry import promotion

    if override and not (reason or "").strip():
        raise UserError("--override: needs --reason, which the history keeps")
    why = reason or "passed the gate"
    reference = _version_to_decide(call, reference, config)
    version = promotion.promote(reference, config.registry, config.gate, reason=why, who=by, override=override)
    _move_channel(config, version, as_json)


@app.command()
def rollback(
    call: typer.Context,
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for the history.", show_default=False)],
    to: Annotated[int | None, typer.Option(help="The version to go back to; the last champion by default.")] = None,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Make the champion before the present one champion again, and point the published channel at its release.

    A second rollback goes back by one more champion. The flow does not promote a version again that was rolled back.

    Example: lcmlora registry rollback emoji --reason "blurred hands in production"
    """
    config = context_of(call).settings()
    from lcmlora.registry import promotion
    from lcmlora.registry.lookup import registered_name

    name = registered_name(name)
    _move_channel(config, promotion.rollback(name, config.registry, reason=reason, who=by, to=to), as_json)


@app.command()
def readmit(
    call: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model of params.yaml, such as emoji; the release in release/MODEL is meant.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ],
) -> None:
    """Let the adapter in release/MODEL be registered again, whose version was deleted in MLflow.

    A deleted version does not come back by itself. After this, the next `lcmlora run` registers it as a new version.

    Example: lcmlora registry readmit emoji
    """
    context = context_of(call)
    config = context.settings()
    from lcmlora.registry import registration

    found = registration.readmit(name, config.registry, context.project.release(name))
    say(f"{found} was deleted, and its adapter may be registered again: `lcmlora run` does it")


def approve(
    call: typer.Context,
    reference: Reference,
    reason: Annotated[str | None, typer.Option(help="Why, for the history.", show_default=False)] = None,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Approve a version that passed the gate and waits for a person: it becomes champion, and the channel follows.

    Versions wait where params.yaml has `gate.approval`. The version must still be no worse than the champion.

    Examples:

      lcmlora approve emoji/3

      lcmlora approve emoji/3 --reason "hands are right, agreed with design" --by ada
    """
    config = context_of(call).settings()
    from lcmlora.registry.approval import decisions

    reference = _version_to_decide(call, reference, config)
    version = decisions.approve(reference, config.registry, config.gate, reason=reason, who=by)
    _move_channel(config, version, as_json)


def reject(
    call: typer.Context,
    reference: Reference,
    reason: Annotated[str, typer.Option(help="Why, for the history.", show_default=False)],
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Reject a version that waits for a person: no run makes it champion, also not if the same adapter comes again.

    Example: lcmlora reject emoji/3 --reason "blurred hands"
    """
    config = context_of(call).settings()
    from lcmlora.registry.approval import decisions

    reference = _version_to_decide(call, reference, config)
    version = decisions.reject(reference, config.registry, reason=reason, who=by)
    if as_json:
        print(json.dumps(version.plain(), indent=2))
    else:
        say(f"{version.reference} is rejected; {version.name}@{config.registry.alias} stays")


def _version_to_decide(call: typer.Context, reference: str, config: Config) -> str:
    """Returns the exact version that a person decides on. Raises UserError for the mere name of a model."""
    from lcmlora.registry import references

    if isinstance(references.parse(reference), references.Model):
        raise UserError(f"{reference}: is the name of a model; say which version of it, such as {reference}/3")
    return references.find_version(reference, context_of(call).places(config)).exact


def _move_channel(config: Config, version: Version, as_json: bool) -> None:
    """Points the published channel at the new champion's release, and prints the new champion."""
    from lcmlora.releases import publish

    alias, channels = config.registry.alias, list[str]()
    model = version.name.removeprefix("lcm-lora-")
    if version.uris:
        channels = publish.point_channels_of(model, version.sha256, version.uris, config.publish, alias)
    else:
        note(f"note: {version.reference} was never published, so no channel was moved")
    if as_json:
        moved = {"channel": channels[0] if channels else None, "channels": channels}
        print(json.dumps(version.plain() | moved, indent=2))
    else:
        follow = f", {', '.join(channels)} follow{'s' if len(channels) == 1 else ''}" if channels else ""
        say(f"{version.name}@{alias} is {version.reference}{follow}")


@app.command()
def pull(
    call: typer.Context,
    reference: Reference,
    out: Annotated[Path, typer.Option(help="The folder to write. It must be new or empty.", show_default=False)],
    everything: Annotated[
        bool, typer.Option("--all", help="Also the card, report and the file for ComfyUI and A1111.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download the adapter of a version, and check every file against its SHA-256.

    Example: lcmlora registry pull emoji@champion --out adapters/champion
    """
    places = _places(call)
    from lcmlora import registry
    from lcmlora.registry.references import find_version
    from lcmlora.releases import bundle

    version = find_version(reference, places)
    folder = registry.pull(version.exact, places.registry, out, everything=everything)
    if as_json:
        print(json.dumps({"folder": str(folder), "sha256": bundle.digest(folder)}, indent=2))
    else:
        say(f"{folder}: {reference}, sha256 {bundle.digest(folder)[:12]}..., every file checked")


def _short(value: float | str | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else value[:40]


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for title in titles:
        table.add_column(cell(title), overflow="fold")
    for row in rows:
        # Anybody may write a tag, also one with control characters of terminals, which `cell` escapes.
        table.add_row(*(cell(value, LINE) for value in row))
    # A file or a pipe has no width, and rich would use 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
