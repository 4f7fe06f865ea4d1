"""A base as the plain diffusers pipeline that everybody loads, with the scheduler of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora.bases import families
from lcmlora.bases.examination.weightfiles import json_of
from lcmlora.bases.families.family import Family
from lcmlora.errors import UserError

if TYPE_CHECKING:
    import torch


def family_of(pipeline: Any) -> Family:
    """Returns the family of a pipeline of diffusers. Raises KeyError where there is none."""
    if (family := families.by_pipeline(type(pipeline).__name__)) is None:
        raise KeyError(type(pipeline).__name__)
    return family


def network(pipeline: Any) -> Any:
    """Returns the network of a pipeline of diffusers."""
    return getattr(pipeline, family_of(pipeline).network.folder)


def assemble(base: Path, scheduler: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """Returns the base as a diffusers pipeline on the CPU, with another scheduler: that of an adapter.

    Args:
        scheduler: its configuration, scheduler_config.json of a release.

    Raises:
        UserError: diffusers cannot load the base or the scheduler, or these do not go together.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Parts that drawing does not need, such as SD-V1.5's safety checker, are not downloaded.
    listed = json_of(base / "model_index.json")
    absent = {n: None for n, part in listed.items() if isinstance(part, list) and not (base / n).exists()}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            base, dtype=dtype, variant=variant, use_safetensors=True, **absent
        )
        settings = json_of(scheduler)
        made = getattr(diffusers, settings["_class_name"]).from_config(settings)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{scheduler}: plain diffusers cannot load it or {base}: {reason}") from error
    mine, theirs = made.config.prediction_type, pipeline.scheduler.config.prediction_type
    if mine != theirs:
        raise UserError(f"{scheduler}: prediction_type is {mine!r}, the base in {base} has {theirs!r}")
    pipeline.scheduler = made
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
