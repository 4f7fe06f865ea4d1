"""Verbs of the command line that look at data: data preview. Heavy imports happen inside the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcmlora.cli.context import context_of
from lcmlora.io.terminal import say

app = typer.Typer(no_args_is_help=True, help="Look at captioned pictures before anything is made of them.")


@app.callback()
def _group() -> None:
    """Keeps `preview` a verb of its own while it is the only one."""


@app.command()
def preview(
    call: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Captioned pictures: a folder, or .parquet or .tar files, here or at s3://; without it, `data` of "
            "params.yaml.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="folder, parquet or webdataset; guessed from the files' names.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A base: the pictures that it learns from, and whether they suit it.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures on the sheet.")] = 12,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("preview.png"),
) -> None:
    """Draw twelve pictures with their captions into one PNG, and count what would be kept and dropped, and why.

    Limits, like data.min_side, are those of params.yaml. Nothing else is written.

    Examples:

      lcmlora data preview                                   the data set of params.yaml

      lcmlora data preview --model sdxl                      that of a base, which may have `data` of its own

      lcmlora data preview ~/pictures --out look.png         a folder, before it is named there

      lcmlora data preview s3://bucket/laion --count 24      tables or tar files in a bucket
    """
    context = context_of(call)
    settings = context.settings()
    from lcmlora.data.prepare import print_report
    from lcmlora.data.preview import draw_sheet
    from lcmlora.data.sources.guess import source_of

    data = settings.data if model is None else settings.data_for(model)
    if source is None:
        data = context.project.located_data(data)
    else:
        data = type(data).model_validate(data.model_dump() | {"source": kind or source_of(source), "path": source})
    models = [model] if model else settings.models_sharing_data() if source is None else settings.models
    resolutions = {name: settings.base(name).resolution for name in models}
    print_report(draw_sheet(data, count, out, resolutions))
    say(out)
