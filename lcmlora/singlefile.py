"""Single-file checkpoints: a .safetensors file in the original layout becomes a diffusers folder, once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.files import atomic_folder, sha256_file

MARKER = ".single-file"  # in the folder: what it was made from
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

# What each part's tensors begin with in the layout of the original code.
_UNET = ("model.diffusion_model.",)
_VAE = ("first_stage_model.", "vae.")
_TEXT_SD = ("cond_stage_model.",)
_TEXT_SDXL = ("conditioner.embedders.",)


def names_a_file(source: str) -> bool:
    """Returns whether a base's `source` is meant as a single file, by its ending."""
    return Path(source).suffix in (".safetensors", *_PICKLES)


def convert(name: str, base: Base, target: Path) -> None:
    """Makes `target` the diffusers folder of the checkpoint `base.source`, in the file's own precision.

    Idempotent: a marker in the folder holds the file's SHA-256, and another file, or another `config`, is converted
    anew. An interrupted conversion leaves no `target`. Configurations, tokenizers and scheduler are those of
    `base.config`, a diffusers folder or a hub id (at `base.revision`), else of what diffusers takes the file for, which
    it asks the hub for.

    Raises:
        UserError: a pickle, an unreadable file, one without all parts of Stable Diffusion or SDXL or that does not fit
            its configuration, an unreachable hub, or a folder in the way that was not made here.
    """
    source = Path(base.source)
    if source.suffix in _PICKLES:
        raise UserError(
            f"bases.{name}.source: {source} is a pickle, which can run any code when it is read; expected .safetensors"
        )
    if not source.is_file():
        raise UserError(f"bases.{name}.source: {source}: no such file")
    if base.variant:
        raise UserError(f"bases.{name}.variant: a single file has one precision; remove the key")
    made_from = {"sha256": sha256_file(source), "config": base.config, "revision": base.revision}
    wanted = json.dumps(made_from, sort_keys=True) + "\n"
    marker = target / MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return
    if target.exists() and not target.is_symlink() and not marker.is_file():
        raise UserError(f"{target} is in the way of the conversion of {source}; move it or rename the base")
    pipeline = _load(name, base, source)
    with atomic_folder(target) as folder:
        pipeline.save_pretrained(folder)
        (folder / MARKER).write_text(wanted, encoding="utf-8")
        if target.is_symlink():  # the base was a folder before
            target.unlink()


def _load(name: str, base: Base, source: Path) -> Any:
    """Returns the checkpoint as a diffusers pipeline on the CPU."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    dtypes = _tensors(source)
    sdxl = any(key.startswith(_TEXT_SDXL) for key in dtypes)
    parts = {"UNet": _UNET, "VAE": _VAE, "text encoder": _TEXT_SDXL if sdxl else _TEXT_SD}
    for part, prefixes in parts.items():
        if not any(key.startswith(prefixes) for key in dtypes):
            raise UserError(
                f"{source}: has no {part} (no tensor begins with {' or '.join(prefixes)}); expected a whole checkpoint "
                "of Stable Diffusion or SDXL"
            )
    # Of the weights alone: half-precision files often hold the schedule too, in fp32.
    weights = tuple(prefix for prefixes in parts.values() for prefix in prefixes)
    floating = {_DTYPES[dtype] for key, dtype in dtypes.items() if dtype in _DTYPES and key.startswith(weights)}
    cls = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    config = base.config or "the configuration that diffusers takes by default"
    try:
        pipeline = cls.from_single_file(
            str(source),
            config=base.config,
            revision=base.revision,
            # A file of mixed precision is kept whole in fp32.
            torch_dtype=floating.pop() if len(floating) == 1 else torch.float32,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"bases.{name}.config: the hub cannot give {config}, which {source} goes with: {_line(error)}; set the key "
            "to a local diffusers folder of the same architecture"
        ) from error
    except (SingleFileComponentError, OSError, ValueError, KeyError, RuntimeError) as error:
        # Weights that the file does not have stay without data, and a KeyError is a name and nothing else.
        missing = isinstance(error, NotImplementedError | KeyError)
        reason = f"it lacks weights of this architecture ({_line(error)})" if missing else _line(error)
        raise UserError(f"bases.{name}.config: {source} does not fit {config}: {reason}") from error
    ours, theirs = len(pipeline.unet.state_dict()), sum(key.startswith(_UNET) for key in dtypes)
    if ours != theirs:  # diffusers drops what a smaller architecture has no place for
        raise UserError(
            f"bases.{name}.config: {source} does not fit {config}: the UNet has {theirs} tensors in the file and "
            f"{ours} by its configuration; set the key to a diffusers folder of the same architecture"
        )
    _check_scheduler(name, source, set(dtypes), pipeline.scheduler.config)
    return pipeline


def _tensors(source: Path) -> dict[str, str]:
    """Returns the type of every tensor in the file by its name; reads the header alone."""
    try:
        with safe_open(source, framework="pt") as file:
            return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise UserError(f"{source}: is not a readable safetensors file: {error}") from error


def _check_scheduler(name: str, source: Path, keys: set[str], scheduler: dict[str, Any]) -> None:
    """Raises UserError where the file says by its marks how it was trained, and the scheduler says otherwise.

    Fine-tunes that predict v carry an empty tensor `v_pred`, and `ztsnr` where their schedule ends in pure noise, which
    ComfyUI reads (comfy/supported_models.py) and diffusers does not.
    """
    for mark, key, value in (("v_pred", "prediction_type", "v_prediction"), ("ztsnr", "rescale_betas_zero_snr", True)):
        if mark in keys and scheduler.get(key) != value:
            raise UserError(
                f"bases.{name}.config: {source} is marked {mark}, and its scheduler's {key} is "
                f"{scheduler.get(key)}; set the key to a diffusers folder whose scheduler has {value}"
            )


def _line(error: BaseException) -> str:
    # diffusers goes on with advice for those who call it.
    return " ".join(str(error).split()).partition(". If you want")[0][:300]
