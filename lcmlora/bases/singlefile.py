"""Conversion of a single-file checkpoint, a .safetensors file in the original layout, into a diffusers folder."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lcmlora.bases import families
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.bases.examination.weightfiles import PICKLES, Entry, first_names, read_header, read_weights
from lcmlora.bases.families.family import SingleFile
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, sha256_file
from lcmlora.io.terminal import joined
from lcmlora.patches import bars

MARKER = ".single-file"  # the file in the folder with the digests of what it was made from
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def names_a_file(source: str) -> bool:
    """Returns whether a base's `source` is a single file, by its ending."""
    return Path(source).suffix.lower() in (".safetensors", *PICKLES)


def convert_checkpoint(name: str, base: Base, target: Path, sources: Path = Path()) -> None:
    """Makes `target` the diffusers folder of the checkpoint `base.source`, in the file's own precision.

    Idempotent: a marker in the folder has the file's SHA-256, `base.config`, and a digest of the latter's files; if one
    of these has changed, the checkpoint is converted again. An interrupted conversion leaves no `target`.
    Configurations, tokenizers and scheduler are those of `base.config`, a diffusers folder or a hub id (at
    `base.revision`); without it, diffusers recognises the architecture and asks the hub for them.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: a pickle, an unreadable file, one that lacks parts of Stable Diffusion or SDXL or does not fit its
            configuration, an unreachable hub, or a folder at `target` that is no conversion.
    """
    source = sources / base.source
    if source.suffix.lower() in PICKLES:
        raise UserError(
            f"bases.{name}.source: {source} is a pickle, which can run any code when it is read; expected .safetensors"
        )
    if not source.is_file():
        raise UserError(f"bases.{name}.source: {source}: no such file")
    if base.variant:
        raise UserError(f"bases.{name}.variant: a single file has one precision; remove the key")
    made_from = {"sha256": sha256_file(source), "config": base.config, "revision": base.revision}
    config = base.config
    if config is not None and (sources / config).is_dir():
        made_from["config_files"] = _config_digest(sources / config)
        config = str(sources / config)
    content = json.dumps(made_from, sort_keys=True) + "\n"
    marker = target / MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        return
    if target.exists() and not target.is_symlink() and not marker.is_file():
        raise UserError(f"{target} is in the way of the conversion of {source}; move it or rename the base")
    pipeline = _load_checkpoint(name, source, config, base.revision)
    with atomic_folder(target) as folder:
        with bars.hidden():
            pipeline.save_pretrained(folder)
        (folder / MARKER).write_text(content, encoding="utf-8")
        if target.is_symlink():  # the base was a linked folder before
            target.unlink()


def _config_digest(folder: Path) -> str:
    """Returns a digest of the configurations and vocabularies in a diffusers folder."""
    paths = sorted(path for ending in ("json", "txt") for path in folder.glob(f"*/*.{ending}"))
    lines = [f"{path.relative_to(folder).as_posix()} {sha256_file(path)}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _load_checkpoint(name: str, source: Path, config: str | None, revision: str | None) -> Any:
    """Returns the checkpoint as a diffusers pipeline on the CPU, checked against its configuration."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    entries = read_header(source)
    _check_family(source, entries)
    family = families.of_tensors(entries)
    layout = family.single_file
    assert layout is not None
    dtype = _precision(source, entries, layout)
    config_name = config or "the configuration that diffusers takes by default"
    pipeline = _load_pipeline(name, source, family.pipeline, config, revision, config_name, dtype)
    network = getattr(pipeline, family.network.folder)
    expected, stored = len(network.state_dict()), sum(key.startswith(layout.network) for key in entries)
    if stored != expected:  # diffusers drops tensors that a smaller architecture does not have
        raise UserError(
            f"bases.{name}.config: {source} does not fit {config_name}: the UNet has {stored} tensors in the file and "
            f"{expected} by its configuration; set the key to a diffusers folder of the same architecture"
        )
    _check_text_encoders(source, entries, pipeline, layout)
    _check_scheduler(name, source, entries, LibraryConfig.of_module(pipeline.scheduler))
    return pipeline


def _precision(source: Path, entries: Mapping[str, Entry], layout: SingleFile) -> torch.dtype:
    """Reads the weights of all parts and returns their precision; fp32 if they have several.

    Raises:
        UserError: a part is missing, or its weights have a fault; see `read_weights`.
    """
    parts = {"UNet": layout.network, "VAE": layout.vae, "text encoder": layout.text}
    for part, prefixes in parts.items():
        if not any(key.startswith(prefixes) for key in entries):
            raise UserError(
                f"{source}: has no {part} (no tensor begins with {' or '.join(prefixes)}); expected a whole checkpoint "
                "of Stable Diffusion or SDXL"
            )
    # Only the parts' own tensors count: half-precision files often have the schedule too, in fp32.
    weights = tuple(prefix for prefixes in parts.values() for prefix in prefixes)
    read_weights(source, lambda key: key.startswith(weights))
    dtypes = {
        _DTYPES[entry.dtype] for key, entry in entries.items() if entry.dtype in _DTYPES and key.startswith(weights)
    }
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _load_pipeline(
    name: str,
    source: Path,
    pipeline_class: str,
    config: str | None,
    revision: str | None,
    config_name: str,
    dtype: torch.dtype,
) -> Any:
    import diffusers
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return getattr(diffusers, pipeline_class).from_single_file(
            str(source), config=config, revision=revision, torch_dtype=dtype
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"bases.{name}.config: the hub cannot give {config_name}, which {source} goes with: {_one_line(error)}; "
            "set the key to a local diffusers folder of the same architecture"
        ) from error
    except Exception as error:  # of a foreign file, whatever it leads to
        # Weights that the file lacks stay on the meta device (NotImplementedError); a KeyError's text is only a name.
        incomplete = isinstance(error, NotImplementedError | KeyError)
        reason = f"it lacks weights of this architecture ({_one_line(error)})" if incomplete else _one_line(error)
        raise UserError(f"bases.{name}.config: {source} does not fit {config_name}: {reason}") from error


# Other kinds of files, by a pattern in a tensor's name.
_OTHER_FILES = (
    (r"lora_(up|down|A|B)\b|\.lora\.|^lora_", "a LoRA and no checkpoint; name it under `style` of a base"),
    (r"(^|\.)double_blocks\.", "a checkpoint of Flux"),
    (r"(^|\.)joint_blocks\.", "a checkpoint of Stable Diffusion 3"),
    (r"^control_model\.", "a ControlNet"),
    (r"^(down_blocks|mid_block|up_blocks)\.", "the UNet of a diffusers folder alone; name the whole folder"),
    (r"^(encoder|decoder)\.", "a VAE alone"),
    (r"^text_model\.", "a text encoder alone"),
    (r"(^|\.)(transformer_blocks|blocks)\.0\.", "a checkpoint of a diffusion transformer"),
)
_UNET = "model.diffusion_model."
# What a UNet with this number of input channels takes.
_OTHER_INPUTS = {
    5: "depth maps",
    7: "a picture to enlarge",
    8: "a picture to edit",
    9: "a masked picture, for inpainting",
}


def _check_family(source: Path, entries: Mapping[str, Entry]) -> None:
    """Raises UserError if the names of the tensors are those of another kind of file, which cannot be distilled."""
    has_unet = any(key.startswith(f"{_UNET}input_blocks.") for key in entries)
    for pattern, kind in _OTHER_FILES if not has_unet else ():
        if any(re.search(pattern, key) for key in entries):
            raise UserError(f"{source}: is {kind}; expected a whole checkpoint of Stable Diffusion 1, 2 or SDXL")
    if any(key.startswith("conditioner.embedders.0.model.") for key in entries):
        raise UserError(f"{source}: is SDXL's refiner, which has one text encoder; expected the base model")
    first = entries.get(f"{_UNET}input_blocks.0.0.weight")
    if first and len(first.shape) == 4 and (channels := first.shape[1]) in _OTHER_INPUTS:
        raise UserError(
            f"{source}: its UNet has {channels} input channels and takes {_OTHER_INPUTS[channels]}; expected a "
            "text-to-image base, with 4"
        )


# Names of a text encoder's layers in open_clip's layout, by transformers' names. The text encoder of SD 2 and SDXL's
# second have this layout.
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _check_text_encoders(source: Path, keys: Iterable[str], pipeline: Any, layout: SingleFile) -> None:
    """Raises UserError if the file lacks a tensor of a text encoder: diffusers would take random numbers for it."""
    keys = list(keys)
    for part, prefix in layout.text_encoders.items():
        stored = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if not stored:
            continue
        names = [name.removeprefix("text_model.") for name in getattr(pipeline, part).state_dict()]
        is_open_clip = any(key.startswith("model.") for key in stored)
        if is_open_clip:
            names = [_open_clip_name(name) for name in names]
        inner = "model." if is_open_clip else "transformer."
        stored = {key.removeprefix(inner).removeprefix("text_model.") for key in stored}
        if missing := sorted(set(names) - stored):
            raise UserError(
                f"{source}: its {part} lacks {len(missing)} tensors: {first_names(missing)}; get the file again"
            )


def _open_clip_name(name: str) -> str:
    if match := re.fullmatch(r"(.+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):  # the three are one matrix there
        name = f"{match[1]}.attn.in_proj_{match[2]}"
    for transformers_name, open_clip_name in _OPEN_CLIP.items():
        name = name.replace(transformers_name, open_clip_name)
    return name


def _check_scheduler(name: str, source: Path, keys: Collection[str], scheduler: LibraryConfig) -> None:
    """Raises UserError if the file's marks say that it was trained otherwise than the scheduler has it.

    Fine-tunes that predict v have an empty tensor `v_pred`, and `ztsnr` if their schedule ends in pure noise. ComfyUI
    reads these marks (comfy/supported_models.py), and diffusers does not.
    """
    for mark, key, value in (("v_pred", "prediction_type", "v_prediction"), ("ztsnr", "rescale_betas_zero_snr", True)):
        if mark in keys and scheduler.get(key) != value:
            raise UserError(
                f"bases.{name}.config: {source} is marked {mark}, and its scheduler's {key} is "
                f"{scheduler.get(key)}; set the key to a diffusers folder whose scheduler has {value}"
            )


def _one_line(error: BaseException) -> str:
    # The rest of diffusers' text is advice for callers of its functions.
    return joined(" ".join(str(error).split()).partition(". If you want")[0])
