"""`lcmlora releases`: what is published, is it whole and whose, and getting it. Heavy imports are made in the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lcmlora.cli.context import context_of
from lcmlora.errors import UserError
from lcmlora.io.terminal import cell, say, shown

if TYPE_CHECKING:
    from lcmlora.config import Publish

app = typer.Typer(
    no_args_is_help=True,
    help="""List, verify, pull and yank published releases, in a directory or on S3.

    Releases are looked for at `publish.to` of params.yaml, or where --to says. REF is MODEL@CHANNEL or
    MODEL/sha256-DIGITS there, or an address anywhere: s3://bucket/.../MODEL/sha256-..., a folder, a channel's pointer.

    Examples:

      lcmlora releases list

      lcmlora releases pull emoji@champion --out adapters/champion
    """,
)

Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="MODEL@CHANNEL, MODEL/sha256-DIGITS, or the address of a release or pointer.",
        show_default=False,
    ),
]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="STORE", help="A directory or s3://bucket/prefix; publish.to by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _settings(call: typer.Context, to: str | None, reference: str | None = None) -> tuple[Publish, str]:
    """Returns where releases are looked for, and what messages say of who named it.

    Args:
        reference: the release that is asked for; of an address nothing else needs to be known.
    """
    settings = context_of(call).settings_if_any()
    from lcmlora.config import Publish
    from lcmlora.releases import manifest

    if settings is not None:
        publish = settings.publish
        return (publish.model_copy(update={"to": to}), "--to") if to else (publish, "publish.to")
    if to is None and reference is not None and not manifest.is_name(reference):
        return Publish(to=reference), reference
    if to is None:
        raise UserError("--to: is needed, there is no params.yaml here; name a directory or s3://bucket/prefix")
    return Publish(to=to), "--to"


@app.command("list")
def list_releases(
    call: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Only releases of this model.", show_default=False)] = None,
    to: To = None,
    as_json: Json = False,
) -> None:
    """List releases with size, time, channels and whether they were yanked; half ones too, which readers do not see.

    Example: lcmlora releases list emoji --to s3://models/lcm
    """
    settings, key = _settings(call, to)
    from dataclasses import asdict

    from lcmlora.releases import catalog

    rows = [asdict(row) for row in catalog.releases(settings, model, key=key)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows, settings.to)


def print_table(rows: list[dict[str, Any]], place: str) -> None:
    """Prints what `catalog.releases` returned, as dictionaries, for a person to read."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    # A file or a pipe has no width, and rich would take it for 80 columns, which fold a reason.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not rows:
        say(f"no releases at {place}")
        return
    table = Table(box=box.SIMPLE)
    for title in ("model", "sha256", "published (UTC)"):
        table.add_column(title, no_wrap=True)
    for title in ("files", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("channels", "signed", "state"):
        table.add_column(title, overflow="fold")
    for row in rows:
        yanked = row["yanked"]
        state = "whole" if row["whole"] else "not complete: no manifest.json"
        if yanked:
            state = f"yanked by {yanked['who']} on {yanked['time'][:10]}: {yanked['reason']}"
            state += f" ({yanked['unproven']})" if "unproven" in yanked else ""
        if row["fault"]:
            state = f"damaged: {row['fault']}"
        table.add_row(
            cell(row["model"]),
            cell(row["sha256"][:12]),
            cell(row["time"][:19].replace("T", " ")),
            str(row["files"]),
            decimal(row["bytes"]),
            cell(", ".join(row["channels"])),
            "yes" if row["signed"] else "no",
            cell(state),
        )
    console.print(table)


@app.command()
def verify(call: typer.Context, reference: Reference, to: To = None, as_json: Json = False) -> None:
    """Read every file of a release and compare it with the manifest; check the signature against publish.verify_key.

    Example: lcmlora releases verify emoji@champion
    """
    settings, key = _settings(call, to, reference)
    from dataclasses import asdict

    from lcmlora.releases import catalog

    found = catalog.verify(reference, settings, key=key)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    signed = {
        "none": "not signed",
        "unchecked": "signed, but by whom is not known: publish.verify_key is not set",
        "valid": f"signed by the key of {settings.verify_key}",
    }[found.signature]
    packaged = f"packaged {found.packaged}; " if found.packaged else ""
    say(
        f"{found.uri}: {found.files} files, {found.bytes} bytes, all as listed; adapter {found.sha256}; "
        f"{packaged}{signed}"
    )
    if found.yanked:
        say(f"yanked by {found.yanked['who']} on {found.yanked['time']}: {found.yanked['reason']}")


@app.command()
def pull(
    call: typer.Context,
    reference: Reference,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there, or be empty.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Also the card, report, grid and the file for ComfyUI and A1111.")
    ] = False,
    yanked: Annotated[bool, typer.Option("--yanked", help="Take it although it was yanked.")] = False,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Download the adapter of a release and check it: weights, scheduler, provenance and SHA256SUMS.

    The folder appears whole or not at all. If it is that release already, nothing is done.

    Example: lcmlora releases pull emoji@champion --out adapters/champion
    """
    settings, key = _settings(call, to, reference)
    from lcmlora.releases import bundle, catalog

    catalog.pull(reference, settings, out, everything=everything, yanked=yanked, key=key)
    sha256, names = bundle.digest(out), sorted(path.name for path in out.iterdir())
    if as_json:
        print(json.dumps({"folder": str(out), "sha256": sha256, "files": names}, indent=2))
    else:
        say(f"{out}: adapter {sha256}, {len(names)} files")


@app.command()
def yank(
    call: typer.Context,
    reference: Reference,
    reason: Annotated[str, typer.Option(help="Why nobody should use it any more.", show_default=False)],
    by: Annotated[str | None, typer.Option(help="Who says so; the user who runs this by default.")] = None,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Mark a release as not to be used: its files stay, and pulling and promoting it are refused. There is no way back.

    Example: lcmlora releases yank emoji/sha256-0a1b2c --reason "draws hands with six fingers"
    """
    settings, key = _settings(call, to, reference)
    from lcmlora.registry import events
    from lcmlora.releases import publish

    record = publish.yank(reference, settings, reason=reason, who=by or events.user(), key=key)
    print(json.dumps({"yanked": record}) if as_json else shown(record, None))


@app.command()
def links(
    call: typer.Context,
    reference: Reference,
    expires: Annotated[int, typer.Option(metavar="SECONDS", help="How long they can be used; 7 days at most.")] = 3600,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Print a presigned link to every file of a release on S3: whoever has one needs no key to read it.

    Example: lcmlora releases links emoji@champion --expires 600
    """
    settings, key = _settings(call, to, reference)
    from lcmlora.releases import catalog

    found = catalog.links(reference, settings, expires, key=key)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, link in found.items():
            print(shown(f"{name}  {link}", None))
