"""What the verbs of stages have in common: their arguments, and what encloses each run."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lcmlora import extras, names
from lcmlora.cli.context import context_of
from lcmlora.cli.shell import completion

Model = Annotated[
    str,
    typer.Argument(
        help="A name under `bases` in params.yaml, e.g. emoji.", show_default=False, autocompletion=completion.bases
    ),
]
Style = Annotated[
    str,
    typer.Argument(help="A name under `styles` in params.yaml.", show_default=False, autocompletion=completion.styles),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A name under `finetunes` in params.yaml.", show_default=False, autocompletion=completion.finetunes
    ),
]
OwnData = Annotated[
    str | None,
    typer.Argument(
        help="A base with `data` of its own. By default the shared `data` is prepared.",
        show_default=False,
        autocompletion=completion.bases,
    ),
]
StyleOrCheckpoint = Annotated[
    str,
    typer.Argument(
        help="A name under `study` in params.yaml.", show_default=False, autocompletion=completion.variations
    ),
]


class StageCommand(TyperCommand):
    """A verb that dvc.yaml calls. Its names may also be given in DVC's form, --model NAME and --name NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, names.positional_arguments(args))

    def invoke(self, ctx: Any) -> Any:
        extras.require(extra="train", needed_by=f"lcmlora {self.name}")
        context = context_of(ctx)
        if context.project.params is not None:  # --params: not the settings of DVC and resolved.yaml
            return super().invoke(ctx)
        from lcmlora.dvc_files import dvc_yaml, resolved, stage_records
        from lcmlora.projects import durations
        from lcmlora.stages import Run

        run = Run(str(self.name), ctx.params.get("model"), ctx.params.get("name"))
        if "DVC_STAGE" in os.environ:
            dvc_yaml.check(context.settings(), context.project)
        with (
            resolved.running(context.settings(), run, context.project.resolved),
            stage_records.recorded(context.project, run, context.settings),
            durations.measured(context.project, resolved.entry_name(run)),
        ):
            return super().invoke(ctx)
