"""Verbs of the command line for the universal module: style, finetune, alone, study. Heavy imports as in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcmlora.errors import UserError

Model = Annotated[str, typer.Argument(help="A name under `bases` in params.yaml, e.g. emoji.", show_default=False)]
Style = Annotated[str, typer.Argument(help="A name under `styles` in params.yaml.", show_default=False)]
Checkpoint = Annotated[str, typer.Argument(help="A name under `finetunes` in params.yaml.", show_default=False)]
Either = Annotated[str, typer.Argument(help="A name under `study` in params.yaml.", show_default=False)]


def style(context: typer.Context, model: Model, name: Style) -> None:
    """Train a LoRA of another style by the ordinary diffusion loss: what acceleration is added to.

    Example: lcmlora style emoji noto-v1
    """
    _tune(context, "style", model, name)


def finetune(context: typer.Context, model: Model, name: Checkpoint) -> None:
    """Fine-tune a whole base on other pictures; the folder is a base of its own.

    Example: lcmlora finetune emoji noto-v1-full
    """
    _tune(context, "finetune", model, name)


def _configure(context: typer.Context):  # type: ignore[no-untyped-def]  # the type would import pydantic for --help
    from lcmlora import config

    return config.load(context.obj)


def _folder(model: str, part: str, name: str) -> Path:
    return Path("variations", model, part, name)


def _tune(context: typer.Context, kind, model: str, name: str) -> None:  # type: ignore[no-untyped-def]
    config = _configure(context)
    config.real_pictures(kind, name)
    data, settings = config.variation(kind, name)
    from lcmlora import bases
    from lcmlora.bases import folders
    from lcmlora.config import digest
    from lcmlora.data import prepare as pictures
    from lcmlora.data.latents.cache import MANIFEST, LatentCache
    from lcmlora.data.latents.encode import encode
    from lcmlora.distillation.finetune import tune as train
    from lcmlora.registry import tracking
    from lcmlora.training import checkpoint

    entry, folder = config.base(model), Path("bases", model)
    device = bases.pick_device(settings.device)
    dtype = bases.pick_dtype(settings.precision, device)
    identity = folders.identity(entry, folder)
    work = Path("scratch", kind, f"{model}-{name}-{digest(data, settings, identity)[:12]}")
    with checkpoint.locked(work):
        pictures.print_report(pictures.prepare(data, settings.batch, work / "pictures"))
        base = bases.load(model, entry, folder, device=device, dtype=dtype, parts=("vae", "text"))
        if not (work / "latents" / MANIFEST).exists():
            encoding = config.encode_for(model).model_copy(update={"shards": None})
            encode(base, data, encoding, work / "pictures", work / "encode", work / "latents")
        del base
        cache = LatentCache(work / "latents")
        parts = ("unet", "text") if cache.tokenized else ("unet",)
        bare = bases.load(model, entry, folder, device=device, dtype=dtype, parts=parts)
        cache.embed = bare.encode_tokens
        label = f"{model}-{kind}-{name}"
        with tracking.tracking(config.registry, label, settings.model_dump(mode="json"), work) as run:
            train(
                bare,
                cache,
                settings,
                work,
                _folder(model, f"{kind}s", name),
                identity=identity,
                logger=run,
            )
    checkpoint.discard(work)


def alone(context: typer.Context, model: Model, name: Either) -> None:
    """Draw a style or a fine-tuned checkpoint under guided solvers: what `study` compares with.

    Example: lcmlora alone emoji noto-v1
    """
    config = _configure(context)
    from lcmlora import stages
    from lcmlora.evaluation import study as stage
    from lcmlora.training import checkpoint

    kind = stages.studied_kind(config, model, name)
    folder = _folder(model, f"{kind}s", name)
    base = _drawing_base(config, model, folder if kind == "finetune" else None)
    with checkpoint.locked(Path("scratch", "alone", f"{model}-{name}")) as scratch:
        stage.draw_alone(
            base,
            kind,
            folder,
            config.real_pictures(kind, name),
            config.study,
            config.evaluation_for(model),
            scratch,
            _folder(model, "alone", name),
        )


def study(context: typer.Context, model: Model) -> None:
    """Add the adapter to every style and fine-tuned checkpoint of `study`, draw and compare.

    Example: lcmlora study emoji
    """
    config = _configure(context)
    if not config.studied(model):
        raise UserError(f"{model}: is not studied; add it to study.models in params.yaml, with styles or finetunes")
    from lcmlora.evaluation import study as stage
    from lcmlora.training import checkpoint

    variations = [
        stage.Variation(kind, name, _folder(model, f"{kind}s", name), _folder(model, "alone", name))
        for kind, name in config.studied(model)
    ]
    with checkpoint.locked(Path("scratch", "study", model)) as scratch:
        stage.study(
            lambda folder: _drawing_base(config, model, folder),
            Path("adapters", model),
            variations,
            config.study,
            config.evaluation_for(model),
            Path("reference", model),
            scratch,
            Path("study", model),
        )


def _drawing_base(config, model: str, folder: Path | None):  # type: ignore[no-untyped-def]
    """Returns the base, or the fine-tuned checkpoint in `folder`."""
    from lcmlora import bases

    device = bases.pick_device(config.evaluation_for(model).device)
    dtype = bases.pick_dtype("auto", device)
    return bases.load(model, config.base(model), folder or Path("bases", model), device=device, dtype=dtype)
