"""A base as a plain diffusers pipeline, with the scheduler of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora.bases import families
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.bases.families.family import Family
from lcmlora.errors import UserError
from lcmlora.io import faults

if TYPE_CHECKING:
    import torch

_CONTROLNET = "ControlNetPipeline"  # the end of such a pipeline's name, in place of `Pipeline`


def family_of(pipeline: Any) -> Family:
    """Returns the family of a pipeline of diffusers, with or without a ControlNet.

    Raises:
        KeyError: it is of no known family.
    """
    name = type(pipeline).__name__
    if (family := families.by_pipeline(name.replace(_CONTROLNET, "Pipeline"))) is None:
        raise KeyError(name)
    return family


def network_of(pipeline: Any) -> Any:
    """Returns the network of a pipeline of diffusers, such as its UNet. Raises as `family_of`."""
    return getattr(pipeline, family_of(pipeline).network.folder)


def assemble_pipeline(base: Path, scheduler: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """Returns the base as a diffusers pipeline on the CPU, with an adapter's scheduler in place of its own.

    Args:
        base: the base's folder.
        scheduler: scheduler_config.json of the adapter's release.

    Raises:
        UserError: diffusers cannot load the base or the scheduler, or their prediction types differ.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Parts that drawing does not need, such as SD-V1.5's safety checker, are not downloaded.
    index = LibraryConfig.read(base / "model_index.json")
    absent = {name: None for name, part in index.items() if isinstance(part, list) and not (base / name).exists()}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            base, dtype=dtype, variant=variant, use_safetensors=True, **absent
        )
        config = LibraryConfig.read(scheduler)
        adapters_scheduler = getattr(diffusers, config.text("_class_name") or "").from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{scheduler}: plain diffusers cannot load it or {base}: {faults.chain(error)}") from error
    adapters, bases = adapters_scheduler.config.prediction_type, pipeline.scheduler.config.prediction_type
    if adapters != bases:
        raise UserError(f"{scheduler}: prediction_type is {adapters!r}, the base in {base} has {bases!r}")
    pipeline.scheduler = adapters_scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_controlnet(pipeline: Any, folder: Path) -> Any:
    """Returns a pipeline of the same parts with a ControlNet, in the network's precision.

    Args:
        folder: the ControlNet, as diffusers saves it.

    Raises:
        UserError: diffusers cannot load it, or it does not fit the network.
    """
    import diffusers

    try:
        controlnet = diffusers.ControlNetModel.from_pretrained(
            folder, torch_dtype=network_of(pipeline).dtype, use_safetensors=True, local_files_only=True
        )
        joined = diffusers.AutoPipelineForText2Image.from_pipe(pipeline, controlnet=controlnet)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder}: diffusers cannot load it as a ControlNet: {faults.chain(error)}") from error
    network, own = network_of(joined).config, controlnet.config
    for key in ("block_out_channels", "cross_attention_dim", "in_channels"):
        if (expected := network[key]) != (found := own[key]):
            raise UserError(f"{folder}: {key} is {found}, expected {expected}: it is a ControlNet of another family")
    joined.set_progress_bar_config(disable=True)
    return joined
