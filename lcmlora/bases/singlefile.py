"""Single-file checkpoints: a .safetensors file in the original layout becomes a diffusers folder, once."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lcmlora.bases import families
from lcmlora.bases.examination.weightfiles import PICKLES, Entry, header, read, some
from lcmlora.bases.families.family import SingleFile
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.io.files import atomic_folder, sha256_file
from lcmlora.patches import bars

MARKER = ".single-file"  # in the folder: what it was made from
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def names_a_file(source: str) -> bool:
    """Returns whether a base's `source` is meant as a single file, by its ending."""
    return Path(source).suffix.lower() in (".safetensors", *PICKLES)


def convert(name: str, base: Base, target: Path, sources: Path = Path()) -> None:
    """Makes `target` the diffusers folder of the checkpoint `base.source`, in the file's own precision.

    Idempotent: a marker in the folder holds the file's SHA-256, and another file, or another `config`, or one whose
    configurations and tokenizers have changed, is converted anew. An interrupted conversion leaves no `target`.
    Configurations, tokenizers and scheduler are those of `base.config`, a diffusers folder or a hub id (at
    `base.revision`), else of what diffusers takes the file for, which it asks the hub for.

    Args:
        sources: the folder that relative paths of `base` are relative to.

    Raises:
        UserError: a pickle, an unreadable file, one without all parts of Stable Diffusion or SDXL or that does not fit
            its configuration, an unreachable hub, or a folder in the way that was not made here.
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
        made_from["config_files"] = _small_files(sources / config)
        config = str(sources / config)
    wanted = json.dumps(made_from, sort_keys=True) + "\n"
    marker = target / MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return
    if target.exists() and not target.is_symlink() and not marker.is_file():
        raise UserError(f"{target} is in the way of the conversion of {source}; move it or rename the base")
    pipeline = _load(name, source, config, base.revision)
    with atomic_folder(target) as folder:
        with bars.hidden():
            pipeline.save_pretrained(folder)
        (folder / MARKER).write_text(wanted, encoding="utf-8")
        if target.is_symlink():  # the base was a folder before
            target.unlink()


def _small_files(folder: Path) -> str:
    """Returns a digest of the configurations and vocabularies in a folder."""
    paths = sorted(path for ending in ("json", "txt") for path in folder.glob(f"*/*.{ending}"))
    named = [f"{path.relative_to(folder).as_posix()} {sha256_file(path)}" for path in paths]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def _load(name: str, source: Path, config: str | None, revision: str | None) -> Any:
    """Returns the checkpoint as a diffusers pipeline on the CPU."""
    import diffusers
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    entries = header(source)
    _check_family(source, entries)
    dtypes = {key: entry.dtype for key, entry in entries.items()}
    family = families.of_tensors(dtypes)
    layout = family.single_file
    assert layout is not None
    parts = {"UNet": layout.network, "VAE": layout.vae, "text encoder": layout.text}
    for part, prefixes in parts.items():
        if not any(key.startswith(prefixes) for key in dtypes):
            raise UserError(
                f"{source}: has no {part} (no tensor begins with {' or '.join(prefixes)}); expected a whole checkpoint "
                "of Stable Diffusion or SDXL"
            )
    # Of the weights alone: half-precision files often hold the schedule too, in fp32.
    weights = tuple(prefix for prefixes in parts.values() for prefix in prefixes)
    read(source, lambda key: key.startswith(weights))
    floating = {_DTYPES[dtype] for key, dtype in dtypes.items() if dtype in _DTYPES and key.startswith(weights)}
    cls = getattr(diffusers, family.pipeline)
    shown = config or "the configuration that diffusers takes by default"
    try:
        pipeline = cls.from_single_file(
            str(source),
            config=config,
            revision=revision,
            # A file of mixed precision is kept whole in fp32.
            torch_dtype=floating.pop() if len(floating) == 1 else torch.float32,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"bases.{name}.config: the hub cannot give {shown}, which {source} goes with: {_line(error)}; set the key "
            "to a local diffusers folder of the same architecture"
        ) from error
    except Exception as error:  # of a foreign file, whatever it leads to
        # Weights that the file does not have stay without data, and a KeyError is a name and nothing else.
        missing = isinstance(error, NotImplementedError | KeyError)
        reason = f"it lacks weights of this architecture ({_line(error)})" if missing else _line(error)
        raise UserError(f"bases.{name}.config: {source} does not fit {shown}: {reason}") from error
    network = getattr(pipeline, family.network.folder)
    ours, theirs = len(network.state_dict()), sum(key.startswith(layout.network) for key in dtypes)
    if ours != theirs:  # diffusers drops what a smaller architecture has no place for
        raise UserError(
            f"bases.{name}.config: {source} does not fit {shown}: the UNet has {theirs} tensors in the file and "
            f"{ours} by its configuration; set the key to a diffusers folder of the same architecture"
        )
    _check_text(source, dtypes, pipeline, layout)
    _check_scheduler(name, source, set(dtypes), pipeline.scheduler.config)
    return pipeline


# What the names of other files contain, and what these are.
_FAMILIES = (
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
_TAKES = {5: "depth maps", 7: "a picture to enlarge", 8: "a picture to edit", 9: "a masked picture, for inpainting"}


def _check_family(source: Path, entries: dict[str, Entry]) -> None:
    """Raises UserError where the file is known by its tensors' names to be something else than what is distilled."""
    ours = sum(key.startswith(f"{_UNET}input_blocks.") for key in entries)
    for pattern, what in _FAMILIES if not ours else ():
        if any(re.search(pattern, key) for key in entries):
            raise UserError(f"{source}: is {what}; expected a whole checkpoint of Stable Diffusion 1, 2 or SDXL")
    if any(key.startswith("conditioner.embedders.0.model.") for key in entries):
        raise UserError(f"{source}: is SDXL's refiner, which has one text encoder; expected the base model")
    first = entries.get(f"{_UNET}input_blocks.0.0.weight")
    if first and len(first.shape) == 4 and first.shape[1] in _TAKES:
        raise UserError(
            f"{source}: its UNet has {first.shape[1]} input channels and takes {_TAKES[first.shape[1]]}; expected a "
            "text-to-image base, with 4"
        )


# A text encoder's layers in the layout of open_clip, which SD 2 and SDXL's second have, by transformers' names.
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


def _check_text(source: Path, keys: Iterable[str], pipeline: Any, layout: SingleFile) -> None:
    """Raises UserError where the file lacks a tensor of a text encoder, for which diffusers takes random numbers."""
    keys = list(keys)
    for part, prefix in layout.text_encoders.items():
        held = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        if not held:
            continue
        names = [name.removeprefix("text_model.") for name in getattr(pipeline, part).state_dict()]
        open_clip = any(key.startswith("model.") for key in held)
        if open_clip:
            names = [_open_clip(name) for name in names]
        found = {
            key.removeprefix("model." if open_clip else "transformer.").removeprefix("text_model.") for key in held
        }
        if lost := sorted(set(names) - found):
            raise UserError(f"{source}: its {part} lacks {len(lost)} tensors: {some(lost)}; get the file again")


def _open_clip(name: str) -> str:
    if found := re.fullmatch(r"(.+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):  # one matrix there
        name = f"{found[1]}.attn.in_proj_{found[2]}"
    for theirs, open_clips in _OPEN_CLIP.items():
        name = name.replace(theirs, open_clips)
    return name


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
