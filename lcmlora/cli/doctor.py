"""`lcmlora doctor`: what a model will take of a machine. Heavy imports happen inside the verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora import extras
from lcmlora.cli.context import Context, context_of

if TYPE_CHECKING:
    from lcmlora.config import Config
    from lcmlora.doctor.gpus import Gpu

_PUBLISHED = "(sd15, sd21, sdxl, ssd1b)"


def doctor(
    call: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help=f"A name under `bases` in params.yaml; outside a project a published base {_PUBLISHED}, or a folder.",
            show_default=False,
        ),
    ],
    gpu: Annotated[str | None, typer.Option(help="A GPU by its name, such as 'RTX 4090'.", show_default=False)] = None,
    gpu_gb: Annotated[
        float | None, typer.Option(min=1, help="The memory of a GPU, in GB of 10^9 bytes.", show_default=False)
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.01, help="Its operations a second in half precision by its data sheet, in 10^12."),
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Pictures to train on; those that `prepare` listed, else 10,000.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what a model takes: which settings fit the memory, how many hours, how much download and disk.

    With --gpu or --gpu-gb everything is counted from the architecture: nothing is fetched, no project is needed, and
    the GPU need not be there. Without them, in a project whose base was fetched, some real steps and one validation run
    here: memory and speed are then measured. Where there is no latent cache yet, latents are random.

    Examples:

      lcmlora doctor sdxl --gpu-gb 16

      lcmlora doctor sdxl --gpu "RTX 4090" --pictures 50000

      lcmlora doctor sdxl
    """
    extras.require(extra="train", needed_by="lcmlora doctor")
    context = context_of(call)
    config = context.settings_if_any()
    counted = gpu is not None or gpu_gb is not None or tflops is not None or pictures is not None
    if config is not None and not counted and context.project.base(model).is_dir():
        _measure(context, config, model, as_json)
        return
    from lcmlora.doctor import forecast, gpus, tables

    found = _gpus(gpu, gpu_gb, tflops)
    memory = gpu_gb or (found[0].memory if found else None)
    why = "nothing was fetched, and nothing was computed"
    if not counted:
        found, memory = gpus.here()
        if config is not None:
            why = f"{context.project.base(model)} is not there; after `lcmlora fetch {model}` this measures"
    project = context.project if config is not None else None
    if config is None:
        model, config = forecast.outside_projects(model)
    estimate = forecast.forecast(config, model, project, found, memory, pictures)
    if as_json:
        print(estimate.to_json())
    else:
        tables.print_forecast(estimate, why)


def _gpus(name: str | None, gigabytes: float | None, teraflops: float | None) -> list[Gpu]:
    """Returns the GPUs that the options name. Raises UserError for one that is not known."""
    from dataclasses import replace

    from lcmlora.doctor import gpus

    if name is not None:
        named = gpus.named(name)
        return [replace(named, memory=gigabytes or named.memory, teraflops=teraflops or named.teraflops)]
    if teraflops is not None:
        return [gpus.Gpu("as given", gigabytes or 0.0, teraflops)]
    return gpus.of_memory(gigabytes) if gigabytes is not None else []


def _measure(context: Context, config: Config, model: str, as_json: bool) -> None:
    import tempfile

    from lcmlora.cli.stages.loading import base_and_cache
    from lcmlora.data.latents.cache import MANIFEST
    from lcmlora.doctor import measuring

    project = context.project
    settings, launch = config.distill_for(model), config.launch_for(model)
    scratch = project.scratch("distill")
    scratch.mkdir(parents=True, exist_ok=True)
    if (project.latents(model) / MANIFEST).is_file():
        base, cache = base_and_cache(project, config, model, settings, pictures=True)
        estimate = measuring.estimate_run(base, cache, settings, launch, scratch)
    else:
        with tempfile.TemporaryDirectory(prefix="lcmlora-") as folder:
            estimate = measuring.estimate_without_cache(
                model, config.base(model), project.base(model), settings, launch, scratch, Path(folder)
            )
    if as_json:
        print(estimate.to_json())
    else:
        measuring.print_estimate(estimate, settings, model)
