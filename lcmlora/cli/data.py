"""`lcmlora data`: verbs that show data before it is used. Heavy imports happen inside the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcmlora import extras
from lcmlora.cli.context import context_of
from lcmlora.cli.shell import completion
from lcmlora.io.terminal import say

app = typer.Typer(no_args_is_help=True, help="Look at captioned pictures before you train on them.")


@app.callback()
def _group() -> None:
    """Keeps `preview` a verb of its own while it is the only one."""


@app.command()
def preview(
    call: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Captioned pictures: a folder, or .parquet or .tar files, here or at s3://. `data` of params.yaml by "
            "default.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="The kind of SOURCE: folder, parquet or webdataset. By default it follows from the files' names.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A base: show the pictures that it learns from, and check their sizes for it alone.",
            show_default=False,
            autocompletion=completion.bases,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures on the sheet.")] = 12,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("preview.png"),
) -> None:
    """Draw some pictures with their captions into one PNG, and count the pictures to be kept and dropped, with reasons.

    The limits, such as data.min_side, are those of params.yaml. No other file is written.

    Examples:

      lcmlora data preview                                   the data set of params.yaml

      lcmlora data preview --model sdxl                      the data set of a base with `data` of its own

      lcmlora data preview ~/pictures --out look.png         a folder, before you enter it in params.yaml

      lcmlora data preview s3://bucket/laion --count 24      tables or tar files in a bucket
    """
    extras.require(extra="train", needed_by="lcmlora data preview")
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
