"""`lcmlora releases`: list, verify, download and yank published releases. Heavy imports happen inside the verbs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.cli.context import context_of
from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.io.terminal import cell, say, shown

if TYPE_CHECKING:
    from lcmlora.config import Publish
    from lcmlora.releases.catalog import Published

app = typer.Typer(
    no_args_is_help=True,
    help="""List, verify, download and yank published releases in a directory, on S3 or on the hub.

    A release is the published bundle of one adapter: weights, scheduler,
    card, report, checksums. The store is `publish.to` of params.yaml, or the
    one that --to names. REF names a release in it: MODEL@CHANNEL, such as
    emoji@champion, or MODEL/sha256-DIGITS. It can also be an address:
    s3://bucket/.../MODEL/sha256-..., hf://owner/name@CHANNEL, a folder, or
    a channel's pointer.

    Examples:

      lcmlora releases list

      lcmlora releases pull emoji@champion --out adapters/champion
    """,
)

Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="MODEL@CHANNEL, MODEL/sha256-DIGITS, the address of a release or of a channel's pointer; or a version, a "
        "folder, a file or 12 digits of a SHA-256, as other verbs take them.",
        show_default=False,
        autocompletion=completion.adapters,
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="STORE",
        help="The store: a directory, s3://bucket/prefix or hf://owner/name; publish.to by default.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _settings(call: typer.Context, to: str | None) -> tuple[Publish | None, str]:
    """Returns the settings of the store, None where there are none; and what names it, for messages."""
    settings = context_of(call).settings_if_any()
    from lcmlora.config import Publish

    if settings is not None:
        publish = settings.publish
        return (publish.model_copy(update={"to": to}), "--to") if to else (publish, "publish.to")
    if to is not None:
        return Publish(to=to), "--to"
    found = os.environ.get("LCMLORA_PUBLISH_TO")
    return Publish(to=found) if found else None, "LCMLORA_PUBLISH_TO"


def _missing_store() -> UserError:
    return UserError(
        "--to: is needed, as there is no params.yaml here, and LCMLORA_PUBLISH_TO is not set; name a directory, "
        "s3://bucket/prefix or hf://owner/name"
    )


def _release(call: typer.Context, to: str | None, reference: str) -> tuple[str, Publish, str]:
    """Returns the address of a release, or its name in the store; the store's settings; and what names the store."""
    publish, key = _settings(call, to)
    context = context_of(call)
    places = context.places(context.settings_if_any())
    from lcmlora.config import Publish
    from lcmlora.registry import references
    from lcmlora.releases.stores.store import open_store

    if publish is not None:
        open_store(publish, key=key)  # a wrong address is told before the reference is looked for
    elif places.registry is None and not references.is_address(reference):
        raise _missing_store()
    found = references.find_release(reference, replace(places, publish=publish))
    return found, publish or Publish(to=found), key


@app.command("list")
def list_releases(
    call: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Only releases of this model.", show_default=False)] = None,
    to: To = None,
    as_json: Json = False,
) -> None:
    """List releases with their size, time, channels and state (whole, unfinished, yanked or damaged).

    An unfinished release has no manifest.json yet. Readers do not see it; publishing again completes it.

    Examples:

      lcmlora releases list

      lcmlora releases list emoji --to s3://models/lcm
    """
    settings, key = _settings(call, to)
    if settings is None:
        raise _missing_store()
    from dataclasses import asdict

    from lcmlora.releases import catalog

    releases = catalog.list_releases(settings, model, key=key)
    if as_json:
        print(json.dumps([asdict(release) for release in releases], indent=2))
    else:
        print_releases(releases, settings.first)


def print_releases(releases: list[Published], place: str) -> None:
    """Prints releases as a table for a person to read."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    # A file or a pipe has no width, and rich would take it for 80 columns, which fold a reason.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not releases:
        say(f"no releases at {place}")
        return
    table = Table(box=box.SIMPLE)
    for title in ("model", "sha256", "published (UTC)"):
        table.add_column(title, no_wrap=True)
    for title in ("files", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("channels", "signed", "state"):
        table.add_column(title, overflow="fold")
    for release in releases:
        table.add_row(
            cell(release.model),
            cell(release.sha256[:12]),
            cell(release.time[:19].replace("T", " ")),
            str(release.files),
            decimal(release.bytes),
            cell(", ".join(release.channels)),
            "yes" if release.signed else "no",
            cell(_state(release)),
        )
    console.print(table)


def _state(release: Published) -> str:
    if release.fault:
        return f"damaged: {release.fault}"
    if yank := release.yanked:
        unproven = f" ({yank.unproven})" if yank.unproven else ""
        return f"yanked by {yank.who} on {yank.time[:10]}: {yank.reason}{unproven}"
    return "whole" if release.whole else "not complete: no manifest.json"


@app.command()
def verify(call: typer.Context, reference: Reference, to: To = None, as_json: Json = False) -> None:
    """Read every file of a release and compare it with the manifest.

    If publish.verify_key is set in params.yaml, the signature must be by that key. Exit status 2 means that something
    is wrong; each wrong file is named on a line of its own.

    Example: lcmlora releases verify emoji@champion
    """
    reference, settings, key = _release(call, to, reference)
    from dataclasses import asdict

    from lcmlora.releases import catalog

    found = catalog.verify_release(reference, settings, key=key)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    signed = {
        "none": "not signed",
        "unchecked": "signed by an unknown key: publish.verify_key is not set, so the signature is not checked",
        "valid": f"signed by the key of {settings.verify_key}",
    }[found.signature]
    packaged = f"packaged {found.packaged}; " if found.packaged else ""
    say(
        f"{found.uri}: {found.files} files, {found.bytes} bytes, all as listed; adapter {found.sha256}; "
        f"{packaged}{signed}"
    )
    if found.yanked:
        say(f"yanked by {found.yanked.who} on {found.yanked.time}: {found.yanked.reason}")


@app.command()
def pull(
    call: typer.Context,
    reference: Reference,
    out: Annotated[Path, typer.Option(help="The folder to write. It must be new or empty.", show_default=False)],
    everything: Annotated[
        bool, typer.Option("--all", help="Also the card, report, pictures and the files for ComfyUI and A1111.")
    ] = False,
    yanked: Annotated[bool, typer.Option("--yanked", help="Download it although it was yanked.")] = False,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Download the adapter of a release, and check every file: weights, scheduler, provenance, SHA256SUMS.

    The folder appears whole or not at all. If it contains that release already, nothing is downloaded.

    Examples:

      lcmlora releases pull emoji@champion --out adapters/champion

      lcmlora releases pull emoji@champion --out release --all     with card, report and the files for ComfyUI
    """
    reference, settings, key = _release(call, to, reference)
    from lcmlora.releases import bundle, catalog

    catalog.pull_release(reference, settings, out, everything=everything, yanked=yanked, key=key)
    sha256, names = bundle.digest(out), sorted(path.name for path in out.iterdir())
    if as_json:
        print(json.dumps({"folder": str(out), "sha256": sha256, "files": names}, indent=2))
    else:
        say(f"{out}: adapter {sha256}, {len(names)} files")


@app.command()
def yank(
    call: typer.Context,
    reference: Reference,
    reason: Annotated[str, typer.Option(help="Why it must not be used any more.", show_default=False)],
    by: Annotated[str | None, typer.Option(help="Who decided; the user who runs this by default.")] = None,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Withdraw a release: its files stay, but downloading and promoting it are refused from now on.

    This cannot be undone. A release that a channel points to must be rolled back first.

    Example: lcmlora releases yank emoji/sha256-0a1b2c --reason "draws hands with six fingers"
    """
    reference, settings, key = _release(call, to, reference)
    from lcmlora.registry import events
    from lcmlora.releases import publish

    record = publish.yank_release(reference, settings, reason=reason, who=by or events.user(), key=key)
    print(json.dumps({"yanked": record}) if as_json else shown(record, None))


@app.command()
def links(
    call: typer.Context,
    reference: Reference,
    expires: Annotated[int, typer.Option(metavar="SECONDS", help="How long the links work; 7 days at most.")] = 3600,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Print a presigned link to every file of a release on S3. A link needs no key: whoever has it can read the file.

    Example: lcmlora releases links emoji@champion --expires 600
    """
    reference, settings, key = _release(call, to, reference)
    from lcmlora.releases import catalog

    found = catalog.presigned_links(reference, settings, expires, key=key)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, link in found.items():
            print(shown(f"{name}  {link}", None))
